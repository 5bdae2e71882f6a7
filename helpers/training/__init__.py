"""Objectives, the sphere and its random controls, optimisers; the rule for R."""

import lazy_loader

_DOORS = {
    "jacobian": "jacobian_ratio calibrated_radius",
    "objectives": "objective value value_and_grad",
    "optimisers": "METHODS Stopped TrainingResult learned_and_start train",
    "sphere": "covariance_directions covariance_vectors directions normalise orthonormalise "
    "random_vectors start_seed without",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _DOORS.items()}
)
