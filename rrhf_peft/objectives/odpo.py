"""ODPO: DPO with an offset (https://arxiv.org/abs/2402.10571): a pair's margin grows with its difference in score."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import Pairs, mean_per_group, number_of_groups, ordered_pairs
from rrhf_peft.objectives.rewards import log_ratios, pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def odpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    offset: Literal["log", "linear"] = "log",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The ODPO loss (section 4 of the paper), a mean over each group's pairs with r_w > r_l, then over groups:

        h     = beta * (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x))
        Delta = alpha * f(r_w - r_l)                   f = log, or the identity
        L     = - log sigma(h - Delta)

    With f = log a score gap below 1 makes a negative offset: such a pair may even be the wrong way round by that much.
    alpha = 0 is DPO.

    Args:
        log_probs: log pi, per response, [N].
        scores: r, float [N], higher is better.
        reference: log pi_ref of the same responses, [N].
        beta: as in DPO.
        alpha: how much the score gap counts.
        offset: f above.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without a pair has loss 0.
    """
    rewards = beta * log_ratios(log_probs, reference)
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    gap = scores[chosen.better] - scores[chosen.worse]
    delta = alpha * (gap.log() if offset == "log" else gap)
    h = rewards[chosen.better] - rewards[chosen.worse]
    pair_loss = -F.logsigmoid(h - delta.to(h.dtype))
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    return rank.mean(), pair_metrics(log_probs, scores, chosen, rank, rewards)
