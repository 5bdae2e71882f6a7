"""How much texts repeat themselves, and how different they are. No torch here."""

from itertools import combinations

import numpy as np


def distinct2(text) -> float:
    """Share of distinct pairs among a text's neighbouring words (characters if under 3 words)."""
    words = text.split()
    words = words if len(words) > 2 else list(text.strip())
    grams = list(zip(words, words[1:]))
    return len(set(grams)) / len(grams) if grams else 0.0


def variety(texts) -> float:
    """How different the texts of one setting are: the share of words that two of them do not share,
    averaged over all pairs (0 all the same, 1 no common word); NaN for fewer than two texts."""
    words = [set(text.lower().split()) for text in texts]
    apart = [1 - len(a & b) / (len(a | b) or 1) for a, b in combinations(words, 2)]
    return float(np.mean(apart)) if apart else float("nan")
