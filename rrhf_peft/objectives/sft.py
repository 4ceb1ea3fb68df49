"""Fine-tuning on the best-scored response: RRHF's Eq. 3 and 4 alone, and the baseline to beat."""

from __future__ import annotations

from typing import Literal

import torch

from rrhf_peft.objectives.groups import (
    best_negative_log_prob,
    mean_of,
    normalised,
    ordered_pairs,
    ranking_metrics,
)
from rrhf_peft.records import Metrics, ResponseLogProbs


def sft(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
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
