"""The sphere ‖θ‖ = R: orthonormal sets, random directions, random controls of equal norm."""

from numbers import Integral

import torch

from ..models import prompts
from ..residual import capture, check_radii, normalise
from ..steering import SteeringVectors


def orthonormalise(rows) -> torch.Tensor:
    """Gram-Schmidt by QR on the rows of [n, d].

    `torch.linalg.qr` may return −Q; multiplying by the sign of R's diagonal keeps every row on its
    own side, else each step of an iteration would undo the last.
    """
    q, r = torch.linalg.qr(rows.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T


def without(x, basis) -> torch.Tensor:
    """The rows of x [n, d] without their components along the orthonormal rows of basis [k, d]."""
    return x - x @ basis.T @ basis


def directions(n_vectors, d_model, seed=0, orthogonal=False) -> torch.Tensor:
    """Random unit vectors [n_vectors, d_model], drawn on the CPU: a GPU starts alike."""
    x = torch.randn(n_vectors, d_model, generator=torch.Generator().manual_seed(seed))
    return orthonormalise(x) if orthogonal else normalise(x)


def covariance_directions(rows, n, seed=0) -> torch.Tensor:
    """Random unit vectors [n, d] with the covariance of the rows [n_rows, d]: combining centred
    rows with standard normal weights gives exactly that."""
    weights = torch.randn(n, len(rows), generator=torch.Generator().manual_seed(seed)).to(rows)
    return normalise(weights @ (rows - rows.mean(0)))


def random_vectors(span, radius, n_vectors, seed=0, orthogonal=False) -> SteeringVectors:
    """The control: vectors of norm `radius` in random directions, for the span's layer and site.
    Power iteration with the same seed and `orthogonal` starts from just these."""
    check_set(span, radius, n_vectors, orthogonal)
    theta = radius * directions(n_vectors, span.lm.d_model, seed, orthogonal)
    return pack(span, theta, radius, method="random", seed=seed)


def covariance_vectors(span, radius, n_vectors, seed=0) -> SteeringVectors:
    """Random vectors of norm `radius` from the covariance of the reference texts' residuals.

    First tokens are left out: they are attention sinks, and would be the only direction. So is any
    other token ten times as long as the median.
    """
    check_radii([radius])
    texts = prompts.texts("reference_texts")
    hidden = capture(span.lm, texts, span.source_layer, span.site)[0]  # [n_texts, n_tokens, d]
    real = ~hidden.isnan().any(-1)
    rows = hidden[real & (real.cumsum(1) > 1)]
    rows = rows[rows.norm(dim=-1) < 10 * rows.norm(dim=-1).median()].cpu()
    theta = radius * covariance_directions(rows, n_vectors, seed)
    return pack(span, theta, radius, method="residual covariance", seed=seed)


def check_set(span, radius, n_vectors, orthogonal):
    """ValueError where no set of such a norm and number can be had."""
    check_radii([radius])
    d = span.lm.d_model
    if not isinstance(n_vectors, Integral) or n_vectors < 1:
        raise ValueError(
            f"n_vectors {n_vectors} is not a count: it must be a whole number, 1 or more."
        )
    if orthogonal and n_vectors > d:
        raise ValueError(
            f"n_vectors {n_vectors} cannot be orthogonal in d_model {d}: "
            f"use at most {d}, or orthogonal=False."
        )


def pack(span, tensor, radius, **how) -> SteeringVectors:
    """The vectors with the place they belong to, and how they came about."""
    provenance = {
        "model": span.lm.name,
        "organism": span.lm.organism,
        "weights_hash": span.lm.weights_hash,
        "prompts": span.prompts,
        "target_layers": span.target_layers,
        **how,
    }
    return SteeringVectors(tensor, span.source_layer, span.site, float(radius), provenance)
