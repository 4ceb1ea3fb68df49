"""SimPO: simple preference optimization (https://arxiv.org/abs/2405.14734): mean log-probs, a margin, no reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import Pairs, mean_per_group, normalised, number_of_groups, ordered_pairs
from rrhf_peft.objectives.rewards import pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def simpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The SimPO loss, a mean over each group's pairs (y_w, y_l) with r_w > r_l, then over groups:

        r(x, y) = beta / |y| * log pi(y|x)                           Eq. 4
        L       = - log sigma(r(x, y_w) - r(x, y_l) - gamma)         Eq. 6

    With one pair per group this is TRL's CPOTrainer with `loss_type: simpo`, `simpo_gamma: gamma`, `cpo_alpha: 0`.

    Args:
        log_probs: log pi, per response, [N].
        scores: float [N], higher is better.
        reference: not used; SimPO has no reference policy.
        beta: Eq. 4; the paper takes 2.0 to 2.5.
        gamma: Eq. 6, the margin between two rewards; the paper takes 0.5 to 1.5.
        label_smoothing: share of pairs thought to be labelled the wrong way round, as in TRL.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs whose scores differ by more.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without a pair has loss 0.
    """
    assert reference is None, "simpo has no reference policy"
    rewards = beta * normalised(log_probs, log_probs.num_tokens, 1.0)  # Eq. 4
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    h = rewards[chosen.better] - rewards[chosen.worse] - gamma
    pair_loss = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)  # Eq. 6
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    return rank.mean(), pair_metrics(log_probs, scores, chosen, rank)
