"""How large should R be? The sweep of notebook 03 over radius, steps, prompts and seeds, and what
becomes of a vector on its way through the blocks."""

import torch

from ..residual import capture, check_radii, input_norm, resolve_layer
from ..steering import steer
from . import speaking, store, sweeps
from .study import Study

# Prompts A (train) find the range, prompts B (test, no earlier notebook used them) confirm it, with
# other seeds.
PARTS = {  # {part: (split, which of its prompts, seeds)}
    "A": ("train", (0, 3, 6), (31, 32, 33)),
    "B": ("test", (3, 4, 5), (41, 42, 43)),
    "steps": ("train", (0, 3, 6), (51, 52)),
}


def grid(
    lm, part, radii=speaking.RADII, n_prompts=3, n_seeds=3, prompt_set="everyday"
) -> list[dict]:
    """Configurations of `speaking.cell`. "A" and "B": prompt × seed × radius, on A with every
    control and with samples; "steps": prompt × seed × radius × steps. Layers scale with depth."""
    split, which, seeds = PARTS[part]
    axes = {
        "prompt": speaking.asked(prompt_set, split, which, n_prompts),
        "seed": seeds[:n_seeds],
        "source_layer": 7 * lm.n_layers // 30,
        "target_layer": 21 * lm.n_layers // 30,
    }
    if part == "steps":
        few = {"learned": 4}
        return sweeps.grid(**axes, radius=[8.0, 16.0, 32.0], steps=[2, 6, 18], n_vectors=few)
    n_vectors = {"learned": 4, "random": 4, "covariance": 3}
    if part == "A":
        n_vectors["scaled"] = 3
        axes["sampled"] = [["learned", "random"]]
    return sweeps.grid(**axes, radius=check_radii(radii), n_vectors=n_vectors)


STUDY = Study(
    "goldilocks", speaking.cell, grid, dict.fromkeys(PARTS), store.table, together="radius"
)
cells = STUDY.cells


@torch.no_grad()
def absorption(lm, chat, vectors, upto, tokens=speaking.TARGET_TOKENS) -> dict:
    """What each block from the one after the source to block `upto` makes of the change Δ it is
    handed, at the last tokens.

    Returns tensors [n_blocks, n_vectors, n_tokens]: "relative" ‖Δ‖/‖h‖ into the block; "cosine"
    between Δ and θ; "norm": relative size behind the block's first norm over that before it;
    "attention", "mlp": the part of their response along Δ in multiples of Δ (−0.1: a tenth taken
    away); "attention aside", "mlp aside": the part at right angles to it."""
    layers = range(vectors.check(lm) + 1, resolve_layer(lm, upto) + 1)
    if not layers:
        source = vectors.source_layer
        raise ValueError(
            f"upto {upto} does not come after source_layer {source}: "
            f"use {source + 1} … {lm.n_layers - 1}."
        )

    def read(n):
        found = {}
        for site in ("resid_pre", "resid_mid", "resid_post"):
            found[site] = capture(lm, [chat] * n, layers, site)[:, :, tokens]
        return found

    clean = read(1)
    with steer(lm, vectors):
        moved = {site: hidden - clean[site] for site, hidden in read(len(vectors)).items()}
    change = moved["resid_pre"]
    before = _relative(clean["resid_pre"] + change, clean["resid_pre"])
    normed = []
    for h, delta, layer in zip(clean["resid_pre"], change, layers):
        norm = input_norm(lm, layer)
        normed.append(_relative(norm(h + delta), norm(h)))
    theta = vectors.tensor[None, :, None].to(change)
    found = {
        "relative": before,
        "cosine": torch.cosine_similarity(change, theta, dim=-1),
        "norm": torch.stack(normed) / before,
    }
    for part, into, out in (
        ("attention", "resid_pre", "resid_mid"),
        ("mlp", "resid_mid", "resid_post"),
    ):
        found[part], found[f"{part} aside"] = _split(moved[out] - moved[into], moved[into])
    return {name: x.float().cpu() for name, x in found.items()}


def _relative(a, b):
    return (a - b).norm(dim=-1) / b.norm(dim=-1)


def _split(response, along):
    """A response's part along a change, in multiples of it, and the size of the rest relative to
    it."""
    share = (response * along).sum(-1) / along.pow(2).sum(-1)
    return share, (response - share[..., None] * along).norm(dim=-1) / along.norm(dim=-1)
