"""KTO: model alignment as prospect theoretic optimization (https://arxiv.org/abs/2402.01306).

Learns from single responses, desirable or not, rather than from pairs.
"""

from __future__ import annotations

from typing import Literal

import torch

from rrhf_peft.objectives.groups import mean_of, mean_per_group, number_of_groups, ordered_pairs
from rrhf_peft.objectives.rewards import log_ratios, pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs

#: Of the scores' size: nearer to their group's mean than this, a response is on it.
ROUNDING = 1e-9


def kto(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: Literal["group_mean"] | float = "group_mean",
    reference_point: Literal["batch", "group"] | float = "batch",
) -> tuple[torch.Tensor, Metrics]:
    """The KTO loss, a mean over each group's responses, then over groups:

        r(x, y) = log pi(y|x) / pi_ref(y|x)
        z0      = max(0, estimate of KL(pi || pi_ref))                        no gradient
        L(y)    = lambda_D * (1 - sigma(beta * (r(x, y) - z0)))               y desirable
        L(y)    = lambda_U * (1 - sigma(beta * (z0 - r(x, y))))               y undesirable, Eq. 7

    Which is which: the scores above the threshold are desirable, those below it not. On a number as threshold, a
    response is desirable; on its group's mean it teaches nothing, so that a group of ties has loss 0.

    The reference point z0. The paper and TRL estimate the KL from mismatched pairs, each prompt with the response to
    another, which costs two more forward passes. Here z0 is the mean log-ratio of the responses themselves: "batch"
    averages each group's and then the groups of the micro-batch on this process, so z0 is the same for all of them and
    depends on how groups are batched; "group" takes each group's own mean, which does not depend on the batch. Both
    follow the trained responses, so they lie above TRL's when mostly desirable responses gain probability and below it
    (down to 0) when mostly undesirable ones lose it. A number fixes z0; 0 is TRL's `apo_zero_unpaired`.

    Args:
        log_probs: log pi, per response, [N].
        scores: float [N], higher is better.
        reference: log pi_ref of the same responses, [N].
        beta: Eq. 7.
        desirable_weight, undesirable_weight: lambda_D, lambda_U.
        threshold: a number in the scores' units, or each group's mean score.
        reference_point: z0 as above; in nats when it is a number.

    Returns:
        The loss (scalar, differentiable) and the metrics: `kl` is z0, and `rewards/...` are means over ordered pairs.
    """
    ratios = log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    desirable, undesirable = _labels(scores, group, groups, threshold)
    counted = desirable | undesirable
    z0 = _reference_point(ratios.detach(), group, groups, reference_point)  # [G]

    distance = beta * (ratios - z0[group])
    good, bad = desirable.to(distance.dtype), undesirable.to(distance.dtype)
    weight = desirable_weight * good + undesirable_weight * bad
    losses = weight * (1 - torch.sigmoid((good - bad) * distance))  # Eq. 7
    rank = mean_per_group(losses[counted], group[counted], groups)
    pairs = ordered_pairs(scores, group)
    return rank.mean(), {
        **pair_metrics(log_probs, scores, pairs, rank, beta * ratios),
        "kl": mean_of(z0),
        "desirable": mean_of(desirable[counted]),
    }


def _labels(
    scores: torch.Tensor, group: torch.Tensor, groups: int, threshold: Literal["group_mean"] | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(desirable, undesirable), bool [N] each."""
    if threshold != "group_mean":
        return scores >= threshold, scores < threshold
    distance = scores - mean_per_group(scores, group, groups)[group]
    on_it = ROUNDING * mean_per_group(scores.abs(), group, groups)[group]
    return distance > on_it, distance < -on_it


def _reference_point(
    ratios: torch.Tensor, group: torch.Tensor, groups: int, choice: Literal["batch", "group"] | float
) -> torch.Tensor:
    """z0 of each group, [G]."""
    own = mean_per_group(ratios, group, groups)
    if choice == "group":
        return own.clamp(min=0)
    if choice == "batch":
        return own.mean().clamp(min=0).expand(groups)
    return own.new_full((groups,), choice)
