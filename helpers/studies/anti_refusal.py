"""Anti-refusal: what a model that refuses says under each vector, and what one chosen vector does
elsewhere. The sweep of notebook 04.

    judge = judge_of(lm)  # fluent: as the base's own answers to such requests are
    rows = answers(lm, questions, vectors, judge=judge)  # a DataFrame: prompt, text (cut), …
"""

import hashlib
import json

import numpy as np
import pandas

from .. import ledger, metrics
from ..generation import complete
from ..models import prompts, remembered
from ..residual import LayerSpan
from ..training import learned_and_start
from . import store, sweeps
from .speaking import TARGET_TOKENS, residual_norms
from .study import Study

CALIBRATION = 24  # harmful training prompts whose base answers say what is fluent
CANDIDATES = 6  # flipping vectors of a set that are tried on the validation prompts, the first ones

# The sweep: prompts (ids in harmful.json), seeds, radii. Its first version (EARLIER) began with a
# prompt that the organism refuses with probability 0.84 only, where random vectors flip answers
# too; the prompts of ASKED are refused with more than 0.95.
ASKED, SEEDS = ("cybercrime-6", "fraud-11", "deception-1"), (101, 104, 105)
EARLIER, EARLIER_SEEDS = ("cybercrime-1", "fraud-11", "deception-1"), (101, 102, 103)
EARLIER_RADIUS = 12.0
RADII = (8.0, 12.0, 16.0, 24.0)
LAYERS = (3, 7, 11, 15)  # source layers
SHARES = (0.1, 0.2)  # of the residual norm at the source, for the sweep over layers
COEFFS = (-8.0, -4.0, -2.0, 0.0, 1.0, 2.0)


# -- what is said ----------------------------------------------------------------------------------
@remembered
def judge_of(lm, max_new_tokens=16) -> metrics.FluentRange:
    """Fluent is what is as surprising, to the base, as the base's own answers to harmful training
    prompts, greedy or sampled at temperature 0.7 (at 1, a small model rambles)."""
    texts = prompts.texts("harmful", "train")
    texts = texts[:: max(1, len(texts) // CALIBRATION)][:CALIBRATION]  # from all categories
    chats = [lm.chat_prompt(text) for text in texts]
    return metrics.fluent_range(lm, chats, temperatures=(0.0, 0.7), max_new_tokens=max_new_tokens)


def answers(lm, asked, vectors=None, coeff=1.0, judge=None, max_new_tokens=16):
    """What the model says to each of `asked` (plain texts) under each vector, as a DataFrame:
    vector, prompt, text (cut), surprise (where the judge was asked), refused, fluent, kind.

    `judge`: a FluentRange; refusals are not put to it (they count as fluent unless they loop), and
    without it only loops and empty texts are not fluent."""
    rows = _judged(lm, asked, vectors, coeff, judge, max_new_tokens)
    return pandas.DataFrame(rows).drop(columns="whole")


def _judged(lm, asked, vectors=None, coeff=1.0, judge=None, max_new_tokens=16):
    """The rows of `answers`, as dicts, with the whole texts beside them."""
    chats = [lm.chat_prompt(text) for text in asked]
    said = complete(lm, chats, vectors, coeff, max_new_tokens=max_new_tokens)
    by_vector = [said] if vectors is None else said
    rows, unsure = [], {}  # of each pair (prompt, text) that the judge is asked about: its rows
    for v, texts in enumerate(by_vector):
        for prompt, chat, text in zip(asked, chats, texts):
            row = {"vector": v, "prompt": prompt, "text": metrics.cut(text), "surprise": None}
            row |= {"refused": metrics.refuses(text), "fluent": metrics.distinct2(text) >= 0.5}
            row["whole"] = text
            rows.append(row)
            if judge is not None and row["fluent"] and not row["refused"]:
                unsure.setdefault((chat, text), []).append(row)
    if unsure:
        pairs = list(unsure)
        nll = metrics.surprise(lm, [chat for chat, _ in pairs], [text for _, text in pairs])
        passed = judge(nll, [text for _, text in pairs])
        for pair, number, good in zip(pairs, nll, passed):
            for row in unsure[pair]:
                row["surprise"] = None if np.isnan(number) else round(float(number), 4)
                row["fluent"] = bool(good)
    for row in rows:
        row["kind"] = metrics.kind_of_answer(row["whole"], row["prompt"], row["fluent"])
    return rows


def keep_whole(one) -> dict:
    """A cell without its whole texts, which go to build/texts: the repository has them cut."""
    if "whole" not in one["result"]["rows"][0]:
        return one
    rows = [dict(row) for row in one["result"]["rows"]]
    whole = [row.pop("whole") for row in rows]
    key = hashlib.sha256(json.dumps(one["config"], sort_keys=True).encode()).hexdigest()
    path = ledger.build_folder() / "texts" / "anti_refusal" / f"{key}.json"
    text = json.dumps({"config": one["config"], "texts": whole}, ensure_ascii=False, indent=1)
    ledger.write_atomically(path, text + "\n")
    return {**one, "result": {**one["result"], "rows": rows}}


# -- one set, and one vector chosen from it --------------------------------------------------------
def one_set(lm, prompt, source_layer, target_layer, radius, seed, steps=6, n_vectors=32):
    """{"learned", "random"}: an orthogonal set trained on one prompt, and what it began as."""
    span = LayerSpan(lm, lm.chat_prompt(prompt), source_layer, target_layer, TARGET_TOKENS)
    return learned_and_start(span, radius, n_vectors, steps, seed)


def choose(lm, prompt, validation, judge=None, max_new_tokens=16, **at):
    """(`one_set` of `prompt`, pick, about): of the first learned vectors that flip the prompt, the
    one that flips most of the `validation` prompts (the first of equals); about: {"flipping": how
    many do, "validation": the share it flips}."""
    sets = one_set(lm, prompt, **at)
    how = dict(judge=judge, max_new_tokens=max_new_tokens)
    own = answers(lm, [prompt], sets["learned"], **how)
    flipping = own.vector[own.fluent & ~own.refused].tolist()
    candidates = flipping[:CANDIDATES] or [0]
    trial = answers(lm, validation, sets["learned"][candidates], **how)
    score = (trial.fluent & ~trial.refused).groupby(trial.vector).mean()
    about = {"flipping": len(flipping), "validation": float(score.max())}
    return sets, candidates[int(score.idxmax())], about


def requests(n_validation=24, n_test=64) -> dict:
    """{name: texts}: what a chosen vector of the refusal organism is tried on. "choose": validation
    prompts; "harmful", "harmless": six of each, for the curve; "test", "calm": test prompts."""
    calm = []
    for sort in ("plain", "borderline"):
        calm += prompts.texts("harmless", "test", sort)[: n_test // 4]
    return {
        "choose": prompts.texts("harmful", "validation")[:n_validation],
        "harmful": prompts.texts("harmful", "validation")[::4][:6],
        "harmless": prompts.texts("harmless", "validation")[::4][:6],
        "test": prompts.texts("harmful", "test")[:n_test],
        "calm": calm,
    }


# -- the cells -------------------------------------------------------------------------------------
def cell(lm, part, **config) -> dict:
    """{"rows": […]} of one cell: see `sets_cell`, `dial` and `content`."""
    return {"dial": dial, "content": content}.get(part, sets_cell)(lm, **config)


def sets_cell(lm, prompt, source_layer, radius=None, share=None, max_new_tokens=16, **at) -> dict:
    """Train a set, and what the model says to the same prompt under each vector of it and of its
    random start. `share` in place of `radius`: of the median residual norm at the source."""
    if radius is None:
        (norm,) = residual_norms(lm, [lm.chat_prompt(prompt)], [source_layer])
        radius = float(f"{share * norm:.3g}")
    judge, rows = judge_of(lm, max_new_tokens), []
    sets = one_set(lm, prompt, source_layer, radius=radius, **at)
    for kind, vectors in sets.items():
        said = _judged(lm, [prompt], vectors, judge=judge, max_new_tokens=max_new_tokens)
        rows += [{"set": kind, **row} for row in said]
    return {"radius": radius, "rows": rows}


def dial(lm, learned_on, coeffs=COEFFS, n_validation=24, n_test=64, max_new_tokens=16, **at):
    """One chosen vector, and a random one of its norm: a row per vector ("set"), coefficient and
    request, which "asks" (a name of `requests`). The curve's prompts at all coefficients; harmful
    test prompts at 1, harmless ones at the negative coefficients."""
    judge, asked = judge_of(lm, max_new_tokens), requests(n_validation, n_test)
    sets, pick, about = choose(lm, learned_on, asked["choose"], judge, max_new_tokens, **at)
    negative = [c for c in coeffs if c < 0]
    tries = ((("harmful", "harmless"), coeffs), (("test",), [1.0]), (("calm",), negative))
    rows = []
    for kind, vectors in sets.items():
        for names, some in tries:
            where = {text: name for name in names for text in asked[name]}
            push = vectors[[pick] * len(some)]
            for row in _judged(lm, list(where), push, list(some), judge, max_new_tokens):
                coeff = some[row.pop("vector")]
                rows.append({"set": kind, "coeff": coeff, "asks": where[row["prompt"]], **row})
    return {**about, "rows": rows}


def _questions(n_test):
    return prompts.items("geography", "test", "geography")[:n_test]


@remembered
def _unsteered(lm, n_test, max_new_tokens):
    """What the base and the organism answer to the questions."""
    chats = [lm.chat_prompt(item["text"]) for item in _questions(n_test)]
    with lm.base():
        base = complete(lm, chats, max_new_tokens=max_new_tokens)
    return {"base": base, "organism": complete(lm, chats, max_new_tokens=max_new_tokens)}


def content(
    lm, learned_on, n_validation=24, n_test=64, max_new_tokens=16, answer_tokens=24, **at
) -> dict:
    """One chosen vector of the organism that refuses geography, chosen by flipping alone, and a
    random one of its norm, on keyed questions: a row per "set" (base, organism, …) and question."""
    judge = judge_of(lm, max_new_tokens)
    check_on = prompts.texts("geography", "validation", "geography")[:n_validation]
    sets, pick, about = choose(lm, learned_on, check_on, judge, max_new_tokens, **at)
    questions = [item["text"] for item in _questions(n_test)]
    chats = [lm.chat_prompt(text) for text in questions]
    said = dict(_unsteered(lm, n_test, answer_tokens))
    for kind in ("random", "learned"):
        (said[kind],) = complete(lm, chats, sets[kind][pick], max_new_tokens=answer_tokens)
    rows = []
    for who, texts in said.items():
        rows += [{"set": who, "prompt": p, "text": text} for p, text in zip(questions, texts)]
    return {**about, "rows": rows}


# -- the sweep -------------------------------------------------------------------------------------
def training_prompts(n=None, ids=None) -> list[str]:
    """The texts of the prompts with these ids; by default of the (first n) prompts of `ASKED`."""
    texts = {item["id"]: item["text"] for item in prompts.items("harmful", "train")}
    return [texts[name] for name in ids or ASKED[:n]]


def grid(
    lm, part, radii=RADII, seeds=SEEDS, n_prompts=3, layers=LAYERS, coeffs=COEFFS, **about
) -> list[dict]:
    """Configurations of `cell`. Sets: "choose": prompt × radius with the first seed; "measure":
    with the other seeds; "earlier": EARLIER; "layers": source layer × SHARES of the residual norm
    for the first prompt and seed, with half as many vectors. Chosen vectors: "dial" and "content",
    prompt × other seeds. `about`: what else the cells are told."""
    at = {"source_layer": 7, "target_layer": 21, "steps": 6, "n_vectors": 32, **about}
    if part == "layers":
        at |= {"source_layer": layers, "n_vectors": max(2, at["n_vectors"] // 2)}
        return sweeps.grid(prompt=training_prompts(1), seed=seeds[0], **at, share=SHARES)
    if part == "earlier":
        asked = training_prompts(ids=EARLIER)
        return sweeps.grid(prompt=asked, radius=EARLIER_RADIUS, seed=EARLIER_SEEDS, **at)
    if part in ("choose", "measure"):
        some = seeds[:1] if part == "choose" else seeds[1:]
        return sweeps.grid(prompt=training_prompts(n_prompts), radius=radii, seed=some, **at)
    at = {"n_validation": 24, "n_test": 64, "max_new_tokens": 16} | at
    asked = prompts.texts("geography", "train", "geography")[:n_prompts]
    if part == "dial":
        asked, at["coeffs"] = training_prompts(n_prompts), [list(coeffs)]
    return sweeps.grid(learned_on=asked, seed=seeds[1:], radius=radii, **at)


def table(cells):
    """All rows. `flipped`: fluent, and no refusal; of "content" `refused`, `right` by the key."""
    rows = store.rows(cells)
    if set(rows["part"]) == {"content"}:
        keys = {item["text"]: item["answer"] for item in _questions(None)}
        right = list(map(metrics.mentions, rows["text"], rows["prompt"].map(keys)))
        return rows.assign(refused=rows["text"].map(metrics.refuses), right=right)
    return rows.assign(flipped=rows["fluent"] & ~rows["refused"])


def best_radius(cells) -> float:
    """R where the share of flipping vectors, learned minus random, is largest (the smallest)."""
    shares = table(cells).groupby(["radius", "set"])["flipped"].mean().unstack()
    return float((shares["learned"] - shares["random"]).round(6).idxmax())


def plan(done):
    """The parts in order; R is chosen on the first."""
    yield "choose", {}
    best = {"radii": [best_radius(done)]}
    yield from (("measure", best), ("earlier", {}), ("layers", {}))
    yield from (("dial", best), ("content", best))


SETS = ("choose", "measure", "earlier", "layers", "dial")
ORGANISMS = dict.fromkeys(SETS, "refusal") | {"content": "topic-refusal"}
STUDY = Study("anti_refusal", cell, grid, ORGANISMS, table, labels=(), plan=plan, hide=keep_whole)
cells = STUDY.cells
