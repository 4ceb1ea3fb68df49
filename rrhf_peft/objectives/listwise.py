"""Losses over a whole group at once: Plackett-Luce, PRO, LiPO-lambda, InfoNCA, MPO.

Each is a mean over groups of what its docstring says of one group. What they share:

    log_probs   log pi, per response, [N]
    scores      r, float [N], higher is better
    reference   log pi_ref of the same responses [N], or None where there is none
    returns     the loss (scalar, differentiable) and the metrics
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import (
    best_negative_log_prob,
    deviations,
    log_ratios,
    log_sum_exp,
    mean_of,
    mean_per_group,
    normalised,
    number_of_groups,
    ordered_pairs,
    pair_metrics,
    ranked_below,
    same_group,
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

    Minus the log-likelihood of the group's order:

        s(y) = beta / |y|^a * log pi(y|x) / pi_ref(y|x)         without a reference: beta / |y|^a * log pi(y|x)
        L    = - sum_i log [exp s(y_i) / sum_{j not above i} exp s(y_j)]          (DPO, appendix A.3)

    where i runs from the best response to the worst. DPO's is beta 0.1, a = 0 with a reference. Two responses in a
    group make DPO's pair loss.

    Ties: responses with equal scores are not compared with each other. The sum below y_i holds y_i itself and those
    that score strictly less, so the order in which tied responses are listed does not matter, a group of ties has loss
    0, and without ties this is the Plackett-Luce likelihood itself.

    Args:
        beta: scales s.
        length_penalty: a; 1 is the mean log-prob (ratio) per token, 0 the sum.
        top_k: only the terms i of the first this many ranks: those that fewer than top_k responses score above. None
            takes all.
    """
    values = log_probs.sum if reference is None else log_ratios(log_probs, reference)
    s = beta * values / log_probs.num_tokens.to(values.dtype) ** length_penalty
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    below = ranked_below(scores, group)
    competitors = below | torch.eye(len(s), dtype=torch.bool, device=s.device)
    terms = log_sum_exp(s, competitors) - s
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
        temperature: "score_gap" or "none" as above.
        sft_weight: b.
        sft_reduction: sum (the paper) or mean over the best response's tokens.
        tied_best: the first of several best responses, or the mean over them.
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


def lipo_lambda(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
) -> tuple[torch.Tensor, Metrics]:
    """LiPO-lambda, listwise preference optimization by LambdaLoss (https://arxiv.org/abs/2402.01878).

        s_i     = beta * log pi(y_i|x) / pi_ref(y_i|x)
        Delta   = |G_i - G_j| * |1 / D(tau_i) - 1 / D(tau_j)|         G_i = 2^r_i - 1,  D(tau) = log(1 + tau)
        L       = sum_{r_i > r_j} Delta_ij log(1 + exp(-(s_i - s_j)))                                   Eq. 8

    where tau_i is the rank of y_i by s, 1 for the highest: a pair counts by what its exchange would do to DCG. The
    paper's scores are win rates between 0 and 1; gains of scores in the tens let one pair outweigh all others.

    Ties in s, which a new adapter begins with, are ranked by score, the higher first, and those in both share the mean
    of their ranks: the order in which responses are listed does not matter.

    Args:
        beta: scales s.
    """
    s = beta * log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    value, score = s.detach(), scores
    level = value.unsqueeze(0) == value.unsqueeze(1)
    above = (value.unsqueeze(0) > value.unsqueeze(1)) | (level & (score.unsqueeze(0) > score.unsqueeze(1)))
    equal = level & (score.unsqueeze(0) == score.unsqueeze(1))  # itself among them
    together = same_group(group)
    tau = 0.5 + (above & together).sum(dim=1) + 0.5 * (equal & together).sum(dim=1)

    pairs = ordered_pairs(scores, group)
    gain, discount = torch.exp2(scores), 1 / torch.log1p(tau.to(scores.dtype))
    delta = (gain[pairs.better] - gain[pairs.worse]) * (discount[pairs.better] - discount[pairs.worse]).abs()
    losses = delta.to(s.dtype) * F.softplus(s[pairs.worse] - s[pairs.better])
    rank = sum_per_group(losses, pairs.group, groups)  # Eq. 8
    return rank.mean(), pair_metrics(log_probs, scores, pairs, rank, s)


def info_nca(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> tuple[torch.Tensor, Metrics]:
    """InfoNCA (https://arxiv.org/abs/2402.05369): cross-entropy of a softmax of implicit rewards to one of scores.

        s_i = beta * log pi(y_i|x) / pi_ref(y_i|x)
        L   = - sum_i [exp(r_i / alpha) / sum_j exp(r_j / alpha)] * log [exp(s_i) / sum_j exp(s_j)]

    With two responses and alpha towards 0 it is DPO. A group of ties draws its implicit rewards together.

    Args:
        beta: how hard the policy is held to the reference.
        alpha: temperature of the scores, in their units; towards 0 all weight is on the best.
    """
    s = beta * log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    together = same_group(group)
    values = (scores / alpha).to(s.dtype)
    target = (values - log_sum_exp(values, together)).exp()
    rank = -sum_per_group(target * (s - log_sum_exp(s, together)), group, groups)
    return rank.mean(), pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank, s)


def mpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    alpha: float = 0.0,
    deviation: Literal["absolute", "signed"] = "absolute",
) -> tuple[torch.Tensor, Metrics]:
    """MPO, multi-preference optimization, first called SWEPO (https://arxiv.org/abs/2412.04628): set against set.

        s_i = beta * log pi(y_i|x) / pi_ref(y_i|x)
        d_i = r_i - mean_j r_j             Y+ = {i: d_i > 0}
        w_i = exp(alpha |d_i|)             or exp(alpha d_i) with deviation signed
        L   = - log [sum_{i in Y+} w_i exp(s_i) / sum_i w_i exp(s_i)]

    alpha 0 is MPO itself, above 0 its weighted form. The weights that the paper describes grow with the distance from
    the mean on either side; where its authors repeat the loss (REFA, https://arxiv.org/abs/2412.16378, Eq. 5) they are
    the signed ones. With two responses and alpha 0 it is DPO. A group of ties has loss 0.

    Args:
        beta: how hard the policy is held to the reference.
        alpha: how much a response's distance from the mean counts, in 1 / the scores' units.
        deviation: which w.
    """
    s = beta * log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    d = deviations(scores, group)
    weighted = s + alpha * (d.abs() if deviation == "absolute" else d).to(s.dtype)
    together = same_group(group)
    good = together & (d > 0)
    has_good = good.any(dim=1)
    # Every response's row holds its group's loss: their mean is it.
    terms = log_sum_exp(weighted, together) - log_sum_exp(weighted, torch.where(has_good[:, None], good, together))
    rank = mean_per_group(terms, group, groups)
    return rank.mean(), pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank, s)
