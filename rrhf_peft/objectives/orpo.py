"""ORPO: odds ratio preference optimization (https://arxiv.org/abs/2403.07691): fine-tuning with a relative penalty."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import (
    Pairs,
    best_negative_log_prob,
    mean_of,
    mean_per_group,
    normalised,
    number_of_groups,
    ordered_pairs,
)
from rrhf_peft.objectives.rewards import pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def orpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 0.1,
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The ORPO loss, a mean over groups of

        log P(y|x) = 1/|y| sum_t log pi(y_t | x, y_<t)                          Eq. 1
        odds(y|x)  = P(y|x) / (1 - P(y|x))                                      Eq. 4
        L_OR       = - log sigma(log odds(y_w|x) / odds(y_l|x))                 Eq. 7, mean over pairs with r_w > r_l
        L_SFT      = - 1/|y| sum_t log pi(y_t | ...)  of the best response
        L          = L_SFT + lambda * L_OR                                      Eq. 6

    TRL's ORPOTrainer takes L_SFT over the prompt's tokens as well; here, as in all other objectives, only the response
    is learnt.

    Args:
        log_probs: per response, [N].
        scores: r, float [N], higher is better.
        reference: not used; ORPO has no reference policy.
        beta: lambda of Eq. 6, under TRL's name.
        tied_best: the first of several best responses, or the mean over them.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without a pair has L_OR = 0. The odds of a response
        whose probability rounds to 1 are held at the largest that its type can tell.
    """
    assert reference is None, "orpo has no reference policy"
    p = normalised(log_probs, log_probs.num_tokens, 1.0)  # Eq. 1
    certain = torch.finfo(p.dtype).eps  # 1 - exp(p) must not be 0
    log_odds = p - torch.log(-torch.expm1(p.clamp(max=-certain)))  # Eq. 4
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    pair_loss = -F.logsigmoid(log_odds[chosen.better] - log_odds[chosen.worse])  # Eq. 7
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    sft = best_negative_log_prob(log_probs, scores, "mean", tied_best)
    loss = (sft + beta * rank).mean()  # Eq. 6
    return loss, {"sft_loss": mean_of(sft), **pair_metrics(log_probs, scores, chosen, rank)}
