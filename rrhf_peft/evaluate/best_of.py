"""Best-of-n from k responses: what the best of n would be rewarded with, without sampling again."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_best(rewards: Sequence[float], n: int) -> float:
    """Mean of the maximum over all subsets of n of the k rewards: an unbiased estimate of best-of-n.

    Of the rewards in ascending order the i-th (from 1) is the maximum of C(i - 1, n - 1) of the C(k, n) subsets.

    Args:
        rewards: k rewards of one prompt's responses.
        n: at least 1 and at most k.
    """
    assert 1 <= n <= len(rewards), (n, len(rewards))
    ordered = sorted(rewards)
    subsets = math.comb(len(ordered), n)
    return math.fsum(reward * (math.comb(place, n - 1) / subsets) for place, reward in enumerate(ordered))
