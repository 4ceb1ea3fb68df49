"""How well a policy's own preference orders responses as their scores do.

Left to others: the policy's preference (`evaluation.likelihood.mean_log_probs`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pair_accuracy(preferences: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> float:
    """Share of ordered pairs (score_i > score_j within a group) with preference_i > preference_j.

    The same number as the training metric `pair_accuracy`, pooled over all pairs: equal scores make no
    pair, equal preferences are not right. NaN where no two scores differ.

    Args:
        preferences: For each group, the policy's p_i (Eq. 1 of https://arxiv.org/abs/2304.05302).
        scores: For each group, as many scores.
    """
    right = pairs = 0
    for own_preferences, own_scores in zip(preferences, scores, strict=True):
        assert len(own_preferences) == len(own_scores), "one preference per score"
        p, r = np.asarray(own_preferences), np.asarray(own_scores)
        ordered = r[:, None] > r[None, :]
        pairs += int(ordered.sum())
        right += int((ordered & (p[:, None] > p[None, :])).sum())
    return right / pairs if pairs else math.nan
