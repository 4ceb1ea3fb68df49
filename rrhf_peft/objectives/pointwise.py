"""Losses of single responses, each by its score among its group's: KTO, NCA, GVPO, QRPO.

Each is a mean over groups of what its docstring says of one group. What they share:

    log_probs   log pi, per response, [N]
    scores      r, float [N], higher is better
    reference   log pi_ref of the same responses, [N]
    returns     the loss (scalar, differentiable) and the metrics, whose `rewards/...` are means over ordered pairs
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import (
    deviations,
    log_ratios,
    log_sum_exp,
    mean_of,
    mean_per_group,
    number_of_groups,
    ordered_pairs,
    pair_metrics,
    same_group,
    sum_per_group,
)
from rrhf_peft.records import Metrics, ResponseLogProbs


def kto(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: Literal["group_mean"] | float = "group_mean",
    reference_point: Literal["batch", "group"] | float = "batch",
) -> tuple[torch.Tensor, Metrics]:
    """KTO, model alignment as prospect theoretic optimization (https://arxiv.org/abs/2402.01306).

    Learns from single responses, desirable or not, rather than from pairs: a mean over each group's responses, then
    over groups:

        r(x, y) = log pi(y|x) / pi_ref(y|x)
        z0      = max(0, estimate of KL(pi || pi_ref))                        no gradient
        L(y)    = lambda_D * (1 - sigma(beta * (r(x, y) - z0)))               y desirable
        L(y)    = lambda_U * (1 - sigma(beta * (z0 - r(x, y))))               y undesirable, Eq. 7

    Which is which: the scores above the threshold are desirable, those below it not. On a number as threshold, a
    response is desirable; on its group's mean it teaches nothing, so that a group of ties has loss 0.

    The reference point z0. The paper and TRL estimate the KL from mismatched pairs, each prompt with the response to
    another, which costs two more forward passes. Here z0 is the mean log-ratio of the responses themselves: "batch"
    averages each group's and then the groups of the micro-batch on this process, so z0 is the same for all of them and
    depends on how groups are batched; "group" takes each group's mean, which does not depend on the batch. Both
    follow the trained responses, so they lie above TRL's when mostly desirable responses gain probability and below it
    (down to 0) when mostly undesirable ones lose it. A number fixes z0; 0 is TRL's `apo_zero_unpaired`.

    Args:
        beta: Eq. 7.
        desirable_weight, undesirable_weight: lambda_D, lambda_U.
        threshold: a number in the scores' units, or each group's mean score.
        reference_point: z0 as above; in nats when it is a number.

    The metric `kl` is z0.
    """
    ratios = log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    desirable, undesirable = _labels(scores, group, threshold)
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
    scores: torch.Tensor, group: torch.Tensor, threshold: Literal["group_mean"] | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(desirable, undesirable), bool [N] each."""
    if threshold != "group_mean":
        return scores >= threshold, scores < threshold
    distance = deviations(scores, group)
    return distance > 0, distance < 0


def _reference_point(
    ratios: torch.Tensor, group: torch.Tensor, groups: int, choice: Literal["batch", "group"] | float
) -> torch.Tensor:
    """z0 of each group, [G]."""
    mean = mean_per_group(ratios, group, groups)
    if choice == "group":
        return mean.clamp(min=0)
    if choice == "batch":
        return mean.mean().clamp(min=0).expand(groups)
    return mean.new_full((groups,), choice)


def nca(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> tuple[torch.Tensor, Metrics]:
    """NCA, noise contrastive alignment (https://arxiv.org/abs/2402.05369): each response against the reference.

        s_i = beta * log pi(y_i|x) / pi_ref(y_i|x)
        w_i = exp(r_i / alpha) / sum_j exp(r_j / alpha)
        L   = - sum_i [w_i log sigma(s_i) + 1/k log sigma(-s_i)]

    as the authors' code has it. Other than InfoNCA (`info_nca`) it holds the likelihood of good responses up: s_i is
    compared with 0 and not with the other responses. With two responses and alpha towards 0 it is TRL's
    `loss_type: nca_pair`.

    Args:
        beta: how hard the policy is held to the reference.
        alpha: temperature of the scores, in their units.
    """
    s = beta * log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    values = (scores / alpha).to(s.dtype)
    w = (values - log_sum_exp(values, same_group(group))).exp()
    size = sum_per_group(torch.ones_like(s), group, groups)[group]
    rank = -sum_per_group(w * F.logsigmoid(s) + F.logsigmoid(-s) / size, group, groups)
    return rank.mean(), pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank, s)


def gvpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
) -> tuple[torch.Tensor, Metrics]:
    """GVPO, group variance policy optimization (https://arxiv.org/abs/2504.19599): implicit rewards follow the scores.

        s_i = beta * log pi(y_i|x) / pi_ref(y_i|x)
        L   = 1 / (2 (k - 1)) sum_i [(s_i - mean_j s_j) - (r_i - mean_j r_j)]^2

    Its gradient is the paper's -beta / (k - 1) sum_i w_i grad log pi(y_i|x) with w_i = (r_i - mean r) - (s_i - mean s),
    since the w_i of a group sum to 0; its one minimum is the optimum of E[r] - beta KL(pi || pi_ref). It is a quarter
    of REBEL's loss (`rpo` with distance squared) over all pairs, ties included. The paper's reference is the policy of
    the step before. A group of ties draws its implicit rewards together.

    Args:
        beta: the score that a nat of log-ratio is worth.
    """
    s = beta * log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    difference = s - scores.to(s.dtype)
    residual = difference - mean_per_group(difference, group, groups)[group]
    size = sum_per_group(torch.ones_like(s), group, groups)
    rank = sum_per_group(residual**2, group, groups) / (2 * (size - 1).clamp(min=1))
    return rank.mean(), pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank, s)


def qrpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
) -> tuple[torch.Tensor, Metrics]:
    """QRPO, quantile reward policy optimization (https://arxiv.org/abs/2507.08068): regression to an exact target.

        q_i   = share of the reference policy's responses that score no more than y_i
        log Z = log(beta * (exp(1 / beta) - 1))                the partition function of uniform rewards
        L     = mean_i [q_i - beta log Z - beta log pi(y_i|x) / pi_ref(y_i|x)]^2

    The group stands for the reference policy's responses: q_i counts those of it that score no more than y_i, y_i
    itself included. That is right where the responses were sampled from the policy that training starts from, the more
    so the larger k is; of responses from elsewhere it makes ranks, and of a group of ties the best. The authors' code
    leaves a term of exp(-1 / beta) out of log Z.

    Args:
        beta: how hard the policy is held to the reference; the log-ratio of the best is at most 1 / beta - log Z.
    """
    ratios = log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    no_better = same_group(group) & (scores.unsqueeze(0) <= scores.unsqueeze(1))  # [i, j]: r_j <= r_i
    quantile = no_better.sum(dim=1).to(ratios.dtype) / same_group(group).sum(dim=1)
    log_partition = 1 / beta + math.log(beta) + math.log1p(-math.exp(-1 / beta))
    losses = (quantile - beta * log_partition - beta * ratios) ** 2
    rank = mean_per_group(losses, group, groups)
    return rank.mean(), pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank, beta * ratios)
