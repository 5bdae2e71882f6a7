"""A question in a tokenizer's chat template, checked to say what it was given."""

import re
from datetime import date
from itertools import product

from .obtain import ModelError, brief

DATE = date(2024, 7, 26)  # for templates that write today's: the prompt is the same tomorrow
MARKS = ["zqsystemqz", "zqquestionqz"]  # stand for the system text and the question
WHOLE = "use another model, or another lm.tokenizer.chat_template"


def filled(tokenizer, name: str, text: str, system: str | None = None) -> str:
    """The template of the model `name` with the texts in it, ready for the answer."""
    given = [text] if system is None else [system, text]
    way, pieces = _frame(tokenizer, name, len(given))
    try:
        prompt = _render(tokenizer, given, *way)
    except Exception as error:  # raise_exception(…) of the template
        raise ModelError(f"The chat template of {name} refuses this: {brief(error)}.") from None
    expected = re.escape(pieces[0])
    for said, piece in zip(given, pieces[1:]):  # many templates strip what they are given
        expected += rf"\s*{re.escape(said.strip())}\s*{re.escape(piece)}"
    if not re.fullmatch(expected, prompt):
        raise ModelError(f"The chat template of {name} changes {text[:40]!r}: {WHOLE}.")
    return prompt


def opening(tokenizer, name: str, with_system: bool) -> str:
    """What stands in the template before the first text."""
    return _frame(tokenizer, name, 1 + with_system)[1][0]


def _frame(tokenizer, name: str, n_texts: int):
    """The first way of asking that keeps the texts, each once and in order, and what the template
    has before, between and after them. A way: (system text in the user's turn, for templates
    without a system role; texts as lists of parts, for those that iterate over them)."""
    marks, failure = MARKS[-n_texts:], "drops or repeats what is asked"
    for way in product([False, True][:n_texts], [False, True]):
        try:
            rendered = _render(tokenizer, marks, *way)
        except Exception as error:
            failure = f"refuses every prompt ({brief(error)})"
            continue
        printed = "text': 'zq" in rendered  # a list of parts, as Python writes it
        if re.findall("|".join(MARKS), rendered) == marks and not printed:
            return way, re.split("|".join(marks), rendered)
    raise ModelError(f"The chat template of {name} {failure}: {WHOLE}.")


def _render(tokenizer, texts, in_users_turn: bool, as_parts: bool) -> str:
    texts, messages = ["\n\n".join(texts)] if in_users_turn else texts, []
    for role, text in zip(["system", "user"][-len(texts) :], texts):
        content = [{"type": "text", "text": text}] if as_parts else text
        messages.append({"role": role, "content": content})
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _pinned_clock() + template
    how = dict(chat_template=template, tokenize=False, add_generation_prompt=True)
    return tokenizer.apply_chat_template(messages, **how)


def _pinned_clock() -> str:
    """A macro that stands before a template and hides transformers' strftime_now."""
    written = "format"
    for letter in "aAbBdmyYjHIMSp":
        value = DATE.strftime(f"%{letter}")
        written += f".replace('%{letter}', '{value}').replace('%-{letter}', '{value.lstrip('0')}')"
    return f"{{% macro strftime_now(format) %}}{{{{ {written} }}}}{{% endmacro %}}\n"
