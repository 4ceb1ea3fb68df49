"""Mean reward of a policy's samples, with how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Bounds the memory of the draws.
_RESAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_reward(
    rewards: Sequence[Sequence[float]], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean reward over prompts with a percentile bootstrap interval.

    Prompts are resampled, not responses: responses to one prompt resemble each other, and counting each
    as a draw of its own would make the interval too narrow.

    Args:
        rewards: For each prompt, the rewards of its responses; every prompt weighs the same.
        confidence: Share of resamples that the interval holds.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
    """
    assert len(rewards) > 0, "no prompts"
    per_prompt = np.array([np.mean(own) for own in rewards], dtype=np.float64)
    weights = np.ones(len(per_prompt))
    low, high = bootstrap_means(per_prompt, weights, confidence=confidence, resamples=resamples, seed=seed)
    return Interval(float(per_prompt.mean()), low, high)


def bootstrap_means(
    totals: np.ndarray, weights: np.ndarray, *, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(totals) / sum(weights), drawing the same units of both.

    Args:
        totals: [n], of each unit (prompt, group).
        weights: [n], positive.
        confidence: share of resamples inside.
        resamples: how many.
        seed: of the draws.
    """
    random, means = np.random.default_rng(seed), np.empty(resamples)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        rows = min(_RESAMPLES_AT_ONCE, resamples - start)
        draws = random.integers(len(totals), size=(rows, len(totals)))
        means[start : start + rows] = totals[draws].sum(axis=1) / weights[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
