"""Norms of vectors, and the model's own norms."""

import torch

from .sites import probe, resolve_layer


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm."""
    return torch.nn.functional.normalize(x, dim=-1)


def check_radii(radii) -> list[float]:
    """The radii as floats; ValueError if there are none or one is not a finite number above 0."""
    if isinstance(radii, str):
        raise ValueError(f"radius {radii!r} is text: it must be a finite number above 0.")
    try:
        listed = list(radii)
    except TypeError:  # one number, NumPy's and torch's too
        listed = [radii]
    if not listed:
        raise ValueError("radii is empty: give at least one number above 0.")
    return [check_radius(r) for r in listed]


def check_radius(radius) -> float:
    """A norm as a float; ValueError if it is not a finite number above 0."""
    try:
        number = float("nan") if isinstance(radius, (str, bool)) else float(radius)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not 0 < number < float("inf"):
        shown = f"{radius:g}" if isinstance(radius, (int, float)) else repr(radius)
        raise ValueError(f"radius {shown} is not a norm: it must be a finite number above 0.")
    return number


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
