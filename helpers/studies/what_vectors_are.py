"""What are the vectors? Starts, signs, sets and other prompts, one number per prompt each: the
sweep of notebook 02c."""

import numpy as np
import torch

from .. import metrics
from ..models import prompts
from ..residual import LayerSpan
from ..steering import SteeringVectors
from ..training import normalise, random_vectors, train, value_and_grad
from . import speaking, store, sweeps
from .study import Study

FRESH = slice(97, 127)  # of the plain requests: no other sweep asks them
SEED = 161
DAMPING = (0.5, 60)  # of a long climb, from first to last step: large steps first, then small ones
LARGE = (4, 8)  # times R: the change gets room for an inversion


def climb(span, theta, radius, dampings) -> tuple:
    """Power iteration from θ [n, d_model], each vector for itself, a step per damping: where it
    ends, the mean objective before each step, and the angles of gradient and θ at the end, [n]
    degrees (0 at a stationary point)."""
    means = []
    for damping in dampings:
        value, gradient = value_and_grad(span, theta)
        means.append(value.mean().item())
        theta = radius * normalise(normalise(gradient) + damping * theta / radius)
    _, gradient = value_and_grad(span, theta)
    cosine = torch.nn.functional.cosine_similarity(gradient, theta)
    return theta, means, torch.rad2deg(cosine.clamp(-1, 1).acos())


def alike(x, y=None) -> float:
    """Median |cosine| between a row of x and a row of y; by default between two rows of x."""
    cosines = normalise(x.flatten(1)) @ normalise((x if y is None else y).flatten(1)).T
    if y is None:
        cosines = cosines[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    return speaking.short(cosines.abs().median())


def cell(
    lm,
    prompt,
    elsewhere,
    source_layer,
    target_layer,
    radius,
    seed,
    n_vectors=4,
    steps=8,
    settling=60,
    max_new_tokens=24,
) -> dict:
    """One prompt, and one other (`elsewhere`): plain texts. "rows": what vectors do and say, as in
    `speaking.cell`, of the kinds "free" (each vector for itself), "orthogonal", "one step" (of
    "free") and "random" (where all of these start).

    Medians over vectors. "alike": |cosine| between vectors of two starts ("starts"), of their
    changes ("changes") and after a long climb ("settled", which ends at "angle" degrees from a
    stationary point; "climb": its mean objectives). "across": between vectors of two prompts, from
    one start ("same start", paired) and from two ("both"). "opposite": cosine of the changes of ±θ.
    "share":
    the objective on `prompt` of vectors learned elsewhere and of random ones, relative to its own.
    "turned": at larger R, [R, cosine of steered and clean, relative change]. "apart": distances
    between the answers, a row per row."""
    span, other = (
        LayerSpan(lm, lm.chat_prompt(text), source_layer, target_layer, speaking.TARGET_TOKENS)
        for text in (prompt, elsewhere)
    )
    clean, spread, fluent = speaking.baseline(lm, prompt, max_new_tokens)
    starts = random_vectors(span, radius, n_vectors, seed=seed)
    how = dict(n_vectors=n_vectors, seed=seed, progress=False)
    sets = {
        "free": train(span, radius, steps=steps, orthogonal=False, **how).vectors,
        "orthogonal": train(span, radius, steps=steps, **how).vectors,
        "one step": train(span, radius, steps=1, orthogonal=False, **how).vectors,
        "random": starts,
    }
    kinds = [{"kind": kind, "vector": v, "coeff": 1.0} for kind in sets for v in range(n_vectors)]
    pooled = SteeringVectors(torch.cat([v.tensor for v in sets.values()]), span.source_layer)
    rows = speaking.measured(span, clean, pooled, max_new_tokens)
    embedded = metrics.embed(lm, span.prompts[0], [row["text"] for row in rows])
    about = {"clean": clean, "own_spread": spread, "fluent": [fluent.low, fluent.high]}
    return {
        **about,
        "rows": [{**kind, **row} for kind, row in zip(kinds, rows)],
        "apart": (1 - embedded @ embedded.T).cpu().numpy().round(4).tolist(),
        **_geometry(span, sets, radius, settling),
        **_elsewhere(span, other, sets, radius, steps, how),
        "turned": [[f * radius, *_turned(span, f * radius, steps, how)] for f in LARGE],
    }


def _geometry(span, sets, radius, settling) -> dict:
    """Starts and signs."""
    free = sets["free"].tensor
    end, means, angles = climb(
        span, sets["random"].tensor, radius, np.geomspace(*DAMPING, settling)
    )
    pairs = {"starts": alike(free), "settled": alike(end)}
    with torch.no_grad():
        pairs["changes"] = alike(span.delta(free))
        opposite = {kind: _opposite(span, sets[kind].tensor) for kind in ("free", "random")}
    means = list(map(speaking.short, means))
    angle = speaking.short(angles.median())
    return {"alike": pairs, "angle": angle, "climb": means, "opposite": opposite}


def _opposite(span, theta) -> float:
    """Median cosine of the changes of +θ and −θ, all target tokens together."""
    plus, minus = span.delta(theta).flatten(1), span.delta(-theta).flatten(1)
    return speaking.short(torch.nn.functional.cosine_similarity(plus, minus).median())


@torch.no_grad()
def _objective(span, theta) -> float:
    return span.delta(theta).square().sum((1, 2, 3)).mean().item()


def _elsewhere(span, other, sets, radius, steps, how) -> dict:
    """Another prompt: its vectors from starts of its own, and from these."""
    theirs = train(other, radius, steps=steps, orthogonal=False, **how).vectors.tensor
    start = sets["random"].tensor
    here, _, _ = climb(span, start, radius, [0.5] * steps)
    there, _, _ = climb(other, start, radius, [0.5] * steps)
    same_start = torch.nn.functional.cosine_similarity(here, there).abs().median()
    own = _objective(span, sets["free"].tensor)
    share = {"elsewhere": _objective(span, theirs) / own, "random": _objective(span, start) / own}
    return {
        "share": {name: speaking.short(value) for name, value in share.items()},
        "across": {
            "same start": speaking.short(same_start),
            "both": alike(sets["free"].tensor, theirs),
        },
    }


def _turned(span, radius, steps, how) -> tuple:
    """Of a free set of that R, medians: cosine of steered and clean residual, relative change."""
    theta = train(span, radius, steps=steps, orthogonal=False, **how).vectors
    with torch.no_grad():
        delta, clean = span.delta(theta)[:, 0], span.clean_target[0]
    cosine = torch.nn.functional.cosine_similarity(clean + delta, clean[None], dim=-1)
    relative = delta.norm(dim=-1) / clean.norm(dim=-1)
    return speaking.short(cosine.median()), speaking.short(relative.median())


def grid(lm, part, n_prompts=30, **about) -> list[dict]:
    """Configurations of `cell`: "sets": fresh prompts, each with the next as the other one. Layers
    scale with depth. `about`: what else cells get."""
    asked = prompts.texts("harmless", "train", "plain")[FRESH][:n_prompts]
    at = {"source_layer": 7 * lm.n_layers // 30, "target_layer": 21 * lm.n_layers // 30}
    at |= {"radius": 10.0, "seed": SEED, "n_vectors": 4, "steps": 8}
    at |= {"settling": 60, "max_new_tokens": 24, **about}
    found = []
    for prompt, elsewhere in zip(asked, asked[1:] + asked[:1]):
        found += sweeps.grid(prompt=prompt, elsewhere=elsewhere, **at)
    return found


STUDY = Study("what_vectors_are", cell, grid, {"sets": None}, store.table)
cells = STUDY.cells
