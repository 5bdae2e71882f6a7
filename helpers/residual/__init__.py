"""Read the residual stream, run part of the network, edit it."""

import lazy_loader

_DOORS = {
    "checks": "check_finite check_kind check_length check_seed whole",
    "memory": "free_memory is_out_of_memory in_parts",
    "norms": "normalise check_radii check_radius input_norm",
    "precision": "instead mixed_precision",
    "sites": "SITES resolve_layer select_tokens check_positions check_site edit_at read_at "
    "positions_of without_hooks",
    "span": "capture LayerSpan",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _DOORS.items()}
)
