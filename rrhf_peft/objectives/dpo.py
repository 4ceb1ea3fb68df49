"""DPO: direct preference optimization (https://arxiv.org/abs/2305.18290) over the ordered pairs of ranked groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import Pairs, mean_per_group, number_of_groups, ordered_pairs
from rrhf_peft.objectives.rewards import log_ratios, pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def dpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The DPO loss, a mean over each group's pairs (y_w, y_l) with r_w > r_l, then over groups:

        h = beta * (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x))
        L = - log sigma(h)                                                                  Eq. 7
        L = - (1 - e) log sigma(h) - e log sigma(-h)                 with smoothed labels (cDPO)

    With one pair per group this is TRL's `loss_type: sigmoid`.

    Args:
        log_probs: log pi, per response, [N].
        scores: r, float [N], higher is better.
        reference: log pi_ref of the same responses, [N].
        beta: Eq. 7; how hard the policy is held to the reference.
        label_smoothing: e, the share of pairs that are thought to be labelled the wrong way round.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without a pair has loss 0.
    """
    rewards = beta * log_ratios(log_probs, reference)
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    h = rewards[chosen.better] - rewards[chosen.worse]
    pair_loss = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)  # Eq. 7
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    return rank.mean(), pair_metrics(log_probs, scores, chosen, rank, rewards)
