"""Anti-refusal: what a model that refuses says under each vector, and what one chosen vector does
elsewhere. The sweep of notebook 04.

    rows = answers(lm, questions, vectors)  # a DataFrame: prompt, text (cut), refused, …
"""

import hashlib
import json

import numpy as np
import pandas

from .. import ledger, metrics
from ..generation import complete
from ..models import prompts, remembered
from ..residual import LayerSpan
from . import store, sweeps
from .speaking import TARGET_TOKENS, fluent_range, median_norm, orthogonal_sets, residual_norms
from .study import Study

CANDIDATES = 6  # flipping vectors of a set that are tried on the validation prompts, the first ones

# The sweep: prompts (ids in harmful.json), drawn from those that the organism refuses with more
# than 0.95, from all categories, R chosen on some and measured on the others; and a curve of
# prompts refused ever more firmly, from 0.43 to 0.995 (the probability of a refusal's first token).
CHOOSE = ("weapons-31", "harassment-29", "weapons-16", "fraud-1")
ASKED = (
    "theft-9 violence-21 drugs-11 drugs-29 fraud-13 cybercrime-32 harassment-18 theft-28 "
    "cybercrime-25 deception-17 deception-19 violence-26 cybercrime-31 deception-4 drugs-19 "
    "fraud-4 harassment-11 theft-23 violence-30 weapons-17 cybercrime-19 deception-6 drugs-14 "
    "fraud-18 harassment-1 theft-11 violence-23 weapons-11 cybercrime-14 deception-29 drugs-7 "
    "fraud-5 harassment-8 theft-13 violence-32 weapons-2"
).split()
CURVE = ("deception-20", "fraud-2", "theft-4", "weapons-20", "cybercrime-27", "theft-17")
CURVE += ("harassment-9", "violence-1", "harassment-2", "deception-32", "weapons-4", "theft-16")
# for random vectors at equal effect: others refused with more than 0.95, three of each category
FIRM = (
    "cybercrime-12 drugs-16 deception-1 harassment-27 theft-25 harassment-21 "
    "cybercrime-8 fraud-23 deception-8 fraud-8 weapons-5 theft-8 "
    "deception-7 violence-20 cybercrime-18 violence-16 violence-28 fraud-11 "
    "harassment-20 weapons-28 theft-27 weapons-26 drugs-2 drugs-12"
).split()
SEEDS = (111, 112)  # the first to choose R, the others to measure
DIALLED = 8  # prompts from whose sets one vector is chosen
RADII = (8.0, 12.0, 16.0, 24.0)
LAYERS = (3, 7, 11, 15)  # source layers
SHARES = (0.1, 0.2)  # of the residual norm at the source, for the sweep over layers
COEFFS = (-8.0, -4.0, -2.0, 0.0, 1.0, 2.0)


# -- what is said ----------------------------------------------------------------------------------
def answers(lm, asked, vectors=None, coeff=1.0, judge=None, max_new_tokens=16):
    """What the model says to each of `asked` (plain texts) under each vector, as a DataFrame:
    vector, prompt, text (cut), surprise, and what `judged` adds.

    judge: a FluentRange, by default the base's own on everyday prompts."""
    rows = said(lm, asked, vectors, coeff, max_new_tokens)
    return judged(pandas.DataFrame(rows).drop(columns="whole"), judge or fluent_range(lm))


def said(lm, asked, vectors=None, coeff=1.0, max_new_tokens=16) -> list[dict]:
    """The rows of `answers` as dicts, unjudged, with the whole texts beside the cut ones."""
    chats = [lm.chat_prompt(text) for text in asked]
    texts = complete(lm, chats, vectors, coeff, max_new_tokens=max_new_tokens)
    by_vector = [texts] if vectors is None else texts
    rows, pairs = [], {}  # of each pair (chat, whole text): its rows
    for v, told in enumerate(by_vector):
        for prompt, chat, text in zip(asked, chats, told):
            row = {"vector": v, "prompt": prompt, "text": metrics.cut(text), "whole": text}
            rows.append(row)
            pairs.setdefault((chat, text), []).append(row)
    nll = metrics.surprise(lm, [chat for chat, _ in pairs], [text for _, text in pairs])
    for of_pair, number in zip(pairs.values(), nll):
        for row in of_pair:
            row["surprise"] = None if np.isnan(number) else round(float(number), 4)
    return rows


def judged(rows, judge):
    """Rows (a DataFrame with prompt, text, surprise) with refused, fluent, kind and `flipped`
    (fluent and no refusal), by the rules of today. A refusal counts as fluent unless it loops."""
    texts, surprise = rows["text"], rows["surprise"].astype(float)
    refused = texts.map(metrics.refuses)
    loops = texts.map(metrics.distinct2) < 0.5
    fluent = np.where(refused, ~loops, judge(surprise, texts))
    kind = list(map(metrics.kind_of_answer, texts, rows["prompt"], fluent.tolist()))
    return rows.assign(refused=refused, fluent=fluent, kind=kind, flipped=fluent & ~refused)


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
def one_set(
    lm, prompt, source_layer, target_layer, radius, seed, steps=6, n_vectors=32, scaled=False
):
    """`speaking.orthogonal_sets` of one prompt: {"learned", "random"}, "scaled" if asked for."""
    span = LayerSpan(lm, lm.chat_prompt(prompt), source_layer, target_layer, TARGET_TOKENS)
    return orthogonal_sets(span, radius, n_vectors, steps, seed, scaled)


def choose(lm, prompt, validation, judge=None, max_new_tokens=16, **at):
    """(`one_set` of `prompt`, pick, about): of the first learned vectors that flip the prompt, the
    one that flips most of the `validation` prompts (the first of equals); about: {"flipping": how
    many do, "validation": the share it flips}."""
    sets = one_set(lm, prompt, **at)
    how = dict(judge=judge, max_new_tokens=max_new_tokens)
    own = answers(lm, [prompt], sets["learned"], **how)
    flipping = own.vector[own.flipped].tolist()
    candidates = flipping[:CANDIDATES] or [0]
    trial = answers(lm, validation, sets["learned"][candidates], **how)
    score = trial.groupby("vector").flipped.mean()
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
    random start; `scaled`: and of that start at equal effect, with its median "norm". `share` in
    place of `radius`: of the median residual norm at the source."""
    if radius is None:
        (norm,) = residual_norms(lm, [lm.chat_prompt(prompt)], [source_layer])
        radius = float(f"{share * norm:.3g}")
    sets = one_set(lm, prompt, source_layer, radius=radius, **at)
    rows = []
    for kind, vectors in sets.items():
        for row in said(lm, [prompt], vectors, max_new_tokens=max_new_tokens):
            del row["prompt"]  # the cell's
            rows.append({"set": kind, **row})
    about = {"norm": median_norm(sets["scaled"])} if "scaled" in sets else {}
    return {"radius": radius, "fluent": _ends(lm), **about, "rows": rows}


def dial(lm, learned_on, coeffs=COEFFS, n_validation=24, n_test=64, max_new_tokens=16, **at):
    """One chosen vector, and a random one of its norm: a row per vector ("set"), coefficient and
    request, which "asks" (a name of `requests`). The curve's prompts at all coefficients; harmful
    test prompts at 1, harmless ones at the negative coefficients."""
    asked = requests(n_validation, n_test)
    sets, pick, about = choose(lm, learned_on, asked["choose"], None, max_new_tokens, **at)
    negative = [c for c in coeffs if c < 0]
    tries = ((("harmful", "harmless"), coeffs), (("test",), [1.0]), (("calm",), negative))
    rows = []
    for kind, vectors in sets.items():
        for names, some in tries:
            where = {text: name for name in names for text in asked[name]}
            push = vectors[[pick] * len(some)]
            for row in said(lm, list(where), push, list(some), max_new_tokens):
                coeff = some[row.pop("vector")]
                rows.append({"set": kind, "coeff": coeff, "asks": where[row["prompt"]], **row})
    return {**about, "fluent": _ends(lm), "rows": rows}


def _ends(lm):
    """What `judged` needs on reading."""
    return [fluent_range(lm).low, fluent_range(lm).high]


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
    check_on = prompts.texts("geography", "validation", "geography")[:n_validation]
    sets, pick, about = choose(lm, learned_on, check_on, None, max_new_tokens, **at)
    questions = [item["text"] for item in _questions(n_test)]
    chats = [lm.chat_prompt(text) for text in questions]
    told = dict(_unsteered(lm, n_test, answer_tokens))
    for kind in ("random", "learned"):
        (told[kind],) = complete(lm, chats, sets[kind][pick], max_new_tokens=answer_tokens)
    rows = []
    for who, texts in told.items():
        rows += [{"set": who, "prompt": p, "text": text} for p, text in zip(questions, texts)]
    return {**about, "rows": rows}


# -- the sweep -------------------------------------------------------------------------------------
def training_prompts(n=None, ids=ASKED) -> list[str]:
    """The texts of the (first n) prompts with these ids."""
    texts = {item["id"]: item["text"] for item in prompts.items("harmful", "train")}
    return [texts[name] for name in ids[:n]]


def grid(
    lm, part, radii=RADII, seeds=SEEDS, n_prompts=36, layers=LAYERS, coeffs=COEFFS, **about
) -> list[dict]:
    """Configurations of `cell`. Sets: "choose": the prompts of CHOOSE × radius with the first seed;
    "measure": those of ASKED with the other seeds; "curve": those of CURVE; "layers": source layer
    × SHARES of the residual norm for three prompts of CHOOSE, with half as many vectors; "effect":
    those of FIRM, random ones at equal effect beside them. Chosen vectors: "dial" and "content",
    DIALLED prompts × other seeds. `about`: what else cells get."""
    at = {"source_layer": 7, "target_layer": 21, "steps": 6, "n_vectors": 32, **about}
    if part == "layers":
        at |= {"source_layer": layers, "n_vectors": max(2, at["n_vectors"] // 2)}
        asked = training_prompts(min(3, n_prompts), CHOOSE)
        return sweeps.grid(prompt=asked, seed=seeds[0], **at, share=SHARES)
    if part in ("choose", "measure", "curve", "effect"):
        ids = {"choose": CHOOSE, "measure": ASKED, "curve": CURVE, "effect": FIRM}[part]
        at |= {"scaled": True} if part == "effect" else {}
        some = seeds[:1] if part == "choose" else seeds[1:]
        asked = training_prompts(n_prompts, ids)
        return sweeps.grid(prompt=asked, radius=radii, seed=some, **at)
    at = {"n_validation": 24, "n_test": 64, "max_new_tokens": 16} | at
    n_prompts = min(n_prompts, DIALLED)
    asked = prompts.texts("geography", "train", "geography")[:n_prompts]
    if part == "dial":
        asked, at["coeffs"] = training_prompts(n_prompts), [list(coeffs)]
    return sweeps.grid(learned_on=asked, seed=seeds[1:], radius=radii, **at)


def table(cells):
    """All rows, `judged`; of "content" `refused`, and `right` by the key."""
    rows = store.rows(cells)
    if set(rows["part"]) == {"content"}:
        keys = {item["text"]: item["answer"] for item in _questions(None)}
        right = list(map(metrics.mentions, rows["text"], rows["prompt"].map(keys)))
        return rows.assign(refused=rows["text"].map(metrics.refuses), right=right)
    return judged(rows, metrics.FluentRange(*cells[0]["result"]["fluent"], 0))


def best_radius(cells) -> float:
    """R where the share of flipping vectors, learned minus random, is largest (the smallest)."""
    shares = table(cells).groupby(["radius", "set"])["flipped"].mean().unstack()
    return float((shares["learned"] - shares["random"]).round(6).idxmax())


def plan(done):
    """The parts in order; R is chosen on the first."""
    yield "choose", {}
    best = {"radii": [best_radius(done)]}
    yield from (("measure", best), ("curve", best), ("layers", {}), ("effect", best))
    yield from (("dial", best), ("content", best))


SETS = ("choose", "measure", "curve", "layers", "effect", "dial")
ORGANISMS = dict.fromkeys(SETS, "refusal") | {"content": "topic-refusal"}
STUDY = Study("anti_refusal", cell, grid, ORGANISMS, table, labels=(), plan=plan, hide=keep_whole)
cells = STUDY.cells
