"""CPO: contrastive preference optimization (https://arxiv.org/abs/2401.08417): DPO without its reference, plus NLL."""

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
from rrhf_peft.objectives.rewards import pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def cpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 1.0,
    sft_reduction: Literal["sum", "mean"] = "mean",
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The CPO loss, a mean over groups of

        L_prefer = - log sigma(beta * (log pi(y_w|x) - log pi(y_l|x)))     Eq. 3, mean over pairs with r_w > r_l
        L_NLL    = - log pi(y_best|x)
        L        = L_prefer + sft_weight * L_NLL                           the paper's objective has weight 1

    The paper writes L_NLL as a sum over tokens; its code and TRL's take the mean, the default here. TRL's `cpo_alpha`
    is `sft_weight`; its mean is over the tokens of all best responses of a batch, ours over each group's.

    Args:
        log_probs: log pi, per response, [N].
        scores: r, float [N], higher is better.
        reference: not used; CPO stands for a uniform reference policy.
        beta: Eq. 3.
        label_smoothing: share of pairs thought to be labelled the wrong way round, as in TRL.
        sft_weight: above.
        sft_reduction: sum or mean over the best response's tokens.
        tied_best: the first of several best responses, or the mean over them.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without a pair has L_prefer 0.
    """
    assert reference is None, "cpo has no reference policy"
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    h = beta * (log_probs.sum[chosen.better] - log_probs.sum[chosen.worse])
    pair_loss = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)  # Eq. 3
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    sft = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)
    loss = (rank + sft_weight * sft).mean()
    return loss, {"sft_loss": mean_of(sft), **pair_metrics(log_probs, scores, chosen, rank)}
