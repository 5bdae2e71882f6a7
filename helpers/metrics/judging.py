"""Texts of one's own, judged: what `python -m helpers judge` does."""

from .. import UserError
from ..models import prompts as prompt_sets
from .judges import FluentRange, is_changed, kappa, reasons
from .text import embed, fluent_range, read

FIELDS = ("prompt", "clean", "text")  # what a row must have; "labels" it may have
LONGEST = 8000  # characters of a text
JUDGED = ("changed", "fluent")
CALIBRATION = 24  # everyday prompts that say how surprising the model's own texts are


def check_rows(rows) -> None:
    """UserError, in one sentence, unless `rows` is what `judge` takes."""
    if not isinstance(rows, list) or not rows:
        raise UserError("There are no texts to judge: give a list of objects, one per text.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"Text {number} is no object with {', '.join(FIELDS)}: {row!r:.60}.")
        for field in row:
            if field not in (*FIELDS, "labels"):
                has = ", ".join((*FIELDS, "labels"))
                raise UserError(f"Text {number} has the unknown field {field!r}: use {has}.")
        for field in FIELDS:
            if not isinstance(row.get(field), str):
                raise UserError(f"Text {number} has no text as its {field!r}: {row.get(field)!r}.")
            if len(row[field]) > LONGEST:
                raise UserError(
                    f"Text {number} has {len(row[field]):,} characters as its {field!r}: "
                    f"give at most {LONGEST:,}."
                )
        if not row["prompt"].strip():
            raise UserError(f"Text {number} has an empty prompt.")
        labels = row.get("labels", {})
        known = isinstance(labels, dict) and set(labels) <= set(JUDGED)
        if not known or not all(isinstance(value, bool) for value in labels.values()):
            allowed = "use changed and fluent, true or false"
            raise UserError(f"Text {number} has the labels {labels!r:.60}: {allowed}.")


def judge(lm, rows, fluent: FluentRange | None = None) -> list[dict]:
    """Rows of {"prompt" (plain text), "clean": the usual answer, "text"} with "changed", "fluent",
    "distance" (to the clean answer), "surprise" (nats per token, None if too short) and "failed":
    what speaks most against a text that is not both.

    fluent: how surprising the model's own texts are (default: measured on everyday prompts).
    UserError: rows of another form."""
    check_rows(rows)
    if fluent is None:
        everyday = prompt_sets.texts("everyday", n=CALIBRATION)
        fluent = fluent_range(lm, [lm.chat_prompt(text) for text in everyday], max_new_tokens=24)
    chats = [lm.chat_prompt(row["prompt"]) for row in rows]
    nll, embedded = read(lm, chats, [row["text"] for row in rows])
    usual = embed(lm, chats, [row["clean"] for row in rows])
    apart = (1 - (embedded * usual).sum(-1)).tolist()
    found = []
    for row, number, far in zip(rows, nll, apart):
        number = None if number != number else float(number)
        asked = [row["text"]], row["clean"], row["prompt"], [far]
        judged = {"changed": bool(is_changed(*asked)[0])}
        judged["fluent"] = bool(fluent([number], [row["text"]])[0])
        judged |= {"distance": round(far, 4), "surprise": number and round(number, 4)}
        judged["failed"] = reasons(row, judged, fluent.high)
        found.append({**row, **judged})
    return found


def agreement_with_labels(judged) -> list[str]:
    """A line per label that the rows bring along: n, agreement, κ."""
    lines = []
    for name in JUDGED:
        pairs = [
            (row[name], row["labels"][name]) for row in judged if name in row.get("labels", {})
        ]
        if pairs:
            ours, theirs = zip(*pairs)
            agree = sum(a == b for a, b in pairs) / len(pairs)
            lines.append(
                f"{name}: {len(pairs)} labels, {agree:.0%} agree, κ {kappa(ours, theirs):.2f}"
            )
    return lines
