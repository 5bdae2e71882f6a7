"""The rule for R: how nonlinear the span is, and the radius at which that reaches one half."""

import math

import numpy as np
import torch

from ..residual import check_radii, normalise


# ---------------------------------------------------------------------------------------------- the rule for R
def jacobian_ratio(span, radii, n_directions=30, seed=0, epsilon=0.5) -> np.ndarray:
    """sqrt(mean ‖Δ(Rv) − R·Jv‖² / ‖R·Jv‖²) over random unit directions v, one number per radius: how nonlinear the span is.

    0: doubling R doubles the change; 0.5 is where Deep Causal Transcoding (Mack & Turner 2024) sets R. Jv is the central
    difference over ±`epsilon`, which is exact enough where epsilon is far below the residuals' own norm.
    """
    ratio_at = _ratio_at(span, n_directions, seed, epsilon)
    return np.array([ratio_at(r) for r in check_radii(radii)])


def _ratio_at(span, n_directions, seed, epsilon=0.5):
    """The ratio as a function of R; the linear part is computed once."""
    unit = normalise(
        torch.randn(n_directions, span.lm.d_model, generator=torch.Generator().manual_seed(seed))
    )
    with torch.no_grad():
        linear = (span.delta(epsilon * unit) - span.delta(-epsilon * unit)) / (2 * epsilon)
    size = linear.flatten(1).norm(dim=1)

    @torch.no_grad()
    def ratio(radius):
        off = (span.delta(radius * unit) - radius * linear).flatten(1).norm(dim=1)
        return (off / (radius * size)).pow(2).mean().sqrt().item()

    return ratio


def calibrated_radius(span, ratio=0.5, n_directions=30, seed=0) -> float:
    """The radius at which `jacobian_ratio` reaches `ratio`, to 2 % of that ratio: guessed as if the ratio grew with R, and halved
    (on the log scale) between the nearest radii below and above where the guess leaves them."""
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio {ratio} is not a finite number above 0.")
    ratio_at, radius, low, high = _ratio_at(span, n_directions, seed), 8.0, 0.0, math.inf
    while 1e-3 < radius < 1e6:
        found = ratio_at(radius)
        if abs(found / ratio - 1) < 0.02 or high / max(low, 1e-9) < 1.005:
            return radius
        low, high = (radius, high) if found < ratio else (low, radius)
        radius *= min(4.0, max(0.25, ratio / max(found, 1e-9)))
        if not low < radius < high:
            radius = math.sqrt(low * high)
    raise ValueError(
        f"no radius from 0.001 to 1e6 has a Jacobian ratio of {ratio}: "
        + ("this span is linear." if high == math.inf else "use a larger ratio.")
    )
