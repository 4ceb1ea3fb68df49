"""PRO: preference ranking optimization (https://arxiv.org/abs/2306.17492): each rank against all below it."""

from __future__ import annotations

from typing import Literal

import torch

from rrhf_peft.objectives.groups import (
    best_negative_log_prob,
    mean_of,
    normalised,
    number_of_groups,
    ordered_pairs,
    ranked_below,
    sum_per_group,
)
from rrhf_peft.objectives.rewards import pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def pro(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    temperature: Literal["score_gap", "none"] = "score_gap",
    sft_weight: float = 0.05,
    sft_reduction: Literal["sum", "mean"] = "sum",
    tied_best: Literal["first", "mean"] = "first",
) -> tuple[torch.Tensor, Metrics]:
    """The PRO loss, a mean over groups of

        p_i   = 1/|y_i| sum_t log P(y_i,t | x, y_i,<t)
        T_i^j = 1 / (r_i - r_j)  for r_j < r_i,   T_i^i = min_j T_i^j           (T = 1 for "none")
        L_PRO = - sum_i log [exp(p_i / T_i^i) / (exp(p_i / T_i^i) + sum_{r_j < r_i} exp(p_j / T_i^j))]
        L_SFT = - sum_t log P(y_best,t | ...)
        L     = L_PRO + b * (k - 1)^2 * L_SFT                                   b = 0.05 and k responses

    the paper's loss with differentiated contrasts, and the weight of L_SFT that its released code has. The
    temperatures are in the scores' units: scores in the tens make a contrast that no model meets.

    Ties: i runs over the responses that have a lower one, and those tied with y_i are not among its contrasts; so the
    order in which tied responses are listed does not matter, and a group of ties has L_PRO 0.

    Args:
        log_probs: per response, [N].
        scores: r, float [N], higher is better.
        reference: not used; PRO has no reference policy.
        temperature: "score_gap" or "none" as above.
        sft_weight: b.
        sft_reduction: sum (the paper) or mean over the best response's tokens.
        tied_best: the first of several best responses, or the mean over them.

    Returns:
        The loss (scalar, differentiable) and the metrics.
    """
    assert reference is None, "pro has no reference policy"
    p = normalised(log_probs, log_probs.num_tokens, 1.0)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    below = ranked_below(scores, group)
    gap = torch.where(below, scores.unsqueeze(1) - scores.unsqueeze(0), 0.0).to(p.dtype)  # 1 / T_i^j
    if temperature == "none":
        gap = below.to(p.dtype)
    own = p * gap.amax(dim=1)  # p_i / T_i^i
    contrasts = torch.where(below, p.unsqueeze(0) * gap, -torch.inf)
    terms = torch.cat([own.unsqueeze(1), contrasts], dim=1).logsumexp(dim=1) - own  # 0 where nothing is below
    rank = sum_per_group(terms, group, groups)

    size = sum_per_group(torch.ones_like(p), group, groups)
    sft = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)
    loss = (rank + sft_weight * (size - 1) ** 2 * sft).mean()
    pairs = ordered_pairs(scores, group)
    return loss, {"sft_loss": mean_of(sft), **pair_metrics(log_probs, scores, pairs, rank)}
