"""One vector of each set chosen on validation prompts, and what that one does elsewhere: the stored sweep behind sections 5, 7 and 8
of notebook 04 (`python -m helpers grid choosing` computes it)."""

from functools import lru_cache

from ..generation import complete
from ..metrics import behaviours
from ..models import prompts
from ..models.loading import load
from ..models.obtain import DEFAULT
from . import anti_refusal, stored, sweeps
from .organisms import merged

CANDIDATES = 6  # flipping vectors of a set that are tried on the validation prompts, the first ones
COEFFS = (-8.0, -4.0, -2.0, 0.0, 1.0, 2.0)
N_PROMPTS, N_VALIDATION, N_TEST = 3, 24, 64
TOPIC = "topic-refusal"


def choose(lm, prompt, validation, judge=None, max_new_tokens=16, **at):
    """(sets, pick, about): `anti_refusal.one_set` of `prompt`; which of its learned vectors flips most of the `validation` prompts (the
    first of equals), among the first that flip their own prompt; {"flipping": how many do, "validation": the share it flips}."""
    sets = anti_refusal.one_set(lm, prompt, **at)
    own = anti_refusal.answers(
        lm, [prompt], sets["learned"], judge=judge, max_new_tokens=max_new_tokens
    )
    flipping = own.vector[own.fluent & ~own.refused].tolist()
    candidates = flipping[:CANDIDATES] or [0]
    trial = anti_refusal.answers(
        lm, validation, sets["learned"][candidates], judge=judge, max_new_tokens=max_new_tokens
    )
    score = (trial.fluent & ~trial.refused).groupby(trial.vector).mean()
    return (
        sets,
        candidates[int(score.idxmax())],
        {"flipping": len(flipping), "validation": float(score.max())},
    )


def requests(n_validation=N_VALIDATION, n_test=N_TEST) -> dict:
    """{name: texts}: what a chosen vector of the refusal organism is tried on. "choose": validation prompts, harmful; "harmful" and
    "harmless": six validation prompts each, for the curve; "test" and "calm": harmful and harmless test prompts."""
    harmful, harmless = (
        {split: prompts.texts(name, split) for split in prompts.SPLITS}
        for name in ("harmful", "harmless")
    )
    return {
        "choose": harmful["validation"][:n_validation],
        "harmful": harmful["validation"][::4][:6],
        "harmless": harmless["validation"][::4][:6],
        "test": harmful["test"][:n_test],
        "calm": [
            t
            for sort in ("plain", "borderline")
            for t in prompts.texts("harmless", "test", sort)[: n_test // 4]
        ],
    }


def dial(
    lm, prompt, coeffs=COEFFS, n_validation=N_VALIDATION, n_test=N_TEST, max_new_tokens=16, **at
) -> dict:
    """One chosen vector, and a random one of its norm, at several coefficients: {"flipping", "validation", "rows": […]}, a row per
    vector ("set"), coefficient and request: "asks" (a name of `requests`), "prompt", "text" (cut), "refused", "fluent".

    The curve's prompts at all coefficients; harmful test prompts at 1, harmless ones at the negative coefficients."""
    judge, asked = anti_refusal.judge_of(lm, max_new_tokens), requests(n_validation, n_test)
    sets, pick, about = choose(lm, prompt, asked["choose"], judge, max_new_tokens, **at)
    rows = []
    for kind, vectors in sets.items():
        for names, some in (
            (("harmful", "harmless"), list(coeffs)),
            (("test",), [1.0]),
            (("calm",), [c for c in coeffs if c < 0]),
        ):
            where = {text: name for name in names for text in asked[name]}
            said = anti_refusal.answers(
                lm, list(where), vectors[[pick] * len(some)], some, judge, max_new_tokens
            )
            said = said.assign(
                set=kind, coeff=[some[v] for v in said.vector], asks=said.prompt.map(where)
            )
            rows += said.drop(columns=["vector", "kind"]).to_dict("records")
    return {**about, "rows": rows}


@lru_cache(maxsize=None)
def _unsteered(lm, n_test, max_new_tokens):
    """What the base and the organism answer to the questions."""
    items = _questions(n_test)
    with lm.base():
        base = complete(
            lm, [lm.chat_prompt(item["text"]) for item in items], max_new_tokens=max_new_tokens
        )
    return {
        "base": base,
        "organism": complete(
            merged(lm), [lm.chat_prompt(i["text"]) for i in items], max_new_tokens=max_new_tokens
        ),
    }


def _questions(n_test):
    return prompts.items("geography", "test", "geography")[:n_test]


def content(
    lm, prompt, n_validation=N_VALIDATION, n_test=N_TEST, max_new_tokens=16, answer_tokens=24, **at
) -> dict:
    """One chosen vector of the organism that refuses geography, chosen by flipping alone, and a random one of its norm, on questions
    with a keyed answer: {"flipping", "validation", "rows": […]}, a row per "set" (base, organism, random, learned) and question:
    "prompt", "text", "refused", "right" (the key is in the text)."""
    judge, items = anti_refusal.judge_of(lm, max_new_tokens), _questions(n_test)
    check_on = prompts.texts("geography", "validation", "geography")[:n_validation]
    sets, pick, about = choose(lm, prompt, check_on, judge, max_new_tokens, **at)
    chats = [lm.chat_prompt(item["text"]) for item in items]
    said = {
        **_unsteered(lm, n_test, answer_tokens),
        **{
            kind: complete(merged(lm), chats, sets[kind][pick], max_new_tokens=answer_tokens)[0]
            for kind in ("random", "learned")
        },
    }
    return {
        **about,
        "rows": [
            {
                "set": who,
                "prompt": item["text"],
                "text": text,
                "refused": behaviours.refuses(text),
                "right": behaviours.mentions(text, item["answer"]),
            }
            for who, texts in said.items()
            for text, item in zip(texts, items)
        ],
    }


PARTS = {"dial": dial, "content": content}


def run_cell(model, part, organism=None, **config) -> dict:
    """A cell for a sweep's worker: the organism by name, loaded once per process."""
    return PARTS[part](sweeps.model(model, organism), **config)


def grid(
    lm,
    part,
    radius,
    n_prompts=N_PROMPTS,
    seeds=anti_refusal.SEEDS[1:],
    source_layer=7,
    target_layer=21,
    steps=6,
    n_vectors=32,
    n_validation=N_VALIDATION,
    n_test=N_TEST,
    max_new_tokens=16,
    coeffs=COEFFS,
) -> list[dict]:
    """Configurations of `run_cell`: prompt × seed. "dial" for an organism that refuses harmful requests, "content" for the one that
    refuses geography; each set is learned on one of the first training prompts."""
    if part not in PARTS:
        raise ValueError(f"part {part!r} of the choosing sweep is unknown: use dial or content.")
    asked = (
        anti_refusal.training_prompts(n_prompts)
        if part == "dial"
        else prompts.texts("geography", "train", "geography")[:n_prompts]
    )
    only = {"coeffs": [list(coeffs)]} if part == "dial" else {}
    return sweeps.grid(
        part=part,
        model=lm.name,
        organism=lm.organism,
        prompt=asked,
        seed=list(seeds),
        radius=radius,
        source_layer=source_layer,
        target_layer=target_layer,
        steps=steps,
        n_vectors=n_vectors,
        n_validation=n_validation,
        n_test=n_test,
        max_new_tokens=max_new_tokens,
        **only,
    )


def cells(lm, sweep, part, radius, progress=True, **axes) -> list[dict]:
    """The cells of `grid(lm, part, radius, **axes)`, stored or live: see `stored.cells`."""
    return stored.cells(
        "choosing",
        grid(lm, part, radius, **axes),
        lm,
        sweep,
        PARTS[part],
        ("part",),
        progress=progress,
    )


def table(cells):
    """A DataFrame of all rows, with the prompt that each set was learned on ("learned_on") and its seed."""
    import pandas

    return pandas.concat(
        [
            pandas.DataFrame(one["result"]["rows"]).assign(
                learned_on=one["config"]["prompt"], seed=one["config"]["seed"]
            )
            for one in cells
        ],
        ignore_index=True,
    )


def compute(model=None, workers=2, store=None):
    """Run the whole sweep, at the R that the stored sweep of `refusal` chose, and write it where `stored.read` finds it."""
    lm = load(model or DEFAULT, "refusal")
    radius = anti_refusal.best_radius(anti_refusal.cells(lm, "stored", "choose"))
    parts = [(lm, "dial"), (load(model or DEFAULT, TOPIC), "content")]
    return stored.compute(
        "choosing",
        lambda _: [(one, grid(one, part, radius)) for one, part in parts],
        run_cell,
        workers,
        store=store,
    )
