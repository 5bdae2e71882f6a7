"""The rule for R: how nonlinear the span is, and the radius at which that reaches one half."""

import math
from functools import cache

import numpy as np
import torch

from ..residual import check_radii, whole
from .sphere import directions


def jacobian_ratio(span, radii, n_directions=30, seed=0) -> np.ndarray:
    """sqrt(mean ‖Δ(Rv) − R·Jv‖² / ‖R·Jv‖²) over random unit directions v, one number per radius.

    How nonlinear the span is: at 0, doubling R doubles the change; 0.5 is where Deep Causal
    Transcoding (Mack & Turner 2024) sets R. Jv is the central difference over ±0.5, which is exact
    enough: far below the residuals' own norm.
    """
    ratio_at = _ratio_at(span, n_directions, seed)
    return np.array([ratio_at(r) for r in check_radii(radii)])


def _ratio_at(span, n_directions, seed):
    """The ratio as a function of R; the linear part is computed once."""
    unit = directions(whole(n_directions, "n_directions", 1), span.lm.d_model, seed)
    with torch.no_grad():
        linear = span.delta(0.5 * unit) - span.delta(-0.5 * unit)  # over a distance of 1
    size = linear.flatten(1).norm(dim=1)

    @torch.no_grad()
    def ratio(radius):
        off = (span.delta(radius * unit) - radius * linear).flatten(1).norm(dim=1)
        return (off / (radius * size)).pow(2).mean().sqrt().item()

    return ratio


def calibrated_radius(span, ratio=0.5, n_directions=30, seed=0) -> float:
    """The radius at which `jacobian_ratio` reaches `ratio`, to 0.1 %.

    From R = 8 doubled or halved until the ratio lies between two radii, then Brent's method on
    log R. ValueError where no radius from 0.001 to 1e6 has that ratio.
    """
    from scipy.optimize import brentq

    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio {ratio} is not a finite number above 0.")
    ratio_at = _ratio_at(span, n_directions, seed)

    @cache
    def excess(log_radius):
        return math.log(max(ratio_at(math.exp(log_radius)), 1e-9) / ratio)

    near, step = math.log(8), math.log(2)
    step = step if excess(near) < 0 else -step
    while (excess(near + step) < 0) == (step > 0):  # not yet passed
        near += step
        if not 1e-3 < math.exp(near) < 1e6:
            raise ValueError(
                f"no radius from 0.001 to 1e6 has a Jacobian ratio of {ratio}: "
                + ("this span is linear." if step > 0 else "use a larger ratio.")
            )
    return math.exp(brentq(excess, near, near + step, xtol=1e-3))
