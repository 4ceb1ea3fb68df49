"""Losses over the whole order of a group: Plackett-Luce, and PRO."""

from __future__ import annotations

from typing import Literal

import torch

from rrhf_peft.objectives.groups import (
    best_negative_log_prob,
    log_ratios,
    mean_of,
    normalised,
    number_of_groups,
    ordered_pairs,
    pair_metrics,
    ranked_below,
    sum_per_group,
)
from rrhf_peft.records import Metrics, ResponseLogProbs


def plackett_luce(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 1.0,
    length_penalty: float = 1.0,
    top_k: int | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """Plackett-Luce, the likelihood of a whole ranking (DPO's appendix A.3, https://arxiv.org/abs/2305.18290; the
    list-MLE loss of LiPO, https://arxiv.org/abs/2402.01878).

    Minus the log-likelihood of each group's order, a mean over groups of

        s(y) = beta / |y|^a * log pi(y|x) / pi_ref(y|x)         without a reference: beta / |y|^a * log pi(y|x)
        L    = - sum_i log [exp s(y_i) / sum_{j not above i} exp s(y_j)]          (DPO, appendix A.3)

    where i runs from the best response to the worst. DPO's is beta 0.1, a = 0 with a reference. Two responses in a
    group make DPO's pair loss.

    Ties: responses with equal scores are not compared with each other. The sum below y_i holds y_i itself and those
    that score strictly less, so the order in which tied responses are listed does not matter, a group of ties has loss
    0, and without ties this is the Plackett-Luce likelihood itself.

    Args:
        log_probs: log pi, per response, [N].
        scores: float [N], higher is better.
        reference: log pi_ref of the same responses [N], or None.
        beta: scales s.
        length_penalty: a; 1 is the mean log-prob (ratio) per token, 0 the sum.
        top_k: only the terms i of the first this many ranks: those that fewer than top_k responses score above. None
            takes all.

    Returns:
        The loss (scalar, differentiable) and the metrics.
    """
    values = log_probs.sum if reference is None else log_ratios(log_probs, reference)
    s = beta * values / log_probs.num_tokens.to(values.dtype) ** length_penalty
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    below = ranked_below(scores, group)
    competitors = below | torch.eye(len(s), dtype=torch.bool, device=s.device)
    terms = torch.where(competitors, s, -torch.inf).logsumexp(dim=1) - s
    if top_k is not None:
        terms = torch.where(below.sum(dim=0) < top_k, terms, 0.0)  # column i counts those above i
    rank = sum_per_group(terms, group, groups)
    rewards = None if reference is None else s
    return rank.mean(), pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank, rewards)


def pro(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    temperature: Literal["score_gap", "none"] = "score_gap",
    sft_weight: float = 0.05,
    sft_reduction: Literal["sum", "mean"] = "sum",
    tied_best: Literal["first", "mean"] = "first",
) -> tuple[torch.Tensor, Metrics]:
    """PRO, preference ranking optimization (https://arxiv.org/abs/2306.17492): each rank against all below it.

    A mean over groups of

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
    best = p * gap.amax(dim=1)  # p_i / T_i^i
    contrasts = torch.where(below, p.unsqueeze(0) * gap, -torch.inf)
    terms = torch.cat([best.unsqueeze(1), contrasts], dim=1).logsumexp(dim=1) - best  # 0 where nothing is below
    rank = sum_per_group(terms, group, groups)

    size = sum_per_group(torch.ones_like(p), group, groups)
    sft = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)
    loss = (rank + sft_weight * (size - 1) ** 2 * sft).mean()
    pairs = ordered_pairs(scores, group)
    return loss, {"sft_loss": mean_of(sft), **pair_metrics(log_probs, scores, pairs, rank)}
