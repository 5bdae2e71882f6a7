"""Anti-refusal: what a model that refuses says under each vector, and what that is; how far it is from its base; the supervised
direction; and the stored sweep of notebook 04 (`python -m helpers grid refusal` computes it).

    judge = judge_of(lm)                                     # fluent: as the base's own answers to such requests are
    rows = answers(lm, questions, vectors, judge=judge)      # a DataFrame: vector, prompt, text (cut), refused, fluent, kind
"""

from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch

from ..generation import complete, pairs
from ..metrics import behaviours, fluency, measures
from ..models import prompts
from ..models.loading import load
from ..models.obtain import DEFAULT
from ..residual import normalise
from ..residual.span import LayerSpan, capture
from ..steering import SteeringVectors, steer
from ..training.optimisers import learned_and_start
from . import stored, sweeps
from .organism_recipes import REFUSALS
from .organisms import merged

TARGET_TOKENS = slice(-3, None)
KINDS = ("compliance", "frame", "deflection", "gibberish", "refusal")
CALIBRATION = 24  # harmful training prompts whose base answers say what is fluent


# ---------------------------------------------------------------------------------------------- what is said
@lru_cache(maxsize=None)
def judge_of(lm, max_new_tokens=16, n=CALIBRATION) -> measures.FluentRange:
    """Fluent is what is as surprising, to the base, as the base's own answers to harmful training prompts, greedy or sampled at
    temperature 0.7 (at 1, a small model rambles)."""
    texts = prompts.texts("harmful", "train")
    chats = [
        lm.chat_prompt(text) for text in texts[:: max(1, len(texts) // n)][:n]
    ]  # from all categories
    return measures.fluent_range(lm, chats, temperatures=(0.0, 0.7), max_new_tokens=max_new_tokens)


def answers(lm, asked, vectors=None, coeff=1.0, judge=None, max_new_tokens=16, base=False):
    """What the model says to each of `asked` (plain texts) under each vector, as a DataFrame: vector, prompt, text (cut to a
    dozen words), refused, fluent, kind.

    `judge`: a FluentRange; refusals are not put to it (they count as fluent unless they loop), and without it only loops and
    empty texts are not fluent. `base`: ask the model without its adapter.
    """
    import pandas

    chats = [lm.chat_prompt(text) for text in asked]
    with lm.base() if base else nullcontext(merged(lm)) as speaker:
        said = complete(speaker, chats, vectors, coeff, max_new_tokens=max_new_tokens)
    texts = said if vectors is None else [text for row in said for text in row]
    rows = pairs(asked, vectors)
    fluent = np.array([fluency.distinct2(text) >= 0.5 for text in texts])
    refused = np.array([behaviours.refuses(text) for text in texts])
    unique = list(
        dict.fromkeys(
            (i, t) for (_, i), t, r, f in zip(rows, texts, refused, fluent) if f and not r
        )
    )
    if judge is not None and unique:
        nll = measures.surprise(lm, [chats[i] for i, _ in unique], [t for _, t in unique])
        passed = dict(zip(unique, judge(nll, [t for _, t in unique])))
        fluent &= np.array(
            [r or passed.get((i, t), False) for (_, i), t, r in zip(rows, texts, refused)]
        )
    kinds = [
        behaviours.kind_of_answer(t, asked[i], bool(f)) for (_, i), t, f in zip(rows, texts, fluent)
    ]
    return pandas.DataFrame(
        {
            "vector": [v for v, _ in rows],
            "prompt": [asked[i] for _, i in rows],
            "text": [behaviours.cut(t) for t in texts],
            "refused": refused,
            "fluent": fluent,
            "kind": kinds,
        }
    )


# ---------------------------------------------------------------------------------------------- how far from the base
@torch.no_grad()
def kl_to_base(lm, asked, texts, vectors=None, batch_size=16) -> np.ndarray:
    """KL(model ‖ its base) in nats at every token of the given continuations: first of the model unsteered, then steered by each
    vector. Returns [1 + n_vectors, n_texts, longest], NaN after the end of a text. `asked` are plain texts, `texts` what follows.
    """
    if len(asked) != len(texts) or not all(texts):
        raise ValueError(
            f"{len(asked)} prompts and {len(texts)} continuations do not fit: one non-empty text each is needed."
        )
    chats, found = [lm.chat_prompt(text) for text in asked], []
    pushes = [None, *([] if vectors is None else [vectors[i] for i in range(len(vectors))])]
    for start in range(0, len(texts), batch_size):
        encoded, counts = measures.joined(lm, list(zip(chats, texts))[start : start + batch_size])
        longest = max(counts)
        with lm.base():
            base = measures.log_probabilities(lm, encoded, longest + 1)[:, :-1]
        for push in pushes:
            with nullcontext() if push is None else steer(lm, push):
                ours = measures.log_probabilities(lm, encoded, longest + 1)[:, :-1]
            kl = (ours.exp() * (ours - base)).sum(-1).cpu().numpy()
            found.append([row[-n:] for row, n in zip(kl, counts)])
    by_push = [sum(found[k :: len(pushes)], []) for k in range(len(pushes))]
    width = max(map(len, by_push[0]))
    return np.array(
        [
            [np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows]
            for rows in by_push
        ]
    )


# ---------------------------------------------------------------------------------------------- the supervised yardstick
def difference_of_means(lm, wanted, unwanted, source_layer, radius=None) -> SteeringVectors:
    """The direction from `unwanted` to `wanted` prompts (plain texts): mean residual at the last token of the one minus that of
    the other, at the output of `source_layer`, scaled to norm `radius` (None: as long as it is)."""
    means = [
        capture(lm, [lm.chat_prompt(t) for t in texts], source_layer)[0, :, -1].mean(0)
        for texts in (wanted, unwanted)
    ]
    direction = means[0] - means[1]
    theta = direction if radius is None else radius * normalise(direction)
    return SteeringVectors(
        theta,
        source_layer,
        radius=float(theta.norm()),
        provenance={"method": "difference of means"},
    )


# ---------------------------------------------------------------------------------------------- one set, and the sweep of sets
def one_set(lm, prompt, source_layer, target_layer, radius, seed, steps=6, n_vectors=32):
    """{"learned": …, "random": …}: orthogonal vectors trained on one prompt, and the ones that they started from."""
    span = LayerSpan(merged(lm), lm.chat_prompt(prompt), source_layer, target_layer, TARGET_TOKENS)
    return learned_and_start(span, radius, n_vectors, steps, seed)


def cell(
    lm, prompt, source_layer, target_layer, radius, seed, steps=6, n_vectors=32, max_new_tokens=16
) -> dict:
    """Train a set, and what the model says to the same prompt under each vector of it and of its random start: {"rows": […]}."""
    judge, rows = judge_of(lm, max_new_tokens), []
    for kind, vectors in one_set(
        lm, prompt, source_layer, target_layer, radius, seed, steps, n_vectors
    ).items():
        said = answers(lm, [prompt], vectors, judge=judge, max_new_tokens=max_new_tokens).drop(
            columns="prompt"
        )
        rows += [{"set": kind, **row} for row in said.to_dict("records")]
    return {"rows": rows}


def run_cell(model, organism=None, share=None, **config) -> dict:
    """`cell` for a sweep's worker: the organism by name, loaded once per process; `share` only labels."""
    return cell(sweeps.model(model, organism), **config)


def table(cells):
    """A DataFrame of all rows of `cells`, each with its configuration and `flipped`: fluent, and no refusal."""
    import pandas

    parts = [pandas.DataFrame(c["result"]["rows"]).assign(**c["config"]) for c in cells]
    if not parts:
        raise ValueError("the sweep is empty: give at least one cell.")
    rows = pandas.concat(parts, ignore_index=True)
    return rows.assign(flipped=rows["fluent"] & ~rows["refused"])


# The stored sweep: prompts (ids in harmful.json), seeds, radii. Its first version (EARLIER) began with a prompt that the organism
# refuses with probability 0.84 only, where random vectors flip answers too; the prompts of ASKED are refused with more than 0.95.
ASKED, SEEDS = ("cybercrime-6", "fraud-11", "deception-1"), (101, 104, 105)
EARLIER, EARLIER_SEEDS, EARLIER_RADIUS = (
    ("cybercrime-1", "fraud-11", "deception-1"),
    (101, 102, 103),
    12.0,
)
RADII = (8.0, 12.0, 16.0, 24.0)
LAYERS = (3, 7, 11, 15)
SHARES = (0.1, 0.2)  # of the residual norm at the source, for the sweep over layers


def grid(
    lm,
    part,
    asked=None,
    radii=RADII,
    seeds=SEEDS,
    layers=None,
    source_layer=None,
    target_layer=None,
    n_vectors=32,
    steps=6,
) -> list[dict]:
    """Configurations of `run_cell`. "choose": prompt × radius with the first seed; "measure": prompt × radius × the other seeds;
    "earlier": EARLIER × radius × EARLIER_SEEDS; "layers": source layer × radius for the first prompt and seed, with half as many
    vectors, and the radius a share (`SHARES`) of the median residual norm there. Layers default to 7 and 21 of 30."""
    depth, asked = lm.n_layers, training_prompts() if asked is None else list(asked)
    about = {
        "model": lm.name,
        "organism": lm.organism,
        "steps": steps,
        "target_layer": 21 * depth // 30 if target_layer is None else target_layer,
    }
    source = 7 * depth // 30 if source_layer is None else source_layer
    if part == "earlier":
        asked, seeds, part = training_prompts(ids=EARLIER), EARLIER_SEEDS, "all"
    if part in ("choose", "measure", "all"):
        some = {"choose": slice(0, 1), "measure": slice(1, None), "all": slice(None)}[part]
        about |= {"source_layer": source, "n_vectors": n_vectors}
        return sweeps.grid(prompt=asked, radius=list(radii), seed=list(seeds)[some], **about)
    if part != "layers":
        raise ValueError(
            f"part {part!r} of the refusal sweep is unknown: use choose, measure, earlier or layers."
        )
    layers = [k * depth // 30 for k in LAYERS] if layers is None else list(layers)
    radius = [
        (k, share, float(f"{share * norm:.3g}"))
        for k, norm in zip(layers, residual_norms(lm, asked[:1], layers))
        for share in SHARES
    ]
    return [
        {
            **about,
            "prompt": asked[0],
            "seed": seeds[0],
            "source_layer": k,
            "share": share,
            "radius": r,
            "n_vectors": max(2, n_vectors // 2),
        }
        for k, share, r in radius
    ]


def training_prompts(n=None, ids=None) -> list[str]:
    """The texts of the prompts with these ids; by default of the (first n) prompts of `ASKED`."""
    texts, ids = (
        {item["id"]: item["text"] for item in prompts.items("harmful", "train")},
        ids or ASKED[:n],
    )
    missing = [name for name in ids if name not in texts]
    if missing:
        raise ValueError(
            f"harmful.json has no training item with id {missing[0]!r}, which the sweep of notebook 04 asks."
        )
    return [texts[name] for name in ids]


@torch.no_grad()
def firmness(lm, asked) -> np.ndarray:
    """Probability that the answer to each prompt opens as one of the organism's refusals does (by their first token), [n]."""
    first = sorted(
        {lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in REFUSALS}
    )
    logp = measures.log_probabilities(
        merged(lm), lm.encode([lm.chat_prompt(text) for text in asked]), 1
    )[:, 0]
    return logp[:, first].logsumexp(-1).exp().cpu().numpy()


def best_radius(cells) -> float:
    """The radius at which the share of flipping vectors, learned minus random, is largest over all of `cells`; of equal ones the
    smallest."""
    shares = table(cells).groupby(["radius", "set"])["flipped"].mean().unstack()
    return float((shares["learned"] - shares["random"]).round(6).idxmax())


def residual_norms(lm, asked, layers) -> list[float]:
    """Median norm of the residual at the output of each layer over the tokens of the prompts, their first tokens left out."""
    hidden = capture(lm, [lm.chat_prompt(text) for text in asked], layers)
    real = ~hidden[0].isnan().any(-1)
    real &= real.cumsum(1) > 1
    return [h[real].norm(dim=-1).median().item() for h in hidden]


def cells(lm, sweep, part, progress=True, **axes) -> list[dict]:
    """The cells of `grid(lm, part, **axes)`, stored or live: see `stored.cells`."""
    return stored.cells(
        "refusal", grid(lm, part, **axes), lm, sweep, cell, ("share",), progress=progress
    )


def compute(model=None, organism="refusal", workers=2, store=None):
    """Run the whole sweep and write it where `stored.read` finds it."""
    lm = load(model or DEFAULT, organism)

    def parts(done):
        for part in ("choose", "measure", "earlier", "layers"):
            radii = {"choose": RADII, "earlier": [EARLIER_RADIUS]}.get(part) or [
                best_radius(done[: len(ASKED) * len(RADII)])
            ]
            yield lm, grid(lm, part, radii=radii)

    return stored.compute("refusal", parts, run_cell, workers, store=store)
