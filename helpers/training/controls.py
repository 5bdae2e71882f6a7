"""Random vectors from the covariance of the residuals: a control of equal norm."""

import torch

from ..models import prompts
from ..residual import check_radii, normalise
from ..residual.span import capture
from ..steering import SteeringVectors


# ---------------------------------------------------------------------------------------------- controls of equal norm or effect
def covariance_vectors(span, radius, n_vectors, seed=0) -> SteeringVectors:
    """Random vectors of norm `radius` drawn from the covariance of the source residuals of the reference texts.

    Combining centred residuals x_i with standard normal weights gives exactly their covariance. First tokens are left out: they
    are attention sinks, and would be the only direction. So is any other token ten times as long as the median.
    """
    check_radii([radius])
    hidden = capture(span.lm, prompts.texts("reference_texts"), span.source_layer, span.site)[0]
    real = ~hidden.isnan().any(-1)
    rows = hidden[real & (real.cumsum(1) > 1)]
    rows = rows[rows.norm(dim=-1) < 10 * rows.norm(dim=-1).median()].cpu()
    weights = torch.randn(n_vectors, len(rows), generator=torch.Generator().manual_seed(seed))
    theta = radius * normalise(weights @ (rows - rows.mean(0)))
    about = {"random": "residual covariance", "seed": seed, "model": span.lm.name}
    return SteeringVectors(theta, span.source_layer, span.site, radius, about)
