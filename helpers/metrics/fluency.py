"""Is a text a loop or as surprising as usual, and how different are texts? No torch here."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np


def distinct2(text) -> float:
    """Share of distinct pairs among a text's neighbouring words (characters if under 3 words)."""
    words = text.split()
    words = words if len(words) > 2 else list(text.strip())
    grams = list(zip(words, words[1:]))
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class FluentRange:
    """The 1st and 99th percentile of `surprise` among the base model's own completions, and how
    many those were."""

    low: float
    high: float
    n: int

    def __call__(self, nll, texts) -> np.ndarray:
        """Bool [n]: inside the range and not a loop (distinct-2 ≥ 0.5). Too short to score (NaN)
        counts as not fluent."""
        nll = np.asarray(nll, dtype=float)
        no_loop = np.array([distinct2(text) >= 0.5 for text in texts])
        return (nll >= self.low) & (nll <= self.high) & no_loop


def variety(texts) -> float:
    """How different the texts of one setting are: the share of words that two of them do not share,
    averaged over all pairs (0 all the same, 1 no common word); NaN for fewer than two texts."""
    words = [set(text.lower().split()) for text in texts]
    apart = [1 - len(a & b) / (len(a | b) or 1) for a, b in combinations(words, 2)]
    return float(np.mean(apart)) if apart else float("nan")
