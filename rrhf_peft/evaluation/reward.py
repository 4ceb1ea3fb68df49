"""Mean reward of a policy's samples, with how far it can be trusted.

Left to others: where rewards come from (`rrhf_peft.scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    draws = np.random.default_rng(seed).integers(len(per_prompt), size=(resamples, len(per_prompt)))
    low, high = np.quantile(per_prompt[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(per_prompt.mean()), float(low), float(high))
