"""How well a policy's own preference orders responses as their scores do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rrhf_peft.evaluate.reward import Interval, bootstrap_means


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
        own_right, own_pairs = _right_pairs(own_preferences, own_scores)
        right, pairs = right + own_right, pairs + own_pairs
    return right / pairs if pairs else math.nan


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two lists of one group: agreeing less disagreeing pairs, with ties taken into account.

        tau_b = (P - Q) / sqrt((P + Q + T) (P + Q + U)),    T, U: pairs tied in `one` only, in `other` only

    Kendall, "The treatment of ties in ranking problems" (Biometrika 33, 1945). NaN where either list has a
    single value.
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    upper = np.triu_indices(len(x), 1)
    a, b = np.sign(x[:, None] - x[None, :])[upper], np.sign(y[:, None] - y[None, :])[upper]
    scale = math.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


@dataclass(frozen=True)
class PreferenceFigures:
    """How a policy's p_i order labelled groups: the paper's Table 5, for any k.

    Attributes:
        pair_accuracy: pooled over pairs, with an interval over groups.
        kendall_tau: tau-b, mean over groups.
        best_hit_rate: share of groups whose likeliest response is among the best-scored.
        pairs: ordered pairs.
        groups: groups with an ordered pair; the others say nothing.
    """

    pair_accuracy: Interval
    kendall_tau: float
    best_hit_rate: float
    pairs: int
    groups: int


def preference_figures(
    preferences: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PreferenceFigures | None:
    """Compare p_i with scores, group by group; None where no two scores of a group differ.

    Args:
        preferences: for each group, the policy's p_i.
        scores: for each group, as many scores.
        confidence: of the interval, which resamples groups.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    counted = [_right_pairs(p, r) for p, r in zip(preferences, scores, strict=True)]
    ordered = [place for place, (_, pairs) in enumerate(counted) if pairs]
    if not ordered:
        return None
    right, pairs = (np.array([counted[place][part] for place in ordered], dtype=np.float64) for part in (0, 1))
    low, high = bootstrap_means(right, pairs, confidence=confidence, resamples=resamples, seed=seed)
    groups = [(preferences[place], scores[place]) for place in ordered]
    hits = [r[max(range(len(p)), key=p.__getitem__)] == max(r) for p, r in groups]
    taus = [0.0 if math.isnan(tau := kendall_tau(p, r)) else tau for p, r in groups]  # p all equal: no order at all
    return PreferenceFigures(
        Interval(float(right.sum() / pairs.sum()), low, high),
        math.fsum(taus) / len(taus),
        sum(hits) / len(hits),
        int(pairs.sum()),
        len(ordered),
    )


def _right_pairs(preferences: Sequence[float], scores: Sequence[float]) -> tuple[int, int]:
    """(pairs ordered right, ordered pairs) of one group."""
    assert len(preferences) == len(scores), "one preference per score"
    p, r = np.asarray(preferences), np.asarray(scores)
    ordered = r[:, None] > r[None, :]
    return int((ordered & (p[:, None] > p[None, :])).sum()), int(ordered.sum())
