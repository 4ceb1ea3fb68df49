"""Spearman's rank correlation within groups: how far scores go with another number of each response."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def mean_rank_correlation(groups: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Mean over groups of the rank correlation between their two lists; ties share their mean rank.

    Groups in which either list has a single value do not count; None where no group counts.
    """
    coefficients = []
    for scores, numbers in groups:
        if len(set(scores)) > 1 and len(set(numbers)) > 1:
            one, other = _centred_ranks(scores), _centred_ranks(numbers)
            coefficients.append(one @ other / math.sqrt((one @ one) * (other @ other)))
    return float(np.mean(coefficients)) if coefficients else None


def _centred_ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks less their mean; equal values share the mean of their ranks."""
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place] - (len(values) + 1) / 2
