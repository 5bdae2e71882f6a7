"""Norms of vectors, and the model's own norms."""

from contextlib import ExitStack

import torch

from .sites import forward_decoder, hidden_of, resolve_layer


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
    block, found = lm.blocks[resolve_layer(lm, layer)], []
    with torch.no_grad(), ExitStack() as stack:

        def start(module, args, kwargs):
            stack.entered = hidden_of(args, kwargs)

        def look(module, args, kwargs):
            given = args[0] if args else kwargs.get("hidden_states")
            if given is stack.entered and getattr(module, "weight", torch.zeros(1, 1)).ndim == 1:
                found.append(module)

        stack.callback(block.register_forward_pre_hook(start, with_kwargs=True).remove)
        for child in block.children():
            stack.callback(child.register_forward_pre_hook(look, with_kwargs=True).remove)
        ids = torch.arange(4, device=lm.device)[None]
        forward_decoder(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if not found:
        raise ValueError(
            f"{type(block).__name__} puts no norm between the residual stream and itself: "
            "choose another model."
        )
    return found[0]
