"""How large a change is: at the span's target, and in the probabilities of the next token."""

import math

import numpy as np
import torch

from ..residual import check_finite, check_length, positions_of
from ..steering import SteeringVectors


def change(span, vectors) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over target tokens of ‖Δ‖, and of ‖Δ‖ / ‖clean‖: two tensors [n_vectors, n_prompts].

    ValueError for a span with several target layers.
    """
    if not span.single:
        raise ValueError(
            f"change needs a span with one target layer, this one has {span.target_layers}."
        )
    with torch.no_grad():
        size = span.delta(vectors).norm(dim=-1)  # [n_vectors, n_prompts, n_positions]
    clean = span.clean_target.norm(dim=-1).clamp(min=1e-12)
    count = span.target_mask.sum(-1)
    return size.sum(-1) / count, (size / clean * span.target_mask).sum(-1) / count


def scaled_to_effect(span, vectors, relative, upto=32.0) -> SteeringVectors:
    """Each vector made longer until its relative `change` is `relative`, at most `upto` times.

    Tried at 11 factors from 1 to `upto` in equal ratios; the first that reaches it is
    interpolated on the log scale. A vector that already does more is left as it is.
    """
    factors = np.geomspace(1, upto, 11)
    tried = [change(span, float(f) * vectors)[1].mean(1).cpu().numpy() for f in factors]
    found = [_factor(factors, sizes, relative) for sizes in np.stack(tried, 1)]
    found = torch.tensor(found, dtype=torch.float32, device="cpu")
    tensor = found[:, None] * vectors.tensor
    return SteeringVectors(tensor, vectors.source_layer, vectors.site)


def _factor(factors, sizes, relative) -> float:
    reached = np.flatnonzero(sizes >= relative)
    if not len(reached):
        return float(factors[-1])
    i = reached[0]
    if i == 0:
        return 1.0
    below, above = sizes[i - 1], sizes[i]  # the wanted size lies between them
    share = math.log(relative / below) / math.log(above / below) if below > 0 else 1.0
    return float(factors[i - 1] * (factors[i] / factors[i - 1]) ** share)


def kl(clean_logp, other_logp) -> torch.Tensor:
    """KL(clean ‖ other) in nats over the last dimension of log-probabilities: Σ exp(p)(p − q)."""
    return (clean_logp.exp() * (clean_logp - other_logp)).sum(-1)


def log_probabilities(lm, encoded, keep) -> torch.Tensor:
    """Log-probabilities [n, keep, vocabulary] in fp32 at the last `keep` tokens."""
    check_length(lm, encoded["attention_mask"])
    positions = positions_of(encoded["attention_mask"])
    options = dict(use_cache=False, return_dict=True, logits_to_keep=keep)
    logits = lm.model(**encoded, position_ids=positions, **options).logits[:, -keep:].float()
    check_finite(logits, "the logits")
    return logits.log_softmax(-1)


@torch.no_grad()
def kl_from_clean(lm, prompt, steered) -> torch.Tensor:
    """`kl` [n_vectors] of the token after `prompt`, from the unsteered model's to the `steered`
    log-probabilities [n_vectors, vocabulary]."""
    return kl(log_probabilities(lm, lm.encode([prompt]), 1)[0, 0], steered).cpu()
