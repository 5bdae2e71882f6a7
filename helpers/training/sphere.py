"""The sphere ‖θ‖ = R: orthonormal sets, random directions, random controls of equal norm."""

import hashlib
import json

import torch

from ..models import prompts
from ..residual import capture, check_radius, check_seed, normalise, whole
from ..steering import SteeringVectors


def orthonormalise(rows, symmetric=False) -> torch.Tensor:
    """Rows [n, d] made orthonormal: by Gram-Schmidt (QR), which keeps the first row and changes the
    last the most; or `symmetric` (Löwdin 1950), the orthonormal set that is nearest to all of them.

    `torch.linalg.qr` may return −Q; multiplying by the sign of R's diagonal keeps every row on its
    own side, else each step of an iteration would undo the last.
    """
    if symmetric:
        left, _, right = torch.linalg.svd(rows, full_matrices=False)
        return left @ right
    q, r = torch.linalg.qr(rows.T)
    return (q * (1 - 2 * (r.diagonal() < 0).to(q))).T


def without(x, basis) -> torch.Tensor:
    """The rows of x [n, d] without their components along the orthonormal rows of basis [k, d]."""
    return x - x @ basis.T @ basis


def start_seed(span, seed) -> int:
    """The seed of a span's random vectors: a hash of its prompts, its source layer and `seed`.

    So starts are the same at every radius and on a model, its base and its organisms, which makes
    those contrasts paired; on another prompt or layer they are others, which makes those
    independent.
    """
    about = json.dumps([list(span.prompts), span.source_layer, check_seed(seed)])
    return int.from_bytes(hashlib.sha256(about.encode()).digest()[:7], "big")


def directions(n_vectors, d_model, seed=0, orthogonal=False) -> torch.Tensor:
    """Random unit vectors [n_vectors, d_model], drawn on the CPU: a GPU starts alike."""
    x = _normal(n_vectors, d_model, seed)
    return orthonormalise(x) if orthogonal else normalise(x)


def _normal(n_rows, n_columns, seed) -> torch.Tensor:
    """Standard normal numbers in fp32 on the CPU, whatever torch's defaults are."""
    generator = torch.Generator("cpu").manual_seed(check_seed(seed))
    size = (whole(n_rows, "the number of vectors", 1), n_columns)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def covariance_directions(rows, n, seed=0) -> torch.Tensor:
    """Random unit vectors [n, d] with the covariance of the rows [n_rows, d]: combining centred
    rows with standard normal weights gives exactly that."""
    weights = _normal(n, len(rows), seed).to(rows)
    return normalise(weights @ (rows - rows.mean(0)))


def random_vectors(span, radius, n_vectors, seed=0, orthogonal=False) -> SteeringVectors:
    """The control: vectors of norm `radius` in random directions, for the span's layer and site.
    Power iteration with the same seed and `orthogonal` starts from just these."""
    radius, n_vectors = check_set(span, radius, n_vectors, orthogonal)
    unit = directions(n_vectors, span.lm.d_model, start_seed(span, seed), orthogonal)
    return pack(span, radius * unit, radius, method="random", seed=check_seed(seed))


def covariance_vectors(span, radius, n_vectors, seed=0) -> SteeringVectors:
    """Random vectors of norm `radius` from the covariance of the reference texts' residuals.

    First tokens are left out: they are attention sinks, and would be the only direction. So is any
    other token ten times as long as the median.
    """
    radius, n_vectors = check_set(span, radius, n_vectors, orthogonal=False)
    texts = prompts.texts("reference_texts")
    hidden = capture(span.lm, texts, span.source_layer, span.site)[0]  # [n_texts, n_tokens, d]
    real = ~hidden.isnan().any(-1)
    rows = hidden[real & (real.cumsum(1) > 1)]
    rows = rows[rows.norm(dim=-1) < 10 * rows.norm(dim=-1).median()].cpu()
    theta = radius * covariance_directions(rows, n_vectors, start_seed(span, seed))
    return pack(span, theta, radius, method="residual covariance", seed=check_seed(seed))


def check_set(span, radius, n_vectors, orthogonal) -> tuple[float, int]:
    """Norm and number of a set as Python's own; ValueError where no such set can be had."""
    if not hasattr(span, "delta"):
        raise ValueError(f"span is of type {type(span).__name__}: give a LayerSpan.")
    radius, d = check_radius(radius), span.lm.d_model
    try:
        n_vectors = whole(n_vectors, "n_vectors", 1)
    except ValueError:
        raise ValueError(
            f"n_vectors {n_vectors} is not a count: it must be a whole number, 1 or more."
        ) from None
    if orthogonal and n_vectors > d:
        raise ValueError(
            f"n_vectors {n_vectors} cannot be orthogonal in d_model {d}: "
            f"use at most {d}, or orthogonal=False."
        )
    return radius, n_vectors


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
