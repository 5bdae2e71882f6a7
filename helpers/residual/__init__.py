"""Read the residual stream, run part of the network, edit it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "geometry": [
            "PARTS",
            "normalise",
            "degrees",
            "push_angle",
            "worst_angle",
            "check_radii",
            "input_norm",
            "norm_parts",
            "stream",
            "token_masks",
            "per_prompt",
            "block_shares",
            "turn",
            "turn_grid",
            "first_share",
        ],
        "memory": ["free_memory", "is_out_of_memory", "in_parts"],
        "sites": [
            "SITES",
            "ROLES",
            "resolve_layer",
            "select_tokens",
            "forward_decoder",
            "positions_of",
            "hidden_of",
            "first_of",
            "check_site",
            "add_at",
            "edit_at",
            "read_at",
        ],
        "span": ["capture", "LayerSpan"],
    },
)
