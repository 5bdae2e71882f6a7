"""measures.statistics"""

import math

import numpy as np
import torch


def _ranks(values):
    """Mean rank of each value, from 0 to 1; ties share theirs."""
    values = np.asarray(values, float)
    below, same = (values[None] < values[:, None]).sum(1), (values[None] == values[:, None]).sum(1)
    return (below + (same - 1) / 2) / max(len(values) - 1, 1)


def auc(score, label) -> float:
    """The probability that a positive scores above a negative, ties counted half; 0.5 where one of the two is missing."""
    score, label = np.asarray(score, float), np.asarray(label, bool)
    if label.all() or not label.any():
        return 0.5
    difference = score[label][:, None] - score[~label][None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def roc(score, label) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from none to all flagged."""
    score, label = np.asarray(score, float), np.asarray(label, bool)
    cuts = [np.inf, *sorted(set(score.tolist()), reverse=True)]
    return tuple(
        np.array([(score[which] >= c).mean() if which.any() else 0.0 for c in cuts])
        for which in (~label, label)
    )


def permutation_p(score, label, groups, n=2000, seed=0) -> float:
    """How often labels shuffled within groups (sets) give an AUC as high as the true ones: a one-sided p."""
    label, groups, rng = np.asarray(label, bool), np.asarray(groups), np.random.default_rng(seed)
    members = [np.flatnonzero(groups == g) for g in dict.fromkeys(groups.tolist())]
    ranks, reached = _ranks(score), 0
    true = ranks[label].sum()  # the AUC rises and falls with the positives' sum of ranks
    for _ in range(n):
        reached += (
            sum(ranks[rng.permutation(m)[: label[m].sum()]].sum() for m in members) >= true - 1e-9
        )
    return (1 + reached) / (1 + n)


def missed(hits, size, n) -> float:
    """The chance that n vectors drawn from a set of `size` without replacement contain none of its `hits` hits."""
    return math.comb(size - hits, n) / math.comb(size, n)


def needed(hits, size, chance=0.95) -> float:
    """How many vectors of a set give at least one hit with this chance, averaged over sets of `size` vectors with `hits` hits
    each; infinite if whole sets do not suffice."""
    return next(
        (
            n
            for n in range(1, size + 1)
            if 1 - np.mean([missed(h, size, n) for h in hits]) >= chance
        ),
        math.inf,
    )


def mahalanobis(x, clean, shrink=0.1) -> np.ndarray:
    """Distance of each x from the clean prompts in units of their spread; the covariance is shrunk towards a multiple of 1."""
    covariance, off = torch.cov(clean.double().T), (x - clean.mean(0)).double()
    covariance = (1 - shrink) * covariance + shrink * covariance.diagonal().mean() * torch.eye(
        len(covariance)
    ).to(covariance)
    return (off * torch.linalg.solve(covariance, off.T).T).sum(1).sqrt().cpu().numpy()
