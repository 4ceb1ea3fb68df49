"""Per-group arithmetic that the objectives share: normalisation, ordered pairs, the best response, the implicit reward.

Pure functions of flat [N] tensors; `group` holds each response's group, ascending from 0 to G - 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from rrhf_peft.records import Mean, Metrics, ResponseLogProbs

#: Which ordered pairs of a group a pairwise objective learns from. Ties make no pair; of several responses that share
#: the best (or worst) score each stands in turn, so that the order of the responses never matters.
Pairs = Literal["all", "best_worst", "best_vs_rest"]


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


def ordered_pairs(
    scores: torch.Tensor, group: torch.Tensor, min_score_gap: float = 0.0, pairs: Pairs = "all"
) -> OrderedPairs:
    """All pairs of one group with r_worse < r_better and a gap above `min_score_gap`. Ties make no pair.

    Args:
        scores: float [N], higher is better.
        group: int64 [N].
        min_score_gap: only pairs with r_better - r_worse above it.
        pairs: all; best_vs_rest, only those whose better one has the group's highest score; best_worst, those of
            them whose worse one has the lowest.
    """
    gap = scores.unsqueeze(0) - scores.unsqueeze(1)  # gap[i, j] = r_j - r_i
    chosen = same_group(group) & (gap > min_score_gap)
    if pairs != "all":
        groups = number_of_groups(group)
        chosen &= (scores == _group_maximum(scores, group, groups)[group]).unsqueeze(0)
        if pairs == "best_worst":
            chosen &= (scores == -_group_maximum(-scores, group, groups)[group]).unsqueeze(1)
    worse, better = torch.nonzero(chosen, as_tuple=True)
    return OrderedPairs(worse, better, group[worse])


def ranked_below(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """bool [N, N]: below[i, j] says that j is of i's group and scores less. Ties are below neither way."""
    return same_group(group) & (scores.unsqueeze(0) < scores.unsqueeze(1))


def number_of_groups(group: torch.Tensor) -> int:
    """G, from ascending group indices [N] with N >= 1."""
    return int(group[-1]) + 1


def sum_per_group(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum values [M] by their group [M] into [G]; groups without a value get 0."""
    return values.new_zeros(groups).index_add(0, group, values)


def mean_per_group(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean of values [M] by their group [M] into [G]; groups without a value get 0."""
    count = sum_per_group(torch.ones_like(values), group, groups)
    return sum_per_group(values, group, groups) / count.clamp(min=1)


def deviations(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """r_i less the mean score of its group [N]; 0 where the difference is only rounding."""
    groups = number_of_groups(group)
    distance = scores - mean_per_group(scores, group, groups)[group]
    rounding = 1e-9 * mean_per_group(scores.abs(), group, groups)[group]
    return torch.where(distance.abs() > rounding, distance, 0.0)


def log_sum_exp(values: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """log sum_j exp(values_j) over the members of each row [N], from values [N] and bool members [N, N]."""
    return torch.where(members, values, -torch.inf).logsumexp(dim=1)


def same_group(group: torch.Tensor) -> torch.Tensor:
    """bool [N, N]: whether two responses answer the same prompt."""
    return group.unsqueeze(0) == group.unsqueeze(1)


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


def best_negative_log_prob(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    sft_reduction: Literal["sum", "mean"],
    tied_best: Literal["first", "mean"],
) -> torch.Tensor:
    """- sum_t log P(y_best,t | ...) of each group [G], or its mean over the tokens of y_best."""
    values = normalised(log_probs, log_probs.num_tokens, 1.0) if sft_reduction == "mean" else log_probs.sum
    weights = best_weights(scores, log_probs.group, tied_best).to(values.dtype)
    return -sum_per_group(weights * values, log_probs.group, number_of_groups(log_probs.group))


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


def log_ratios(log_probs: ResponseLogProbs, reference: ResponseLogProbs) -> torch.Tensor:
    """log pi(y|x) - log pi_ref(y|x) of every response [N], in nats; no gradient reaches the reference."""
    assert reference is not None, "this objective compares with a reference policy"
    assert reference.sum.shape == log_probs.sum.shape, "the reference scored other responses"
    return log_probs.sum - reference.sum.detach().to(log_probs.sum.dtype)


def pair_metrics(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    pairs: OrderedPairs,
    rank: torch.Tensor,
    rewards: torch.Tensor | None = None,
) -> Metrics:
    """What every sibling objective logs.

    Args:
        log_probs: per response, [N].
        scores: float [N].
        pairs: the M ordered pairs that the objective learns from; `rewards/...` are means over them, as in TRL.
        rank: the ranking loss of each group [G].
        rewards: the implicit reward [N] of an objective with a reference; None without one.

    Returns:
        `rank_loss`, pair accuracy of the mean log-prob per token over all ordered pairs of a group (the same for all
        objectives, so that runs can be compared), best-of-k hit rate, and `rewards/chosen`, `rewards/rejected`,
        `rewards/margins`, `rewards/accuracies`.
    """
    p = normalised(log_probs, log_probs.num_tokens, 1.0).detach()
    metrics = {
        "rank_loss": mean_of(rank),
        **ranking_metrics(p, scores, log_probs.group, ordered_pairs(scores, log_probs.group)),
    }
    if rewards is not None:
        chosen, rejected = rewards.detach()[pairs.better], rewards.detach()[pairs.worse]
        metrics |= {
            "rewards/chosen": mean_of(chosen),
            "rewards/rejected": mean_of(rejected),
            "rewards/margins": mean_of(chosen - rejected),
            "rewards/accuracies": mean_of(chosen > rejected),
        }
    return metrics


def _group_maximum(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    lowest = torch.full((groups,), -torch.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce(0, group, values.detach(), "amax")
