"""Norms of vectors, and the model's own norms."""

import torch

from .sites import probe, resolve_layer


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm."""
    return torch.nn.functional.normalize(x, dim=-1)


def check_radii(radii) -> list[float]:
    """The radii as floats; ValueError if there are none or one is not a finite number above 0."""
    radii = [float(r) for r in ([radii] if isinstance(radii, (int, float)) else radii)]
    if not radii:
        raise ValueError("radii is empty: give at least one number above 0.")
    for r in radii:
        if not 0 < r < float("inf"):
            raise ValueError(f"radius {r:g} is not a norm: it must be a finite number above 0.")
    return radii


def input_norm(lm, layer: int) -> torch.nn.Module:
    """The norm through which block `layer` reads the residual stream, found by what it is given,
    not by its name."""
    block = lm.blocks[resolve_layer(lm, layer)]
    start, _, parts = probe(lm, block)
    for name, x, _ in parts:
        part = block.get_submodule(name)
        if torch.equal(x, start) and getattr(part, "weight", start).ndim == 1:
            return part
    raise ValueError(
        f"{type(block).__name__} puts no norm between the residual stream and itself: "
        "choose another model."
    )
