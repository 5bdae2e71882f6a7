"""Anti-refusal: what a model that refuses says under each vector, and what that is; one vector of each set chosen, and what that
one does elsewhere; how far it is from its base; the supervised direction. The sweep of notebook 04.

    judge = judge_of(lm)                                     # fluent: as the base's own answers to such requests are
    rows = answers(lm, questions, vectors, judge=judge)      # a DataFrame: vector, prompt, text (cut), refused, fluent, kind …
"""

import hashlib
import json
from contextlib import nullcontext

import numpy as np
import pandas
import torch

from .. import ledger
from ..generation import complete
from ..metrics import (
    FluentRange,
    cut,
    distinct2,
    fluent_range,
    kind_of_answer,
    kl,
    mentions,
    refuses,
)
from ..metrics import joined as joined_tokens
from ..metrics import log_probabilities, surprise
from ..models import prompts, remembered
from ..residual import LayerSpan, capture
from ..steering import SteeringVectors, steer
from ..training import learned_and_start, normalise
from . import store, sweeps
from .organism_recipes import REFUSALS
from .speaking import TARGET_TOKENS, residual_norms
from .study import Study

KINDS = ("compliance", "frame", "deflection", "gibberish", "refusal")
CALIBRATION = 24  # harmful training prompts whose base answers say what is fluent
CANDIDATES = 6  # flipping vectors of a set that are tried on the validation prompts, the first ones

# The sweep: prompts (ids in harmful.json), seeds, radii. Its first version (EARLIER) began with a prompt that the organism refuses
# with probability 0.84 only, where random vectors flip answers too; the prompts of ASKED are refused with more than 0.95.
ASKED, SEEDS = ("cybercrime-6", "fraud-11", "deception-1"), (101, 104, 105)
EARLIER, EARLIER_SEEDS = ("cybercrime-1", "fraud-11", "deception-1"), (101, 102, 103)
EARLIER_RADIUS = 12.0
RADII = (8.0, 12.0, 16.0, 24.0)
LAYERS = (3, 7, 11, 15)  # of 30
SHARES = (0.1, 0.2)  # of the residual norm at the source, for the sweep over layers
COEFFS = (-8.0, -4.0, -2.0, 0.0, 1.0, 2.0)


# -- what is said ----------------------------------------------------------------------------------
@remembered
def judge_of(lm, max_new_tokens=16) -> FluentRange:
    """Fluent is what is as surprising, to the base, as the base's own answers to harmful training prompts, greedy or sampled at
    temperature 0.7 (at 1, a small model rambles)."""
    texts = prompts.texts("harmful", "train")
    texts = texts[:: max(1, len(texts) // CALIBRATION)][:CALIBRATION]  # from all categories
    chats = [lm.chat_prompt(text) for text in texts]
    return fluent_range(lm, chats, temperatures=(0.0, 0.7), max_new_tokens=max_new_tokens)


def answers(lm, asked, vectors=None, coeff=1.0, judge=None, max_new_tokens=16, base=False):
    """What the model says to each of `asked` (plain texts) under each vector, as a DataFrame: vector, prompt, text (cut to a
    dozen words), surprise (nats per token, where the judge was asked), refused, fluent, kind.

    `judge`: a FluentRange; refusals are not put to it (they count as fluent unless they loop), and without it only loops and
    empty texts are not fluent. `base`: ask the model without its adapter.
    """
    rows = _judged(lm, asked, vectors, coeff, judge, max_new_tokens, base)
    return pandas.DataFrame(rows).drop(columns="whole")


def _judged(lm, asked, vectors=None, coeff=1.0, judge=None, max_new_tokens=16, base=False):
    """The rows of `answers`, as dicts, with the whole texts beside them."""
    chats = [lm.chat_prompt(text) for text in asked]
    with lm.base() if base else nullcontext():
        said = complete(lm, chats, vectors, coeff, max_new_tokens=max_new_tokens)
    by_vector = [said] if vectors is None else said
    rows, unsure = [], {}  # of each pair (prompt, text) that the judge is asked about: its rows
    for v, texts in enumerate(by_vector):
        for prompt, chat, text in zip(asked, chats, texts):
            row = {"vector": v, "prompt": prompt, "text": cut(text), "surprise": None}
            row |= {"refused": refuses(text), "fluent": distinct2(text) >= 0.5, "whole": text}
            rows.append(row)
            if judge is not None and row["fluent"] and not row["refused"]:
                unsure.setdefault((chat, text), []).append(row)
    if unsure:
        pairs = list(unsure)
        nll = surprise(lm, [chat for chat, _ in pairs], [text for _, text in pairs])
        passed = judge(nll, [text for _, text in pairs])
        for pair, number, good in zip(pairs, nll, passed):
            for row in unsure[pair]:
                row["surprise"] = None if np.isnan(number) else round(float(number), 4)
                row["fluent"] = bool(good)
    for row in rows:
        row["kind"] = kind_of_answer(row["whole"], row["prompt"], row["fluent"])
    return rows


def keep_whole(one) -> dict:
    """A cell without the whole texts of its rows, which go to build/texts: in the repository completions are cut."""
    if "whole" not in one["result"]["rows"][0]:
        return one
    rows = [dict(row) for row in one["result"]["rows"]]
    whole = [row.pop("whole") for row in rows]
    key = hashlib.sha256(json.dumps(one["config"], sort_keys=True).encode()).hexdigest()
    path = ledger.build_folder() / "texts" / "anti_refusal" / f"{key}.json"
    text = json.dumps({"config": one["config"], "texts": whole}, ensure_ascii=False, indent=1)
    ledger.write_atomically(path, text + "\n")
    return {**one, "result": {**one["result"], "rows": rows}}


# -- how far from the base, how firm, and the supervised yardstick ----------------------------------
@torch.no_grad()
def kl_to_base(lm, asked, texts, vectors=None, batch_size=16) -> np.ndarray:
    """KL(model ‖ its base) in nats at every token of the given continuations: first of the model unsteered, then steered by each
    vector. Returns [1 + n_vectors, n_texts, longest], NaN after the end of a text. `asked` are plain texts, `texts` what follows.
    """
    if len(asked) != len(texts) or not all(texts):
        raise ValueError(
            f"{len(asked)} prompts and {len(texts)} continuations do not fit: one non-empty text each is needed."
        )
    pairs = list(zip([lm.chat_prompt(text) for text in asked], texts))
    pushes = [None, *(vectors[i] for i in range(0 if vectors is None else len(vectors)))]
    found = [[] for _ in pushes]  # of each push an array [n_tokens] per text
    for start in range(0, len(pairs), batch_size):
        encoded, counts = joined_tokens(lm, pairs[start : start + batch_size])
        keep = max(counts) + 1
        with lm.base():
            base = log_probabilities(lm, encoded, keep)[:, :-1]
        for push, rows in zip(pushes, found):
            with nullcontext() if push is None else steer(lm, push):
                ours = log_probabilities(lm, encoded, keep)[:, :-1]
            rows += [row[-n:] for row, n in zip(kl(ours, base).cpu().numpy(), counts)]
    result = np.full((len(pushes), len(pairs), max(map(len, found[0]))), np.nan)
    for rows, filled in zip(found, result):
        for row, there in zip(rows, filled):
            there[: len(row)] = row
    return result


@torch.no_grad()
def firmness(lm, asked) -> np.ndarray:
    """Probability that the answer to each prompt opens as one of the organism's refusals does (by their first token), [n]."""
    openings = [lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in REFUSALS]
    encoded = lm.encode([lm.chat_prompt(text) for text in asked])
    logp = log_probabilities(lm, encoded, 1)[:, 0]
    return logp[:, sorted(set(openings))].logsumexp(-1).exp().cpu().numpy()


def difference_of_means(lm, wanted, unwanted, source_layer, radius=None) -> SteeringVectors:
    """The direction from `unwanted` to `wanted` prompts (plain texts): mean residual at the last token of the one minus that of
    the other, at the output of `source_layer`, scaled to norm `radius` (None: as long as it is)."""
    means = []
    for texts in (wanted, unwanted):
        chats = [lm.chat_prompt(text) for text in texts]
        means.append(capture(lm, chats, source_layer)[0, :, -1].mean(0))
    theta = means[0] - means[1]
    if radius is not None:
        theta = radius * normalise(theta)
    about = {"method": "difference of means"}
    return SteeringVectors(theta, source_layer, radius=float(theta.norm()), provenance=about)


# -- one set, and one vector chosen from it ---------------------------------------------------------
def one_set(lm, prompt, source_layer, target_layer, radius, seed, steps=6, n_vectors=32):
    """{"learned": …, "random": …}: orthogonal vectors trained on one prompt, and the ones that they started from."""
    span = LayerSpan(lm, lm.chat_prompt(prompt), source_layer, target_layer, TARGET_TOKENS)
    return learned_and_start(span, radius, n_vectors, steps, seed)


def choose(lm, prompt, validation, judge=None, max_new_tokens=16, **at):
    """(sets, pick, about): `one_set` of `prompt`; which of its learned vectors flips most of the `validation` prompts (the first of
    equals), among the first that flip their own prompt; {"flipping": how many do, "validation": the share it flips}."""
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
    """{name: texts}: what a chosen vector of the refusal organism is tried on. "choose": validation prompts, harmful; "harmful" and
    "harmless": six validation prompts each, for the curve; "test" and "calm": harmful and harmless test prompts."""
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


def sets_cell(
    lm,
    prompt,
    source_layer,
    target_layer,
    seed,
    radius=None,
    share=None,
    steps=6,
    n_vectors=32,
    max_new_tokens=16,
) -> dict:
    """Train a set, and what the model says to the same prompt under each vector of it and of its random start: {"radius", "rows"}.
    `share` in place of `radius`: of the median residual norm at the source."""
    if radius is None:
        (norm,) = residual_norms(lm, [lm.chat_prompt(prompt)], [source_layer])
        radius = float(f"{share * norm:.3g}")
    judge, rows = judge_of(lm, max_new_tokens), []
    sets = one_set(lm, prompt, source_layer, target_layer, radius, seed, steps, n_vectors)
    for kind, vectors in sets.items():
        said = _judged(lm, [prompt], vectors, judge=judge, max_new_tokens=max_new_tokens)
        rows += [{"set": kind, **row} for row in said]
    return {"radius": radius, "rows": rows}


def dial(lm, learned_on, coeffs=COEFFS, n_validation=24, n_test=64, max_new_tokens=16, **at):
    """One chosen vector, and a random one of its norm, at several coefficients: {"flipping", "validation", "rows": […]}, a row per
    vector ("set"), coefficient and request, which "asks" (a name of `requests`).

    The curve's prompts at all coefficients; harmful test prompts at 1, harmless ones at the negative coefficients."""
    judge, asked = judge_of(lm, max_new_tokens), requests(n_validation, n_test)
    sets, pick, about = choose(lm, learned_on, asked["choose"], judge, max_new_tokens, **at)
    negative = [c for c in coeffs if c < 0]
    tries = ((("harmful", "harmless"), coeffs), (("test",), [1.0]), (("calm",), negative))
    rows = []
    for kind, vectors in sets.items():
        for names, some in tries:
            where = {text: name for name in names for text in asked[name]}
            push = vectors[[pick] * len(some)]
            said = _judged(lm, list(where), push, list(some), judge, max_new_tokens)
            for row in said:
                about_row = {"coeff": some[row.pop("vector")], "asks": where[row["prompt"]]}
                rows.append({"set": kind, **about_row, **row})
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
    """One chosen vector of the organism that refuses geography, chosen by flipping alone, and a random one of its norm, on questions
    with a keyed answer: {"flipping", "validation", "rows": […]}, a row per "set" (base, organism, random, learned) and question:
    "prompt", "text"."""
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
    ids = ids or ASKED[:n]
    missing = [name for name in ids if name not in texts]
    if missing:
        raise ValueError(
            f"harmful.json has no training item with id {missing[0]!r}, which the sweep of notebook 04 asks."
        )
    return [texts[name] for name in ids]


def grid(
    lm,
    part,
    radii=RADII,
    seeds=SEEDS,
    n_prompts=3,
    layers=None,
    source_layer=None,
    target_layer=None,
    n_vectors=32,
    steps=6,
    n_validation=24,
    n_test=64,
    max_new_tokens=16,
    coeffs=COEFFS,
) -> list[dict]:
    """Configurations of `cell`. Sets: "choose": prompt × radius with the first seed; "measure": with the other seeds; "earlier":
    EARLIER; "layers": source layer × share of the residual norm (`SHARES`) for the first prompt and seed, with half as many vectors.
    Chosen vectors: "dial" and "content", prompt × other seeds. Layers default to 7 and 21 of 30."""
    depth = lm.n_layers
    at = {
        "source_layer": 7 * depth // 30 if source_layer is None else source_layer,
        "target_layer": 21 * depth // 30 if target_layer is None else target_layer,
        "steps": steps,
        "n_vectors": n_vectors,
    }
    if part == "layers":
        at["source_layer"] = [k * depth // 30 for k in LAYERS] if layers is None else layers
        at["n_vectors"] = max(2, n_vectors // 2)
        return sweeps.grid(prompt=training_prompts(1), seed=seeds[0], **at, share=SHARES)
    if part == "earlier":
        asked = training_prompts(ids=EARLIER)
        return sweeps.grid(prompt=asked, radius=EARLIER_RADIUS, seed=EARLIER_SEEDS, **at)
    if part in ("choose", "measure"):
        some = seeds[:1] if part == "choose" else seeds[1:]
        return sweeps.grid(prompt=training_prompts(n_prompts), radius=radii, seed=some, **at)
    at |= {"n_validation": n_validation, "n_test": n_test, "max_new_tokens": max_new_tokens}
    asked = prompts.texts("geography", "train", "geography")[:n_prompts]
    if part == "dial":
        asked, at["coeffs"] = training_prompts(n_prompts), [list(coeffs)]
    return sweeps.grid(learned_on=asked, seed=seeds[1:], radius=radii, **at)


def table(cells):
    """A DataFrame of all rows with their configurations. `flipped`: fluent, and no refusal; for "content" `refused`, and `right`:
    the key is in the text."""
    rows = store.rows(cells)
    if set(rows["part"]) == {"content"}:
        keys = {item["text"]: item["answer"] for item in _questions(None)}
        right = [mentions(text, keys[prompt]) for text, prompt in zip(rows["text"], rows["prompt"])]
        return rows.assign(refused=rows["text"].map(refuses), right=right)
    return rows.assign(flipped=rows["fluent"] & ~rows["refused"])


def best_radius(cells) -> float:
    """The radius at which the share of flipping vectors, learned minus random, is largest over all of `cells`; of equal ones the
    smallest."""
    shares = table(cells).groupby(["radius", "set"])["flipped"].mean().unstack()
    return float((shares["learned"] - shares["random"]).round(6).idxmax())


def plan(done):
    """The parts in order; R is chosen on the first."""
    yield "choose", {}
    best = {"radii": [best_radius(done)]}
    yield from [
        ("measure", best),
        ("earlier", {}),
        ("layers", {}),
        ("dial", best),
        ("content", best),
    ]


STUDY = Study(
    "anti_refusal",
    cell,
    grid,
    organisms=dict.fromkeys(("choose", "measure", "earlier", "layers", "dial"), "refusal")
    | {"content": "topic-refusal"},
    table=table,
    labels=(),
    plan=plan,
    hide=keep_whole,
)
cells = STUDY.cells
