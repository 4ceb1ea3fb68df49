"""SLiC-HF: sequence likelihood calibration with a margin (https://arxiv.org/abs/2305.10425), and DPO's hinge form."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import (
    Pairs,
    best_negative_log_prob,
    mean_of,
    mean_per_group,
    number_of_groups,
    ordered_pairs,
)
from rrhf_peft.objectives.rewards import log_ratios, pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def hinge(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 1.0,
    margin: float = 1.0,
    length_penalty: float = 0.0,
    sft_weight: float = 1.0,
    sft_reduction: Literal["sum", "mean"] = "mean",
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The SLiC-HF loss with its rank calibration and cross-entropy regularisation, a mean over groups of

        s(y)  = beta / |y|^a * log pi(y|x)                      a = 0, beta = 1 in the paper
        L_cal = max(0, delta - s(y_w) + s(y_l))                 mean over the group's pairs with r_w > r_l
        L_reg = - log pi(y_best|x)
        L     = L_cal + lambda * L_reg                          the paper's calibration loss (its section 3)

    With a reference, s(y) = beta / |y|^a * log pi(y|x) / pi_ref(y|x). TRL's DPOTrainer with `loss_type: hinge` is that
    with margin 1 and sft_weight 0; its CPOTrainer with `loss_type: hinge` is the first form, with sft_weight
    `cpo_alpha`.

    Args:
        log_probs: log pi, per response, [N].
        scores: r, float [N], higher is better.
        reference: log pi_ref of the same responses [N], or None.
        beta: scales s; 1 / beta is the margin in log-probs when `margin` is 1.
        margin: delta.
        length_penalty: a; 1 compares log-probs per token.
        sft_weight: lambda.
        sft_reduction: sum (as the paper writes it) or mean over the best response's tokens.
        tied_best: the first of several best responses, or the mean over them.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics; `active_pairs` is the share of pairs within the margin. A
        group without a pair has L_cal 0.
    """
    values = log_probs.sum if reference is None else log_ratios(log_probs, reference)
    s = beta * values / log_probs.num_tokens.to(values.dtype) ** length_penalty
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    difference = margin - s[chosen.better] + s[chosen.worse]
    rank = mean_per_group(F.relu(difference), chosen.group, number_of_groups(log_probs.group))
    sft = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)
    loss = (rank + sft_weight * sft).mean()
    return loss, {
        "sft_loss": mean_of(sft),
        **pair_metrics(log_probs, scores, chosen, rank, None if reference is None else s),
        "active_pairs": mean_of(difference > 0),
    }
