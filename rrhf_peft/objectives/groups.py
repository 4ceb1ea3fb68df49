"""Per-group arithmetic that the objectives share: normalisation, ordered pairs, the best response.

Pure functions of flat [N] tensors; `group` holds each response's group, ascending from 0 to G - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rrhf_peft.records import Mean, ResponseLogProbs


def normalised(log_probs: ResponseLogProbs, length: torch.Tensor, length_penalty: float) -> torch.Tensor:
    """p_i = sum_t log P(y_i,t | ...) / length^a [N] (arXiv 2304.05302, Eq. 1)."""
    return log_probs.sum / length.to(log_probs.sum.dtype) ** length_penalty


class OrderedPairs(NamedTuple):
    """The M pairs (worse, better) of responses of one group whose scores differ by more than a gap.

    Attributes:
        worse: int64 [M], index of the response with the lower score.
        better: int64 [M], index of the response with the higher score.
        group: int64 [M], the group both belong to.
    """

    worse: torch.Tensor
    better: torch.Tensor
    group: torch.Tensor


def ordered_pairs(scores: torch.Tensor, group: torch.Tensor, min_score_gap: float = 0.0) -> OrderedPairs:
    """All pairs of one group with r_worse < r_better and a gap above `min_score_gap`. Ties make no pair."""
    gap = scores.unsqueeze(0) - scores.unsqueeze(1)  # gap[i, j] = r_j - r_i
    same = group.unsqueeze(0) == group.unsqueeze(1)
    worse, better = torch.nonzero(same & (gap > min_score_gap), as_tuple=True)
    return OrderedPairs(worse, better, group[worse])


def number_of_groups(group: torch.Tensor) -> int:
    """G, from ascending group indices [N] with N >= 1."""
    return int(group[-1]) + 1


def sum_per_group(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum values [M] by their group [M] into [G]; groups without a value get 0."""
    return values.new_zeros(groups).index_add(0, group, values)


def best_weights(scores: torch.Tensor, group: torch.Tensor, tied_best: str = "first") -> torch.Tensor:
    """Weights [N] that pick each group's best response: 1 on the first best, or 1/n on each of n tied best.

    Args:
        scores: float [N], higher is better.
        group: int64 [N].
        tied_best: "first" (arg max, as Eq. 3) or "mean".
    """
    groups = number_of_groups(group)
    is_best = scores == _group_maximum(scores, group, groups)[group]
    if tied_best == "mean":
        return is_best / sum_per_group(is_best.to(scores.dtype), group, groups)[group]
    assert tied_best == "first", tied_best
    position = torch.arange(len(scores), device=scores.device)
    first = torch.full((groups,), len(scores), device=scores.device)
    first = first.scatter_reduce(0, group, torch.where(is_best, position, len(scores)), "amin")
    return (position == first[group]).to(scores.dtype)


def ranking_metrics(p: torch.Tensor, scores: torch.Tensor, group: torch.Tensor, pairs: OrderedPairs) -> dict[str, Mean]:
    """Pair accuracy over ordered pairs, and how often the policy's favourite is among the best-scored."""
    groups = number_of_groups(group)
    favourite = p == _group_maximum(p, group, groups)[group]
    best = scores == _group_maximum(scores, group, groups)[group]
    hits = sum_per_group((favourite & best).float(), group, groups) > 0
    return {
        "pair_accuracy": mean_of(p[pairs.better] > p[pairs.worse]),
        "best_hit_rate": mean_of(hits),
    }


def mean_of(values: torch.Tensor) -> Mean:
    """A tensor's values as numerator and denominator."""
    values = values.detach().float()
    return Mean(values.sum(), torch.tensor(float(values.numel()), device=values.device))


def _group_maximum(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    lowest = torch.full((groups,), -torch.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce(0, group, values.detach(), "amax")
