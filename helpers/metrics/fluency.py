"""Is a text fluent, and how different are texts? Nothing here needs torch."""

from dataclasses import dataclass

import numpy as np


# ---------------------------------------------------------------------------------------------- texts
def distinct2(text) -> float:
    """Share of distinct pairs among a text's neighbouring words (characters where it has under three words)."""
    words = text.split()
    words = words if len(words) > 2 else list(text.strip())
    grams = list(zip(words, words[1:]))
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class FluentRange:
    """The 1st and 99th percentile of `surprise` among the base model's own completions, and how many those were."""

    low: float
    high: float
    n: int

    def __call__(self, nll, texts) -> np.ndarray:
        """Bool [n]: inside the range and not a loop (distinct-2 ≥ 0.5). Too short to score (NaN) counts as not fluent."""
        nll = np.asarray(nll, dtype=float)
        return (
            (nll >= self.low) & (nll <= self.high) & np.array([distinct2(t) >= 0.5 for t in texts])
        )


def variety(texts) -> float:
    """How different the texts of one setting are: the share of words that two of them do not share, averaged over all pairs
    (0 all the same, 1 no common word); NaN for fewer than two texts. Coarser than `metrics.diversity`, and needs no model."""
    words = [set(text.lower().split()) for text in texts]
    pairs = [(a, b) for i, a in enumerate(words) for b in words[:i]]
    return (
        float(np.mean([1 - len(a & b) / (len(a | b) or 1) for a, b in pairs]))
        if pairs
        else float("nan")
    )
