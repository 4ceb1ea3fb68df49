"""RRHF: rank responses to align language models with human feedback (https://arxiv.org/abs/2304.05302).

And its fine-tuning loss alone, `sft`, the baseline to beat.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import (
    best_negative_log_prob,
    best_weights,
    mean_of,
    normalised,
    number_of_groups,
    ordered_pairs,
    ranking_metrics,
    sum_per_group,
)
from rrhf_peft.records import Metrics, ResponseLogProbs


def rrhf(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    variant: Literal["balanced", "paper", "released"] = "balanced",
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
    length_penalty: float = 1.0,
    margin: float = 0.0,
    min_score_gap: float = 0.0,
    pair_function: Literal["hinge", "logistic"] = "hinge",
    pair_reduction: Literal["sum", "mean"] = "sum",
    sft_reduction: Literal["sum", "mean"] | None = None,
    tied_best: Literal["first", "mean"] = "first",
) -> tuple[torch.Tensor, Metrics]:
    """RRHF, rank responses to align language models with human feedback (https://arxiv.org/abs/2304.05302).

    A mean over groups of

        p_i    = (1 / |y_i|^a) sum_t log P(y_i,t | x, y_i,<t)          Eq. 1
        L_rank = sum_{r_i < r_j} max(0, p_i - p_j + margin)            Eq. 2
        L_ft   = - sum_t log P(y_best,t | ...),  best = argmax r       Eq. 3, 4
        L      = rank_weight * L_rank + sft_weight * L_ft              Eq. 5

    and of what two variants make of it:

        paper     the formulas above, to the letter
        balanced  L_ft is a mean over the best response's tokens, as p_i is
        released  the released code: p_i and L_ft divide by the group's padded length, not by |y_i|

    Args:
        log_probs: per response, [N].
        scores: r, float [N], higher is better.
        reference: not used; RRHF has no reference policy.
        variant: which of the three above.
        rank_weight, sft_weight: Eq. 5; both 1 in the paper.
        length_penalty: a of Eq. 1.
        margin: inside the hinge of Eq. 2; 0 in the paper.
        min_score_gap: only pairs with r_j - r_i above it count.
        pair_function: "hinge" max(0, d), or "logistic" log(1 + exp(d)).
        pair_reduction: over the ordered pairs of a group.
        sft_reduction: over the best response's tokens; None takes the variant's.
        tied_best: the first of several best responses, or the mean over them.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without an ordered pair has L_rank 0.
    """
    assert reference is None, "rrhf has no reference policy"
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    length = log_probs.padded_length if variant == "released" else log_probs.num_tokens
    p = normalised(log_probs, length, length_penalty)  # Eq. 1

    pairs = ordered_pairs(scores, group, min_score_gap)
    difference = p[pairs.worse] - p[pairs.better] + margin
    pair_loss = F.relu(difference) if pair_function == "hinge" else F.softplus(difference)
    rank = sum_per_group(pair_loss, pairs.group, groups)  # Eq. 2
    if pair_reduction == "mean":
        rank = rank / sum_per_group(torch.ones_like(pair_loss), pairs.group, groups).clamp(min=1)

    sft_mean = variant != "paper" if sft_reduction is None else sft_reduction == "mean"
    per_response = log_probs.sum / length if sft_mean else log_probs.sum
    best = best_weights(scores, group, tied_best).to(per_response.dtype)
    sft = -sum_per_group(best * per_response, group, groups)  # Eq. 3, 4

    loss = (rank_weight * rank + sft_weight * sft).mean()  # Eq. 5
    return loss, {
        "rank_loss": mean_of(rank),
        "sft_loss": mean_of(sft),
        **ranking_metrics(p.detach(), scores, group, pairs),
        "active_pairs": mean_of(difference > 0),
    }


def sft(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    sft_reduction: Literal["sum", "mean"] = "mean",
    tied_best: Literal["first", "mean"] = "first",
) -> tuple[torch.Tensor, Metrics]:
    """Mean over groups of L_ft = - sum_t log P(y_best,t | ...) (https://arxiv.org/abs/2304.05302, Eq. 3, 4).

    Args:
        log_probs: per response, [N].
        scores: float [N], higher is better.
        reference: not used.
        sft_reduction: sum or mean over the best response's tokens.
        tied_best: the first of several best responses, or the mean over them.

    Returns:
        The loss (scalar, differentiable) and the metrics; pair accuracy uses mean log-probs per token.
    """
    assert reference is None, "sft has no reference policy"
    p = normalised(log_probs, log_probs.num_tokens, 1.0)
    per_group = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)  # Eq. 3, 4
    return per_group.mean(), {
        "sft_loss": mean_of(per_group),
        **ranking_metrics(p.detach(), scores, log_probs.group, ordered_pairs(scores, log_probs.group)),
    }
