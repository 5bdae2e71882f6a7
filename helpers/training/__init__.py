"""Objectives, the sphere, optimisers; Jacobian directions; random controls."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "controls": ["covariance_vectors"],
        "jacobian": ["jacobian_ratio", "calibrated_radius"],
        "optimisers": [
            "normalise",
            "METHODS",
            "TrainingResult",
            "objective",
            "value_and_grad",
            "value",
            "orthonormalise",
            "without",
            "random_vectors",
            "learned_and_start",
            "train",
        ],
    },
)
