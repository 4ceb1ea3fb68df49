"""Several scores per response into one: normalised each, then added, or the least, or a reward under a cost limit.

None stands for a response that could not be scored; whatever is made from it is None too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

#: Scores of every group of the data, None where there is none.
Scores = Sequence[Sequence[float | None]]


def share_beaten(scores: Sequence[float | None]) -> list[float | None]:
    """Per response of one group, the share of the other scored responses that it beats, a tie counting half.

    Between 0 and 1 whatever k is; 0.5 for a response that is alone.
    """
    known = [score for score in scores if score is not None]
    others = len(known) - 1

    def share(score: float) -> float:
        below = sum(other < score for other in known)
        equal = sum(other == score for other in known) - 1
        return (below + equal / 2) / others if others else 0.5

    return [None if score is None else share(score) for score in scores]


def _unchanged(scores: Scores) -> list[list[float | None]]:
    return [list(group) for group in scores]


def _zscore(scores: Scores) -> list[list[float | None]]:
    """Mean 0 and standard deviation 1 over all responses of the data; all 0 where they are all equal."""
    known = [score for group in scores for score in group if score is not None]
    if not known:
        return _unchanged(scores)
    mean = math.fsum(known) / len(known)
    deviation = statistics.pstdev(known)
    return [
        [None if score is None else (score - mean) / deviation if deviation else 0.0 for score in group]
        for group in scores
    ]


def _rank(scores: Scores) -> list[list[float | None]]:
    return [share_beaten(group) for group in scores]


#: Name in a recipe -> what it makes of one scorer's scores.
NORMALIZATIONS: dict[str, Callable[[Scores], list[list[float | None]]]] = {
    "none": _unchanged,
    "zscore": _zscore,
    "rank": _rank,
}


def weighted_sum(parts: Mapping[str, Scores], weights: Mapping[str, float]) -> list[list[float | None]]:
    """Sum of weight times score over the parts."""
    return _each(parts, lambda own: math.fsum(weights[label] * score for label, score in own.items()))


def least(parts: Mapping[str, Scores]) -> list[list[float | None]]:
    """The worst of a response's scores."""
    return _each(parts, lambda own: min(own.values()))


def reward_under_cost(parts: Mapping[str, Scores], reward: str, cost: str, limit: float) -> list[list[float | None]]:
    """The reward of responses within the cost limit; the others lie below all of these, the costlier the lower.

    Safe RLHF (https://arxiv.org/abs/2310.12773) asks for the greatest reward among responses of bounded
    cost. A response over the limit gets ``floor - (cost - limit)``, with floor the least reward of the data.
    """
    known = [score for group in parts[reward] for score in group if score is not None]
    floor = min(known, default=0.0)
    return _each(
        {reward: parts[reward], cost: parts[cost]},
        lambda own: own[reward] if own[cost] <= limit else floor - (own[cost] - limit),
    )


def _each(parts: Mapping[str, Scores], combine: Callable[[dict[str, float]], float]) -> list[list[float | None]]:
    """`combine` over the scores of each response, by label, where all are there."""
    combined: list[list[float | None]] = []
    for group in zip(*parts.values(), strict=True):
        combined.append([])
        for own in zip(*group, strict=True):
            known = {label: score for label, score in zip(parts, own, strict=True) if score is not None}
            combined[-1].append(combine(known) if len(known) == len(parts) else None)
    return combined
