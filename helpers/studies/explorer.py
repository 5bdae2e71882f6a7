"""The sweep that the explorer shows: prompt × source layer × radius, with several coefficients."""

from ..residual import check_radii
from . import speaking, store, sweeps
from .study import Study

LAYERS = (3, 7, 11, 15)  # of 30


def grid(lm, part, radii=speaking.RADII, n_prompts=3, prompt_set="everyday") -> list[dict]:
    """Configurations of `speaking.cell`; layers scale with the model's depth."""
    return sweeps.grid(
        prompt=speaking.asked(prompt_set, "train", (0, 3, 6), n_prompts),
        seed=61,
        source_layer=[k * lm.n_layers // 30 for k in LAYERS],
        radius=check_radii(radii),
        target_layer=21 * lm.n_layers // 30,
        n_vectors={"learned": 4, "random": 2},
        coeffs=[[-1.0, 1.0, 2.0]],
    )


STUDY = Study("explorer", speaking.cell, grid, {"map": None}, store.table, together="radius")
cells = STUDY.cells
