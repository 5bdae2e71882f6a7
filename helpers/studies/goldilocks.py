"""How large should R be? The sweep of notebook 03: radius, steps, prompts and seeds."""

from ..residual import check_radii
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
