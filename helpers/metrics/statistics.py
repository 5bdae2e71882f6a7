"""Intervals, scores against labels, and counts. Nothing here needs torch."""

import math
import warnings

import numpy as np


def wilson(hits, n, z=1.96) -> tuple[float, float]:
    """The Wilson interval of a rate (95 % at the default z); (0, 1) where n is 0."""
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} is not a rate: hits must lie in 0 … {n}.")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = hits / n, z * z
    middle = rate + z2 / (2 * n)
    half = z * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


FEW = 15  # units: below, resampling them tells too little of their spread


def bootstrap(
    values, statistic=np.mean, level=0.95, n_resamples=2000, seed=0, bounds=None
) -> tuple[float, float]:
    """Interval of a statistic over independent units (prompts, or prompts × seeds): one value, or
    one row of values, per unit. A single unit has no interval: (nan, nan).

    Of a mean: Wilson's interval where every unit is a yes or a no (0 or 1); else a t-interval under
    15 units, and from there on the percentiles of resampled means, spread by what they lack for so
    many units. Where all units are equal, neither says anything: then as far to either side as
    Wilson's interval of 0 of n reaches. bounds: where values can lie; by default 0 to 1 if all of
    them do (rates), else no bounds; give (-1, 1) for differences of rates. Of another statistic:
    plain percentiles.

    Vectors of one orthogonal set are not independent: average over them first.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError("bootstrap needs at least one unit.")
    if len(values) == 1:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(0, len(values), (n_resamples, len(values)))
    if statistic is np.mean and values.ndim == 1:
        return _of_mean(values, lambda: values[draws].mean(1), level, bounds)
    found = [statistic(values[d]) for d in draws]
    low, high = np.percentile(found, [50 - 50 * level, 50 + 50 * level])
    return float(low), float(high)


def nested(values, prompts, starts, level=0.95, n_resamples=2000, seed=0, bounds=None):
    """Interval (low, high) of a mean over prompts that have several starts each: values, one per
    row (vector), with the prompt and the start (set) of each row.

    Rows are averaged over starts, starts over prompts; prompts are resampled, and starts within
    them. Else as `bootstrap`: under 15 prompts a t-interval over the prompts' means."""
    of_start = {}
    for value, prompt, start in zip(values, prompts, starts, strict=True):
        of_start.setdefault(prompt, {}).setdefault(start, []).append(float(value))
    units = [np.array([np.mean(rows) for rows in found.values()]) for found in of_start.values()]
    means = np.array([unit.mean() for unit in units])
    if len(means) == 1:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)

    def resampled():
        size = (n_resamples, len(units))
        tried = [unit[rng.integers(0, len(unit), (*size, len(unit)))].mean(2) for unit in units]
        which = rng.integers(0, len(units), size)
        drawn = np.stack(tried, 2)  # [n_resamples, n_prompts drawn, n_prompts]
        return np.take_along_axis(drawn, which[..., None], 2)[..., 0].mean(1)

    return _of_mean(means, resampled, level, bounds)


def _of_mean(means, resampled, level, bounds) -> tuple[float, float]:
    """The interval of the mean of independent units, from draws of it where there are enough."""
    from scipy.stats import norm, t

    n, middle = len(means), means.mean()
    if bounds is None:
        rates = means.min() >= 0 and means.max() <= 1
        bounds = (0.0, 1.0) if rates else (-math.inf, math.inf)
    wide, z = t.ppf(0.5 + level / 2, n - 1), norm.ppf(0.5 + level / 2)
    if tuple(bounds) == (0, 1) and np.isin(means, (0, 1)).all():
        return tuple(map(float, wilson(means.sum(), n, z)))
    if means.std() < 1e-12:
        reach = wilson(0, n, z)[1]
        low, high = middle - reach, middle + reach
    elif n < FEW:
        reach = wide * means.std(ddof=1) / math.sqrt(n)
        low, high = middle - reach, middle + reach
    else:
        low, high = np.percentile(resampled(), [50 - 50 * level, 50 + 50 * level])
        short = wide / z * math.sqrt(n / (n - 1))
        low, high = middle + short * (low - middle), middle + short * (high - middle)
    return float(max(low, bounds[0])), float(min(high, bounds[1]))


def ranks(values) -> np.ndarray:
    """Mean rank of each value, from 0 to 1; ties share theirs."""
    from scipy.stats import rankdata

    return (rankdata(values) - 1) / max(len(values) - 1, 1)


def auc(score, label) -> float:
    """The probability that a positive scores above a negative, ties counted half; 0.5 where one of
    the two is missing."""
    from sklearn.metrics import roc_auc_score

    label = np.asarray(label, bool)
    if label.all() or not label.any():
        return 0.5
    return float(roc_auc_score(label, score))


def roc(score, label) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from none to all flagged."""
    from sklearn.metrics import roc_curve

    if not len(label):
        return np.array([0.0, 1.0]), np.zeros(2)
    with warnings.catch_warnings():  # of labels that are all alike: their rates are 0 then
        warnings.simplefilter("ignore")
        false, true, _ = roc_curve(np.asarray(label, bool), score, drop_intermediate=False)
    return np.nan_to_num(false), np.nan_to_num(true)


def permutation_p(score, label, groups, n=2000, seed=0) -> float:
    """How often labels shuffled within groups (sets) give an AUC as high as the true ones do."""
    label, groups = np.asarray(label, bool), np.asarray(groups)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == g) for g in dict.fromkeys(groups.tolist())]
    rank = ranks(score)
    true = rank[label].sum()  # the AUC rises and falls with the positives' sum of ranks
    reached = 0
    for _ in range(n):
        drawn = [rng.permutation(m)[: label[m].sum()] for m in members]
        reached += sum(rank[d].sum() for d in drawn) >= true - 1e-9
    return (1 + reached) / (1 + n)


def missed(hits, size, n) -> float:
    """The chance that n vectors drawn from a set of `size` hold none of its `hits` hits."""
    from scipy.stats import hypergeom

    return float(hypergeom.pmf(0, size, hits, n))


def needed(hits, size, chance=0.95) -> float:
    """How many vectors of a set give at least one hit with this chance, averaged over sets of
    `size` vectors with `hits` hits each; infinite if whole sets do not suffice."""
    for n in range(1, size + 1):
        if 1 - np.mean([missed(h, size, n) for h in hits]) >= chance:
            return n
    return math.inf


def mahalanobis(x, clean, shrink=0.1) -> np.ndarray:
    """Distance [n] of each row of x [n, d] from the `clean` rows [n_clean, d] in units of their
    spread; their covariance is shrunk towards a multiple of 1."""
    from scipy.linalg import solve
    from sklearn.covariance import shrunk_covariance

    x, clean = (np.asarray(rows.cpu(), float) for rows in (x, clean))
    covariance = shrunk_covariance(np.cov(clean.T), shrink)
    off = x - clean.mean(0)
    return np.sqrt((off * solve(covariance, off.T, assume_a="pos").T).sum(1))
