"""What training maximises: the change at the target, and its gradient in the vectors."""

import torch

from ..residual import in_parts


def objective(delta, p=2, q=1) -> torch.Tensor:
    """(Σ over target tokens of ‖Δ‖^p)^(1/q), averaged over prompts: one value per vector.

    `delta` [n_vectors, n_prompts, n_positions, d_model]; a dimension of target layers after
    n_prompts is summed over, as independent auxiliary objectives. The norm runs over d_model (the
    published code's runs over tokens: equal at p = 2).
    """
    value = torch.linalg.vector_norm(delta, dim=-1).pow(p).sum(-1).pow(1 / q)
    return value.flatten(2).sum(-1).mean(1) if value.ndim == 3 else value.mean(1)


@torch.inference_mode(False)
def value_and_grad(span, vectors, score=objective):
    """Objective [n_vectors] and its gradient [n_vectors, d_model], in chunks that fit the budget.

    `score`: a differentiable function delta → [n_vectors]. Out of memory halves the chunk.
    """

    def step(part):
        part = part.detach().clone().requires_grad_()  # cloned: it may come of inference mode
        with torch.enable_grad():
            values = _checked(score(span.delta(part)), part)
            return values.detach(), torch.autograd.grad(values.sum(), part)[0]

    done, span.chunk = in_parts(step, vectors, span.chunk, "vectors")
    values, gradients = zip(*done)
    return torch.cat(values), torch.cat(gradients)


@torch.no_grad()
def value(span, vectors, score=objective) -> torch.Tensor:
    """Objective [n_vectors] without a gradient."""
    return _checked(score(span.delta(vectors)), vectors)


def _checked(values, vectors):
    if values.shape != (len(vectors),):
        raise ValueError(
            f"the objective gave values of shape {list(values.shape)} for {len(vectors)} vectors: "
            "one value per vector is needed."
        )
    if not values.isfinite().all():
        bad = values[~values.isfinite()][0].item()
        raise FloatingPointError(
            f"the objective became {bad}: try a smaller radius or a wider dtype."
        )
    return values
