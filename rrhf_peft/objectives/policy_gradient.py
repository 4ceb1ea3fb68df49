"""Policy gradients from a group of the policy's own responses, for online training: RLOO and GRPO.

Each response's advantage comes from the scores of its group, and its loss is clipped where the policy has moved too far
from the one that sampled. A loss is the mean over a group's responses and then over groups. What they share:

    log_probs      log pi, per response, [N], at temperature 1 whatever the decoding's
    scores         r, float [N], higher is better; a KL penalty is in them (`online.kl_coefficient`)
    reference      log pi_old of the same responses [N]: of the policy that sampled them
    epsilon        the ratio counts between 1 - epsilon and 1 + epsilon_high
    epsilon_high   None is epsilon
    returns        the loss (scalar, differentiable) and the metrics; `clip_ratio` is the share of responses whose
                   gradient is cut off
"""

from __future__ import annotations

from typing import Literal

import torch

from rrhf_peft.objectives.groups import (
    deviations,
    log_ratios,
    mean_of,
    mean_per_group,
    number_of_groups,
    ordered_pairs,
    pair_metrics,
    sum_per_group,
)
from rrhf_peft.records import Metrics, ResponseLogProbs


def rloo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """RLOO, REINFORCE with a leave-one-out baseline (https://arxiv.org/abs/2402.14740).

        A_i = r_i - 1 / (k - 1) sum_{j != i} r_j
        w_i = pi(y_i|x) / pi_old(y_i|x)                                    1 while the policy is the one that sampled
        L   = - min(w_i A_i, clip(w_i, 1 - epsilon, 1 + epsilon_high) A_i)

    as TRL's RLOOTrainer has it, which clips the ratio of whole responses.
    """
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    size = sum_per_group(torch.ones_like(scores), group, groups)
    advantages = deviations(scores, group) * (size / (size - 1).clamp(min=1))[group]
    return _clipped(log_probs, scores, log_ratios(log_probs, reference), advantages, epsilon, epsilon_high)


def grpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    scale_rewards: Literal["group", "none"] = "group",
) -> tuple[torch.Tensor, Metrics]:
    """GRPO, group relative policy optimization (https://arxiv.org/abs/2402.03300), with the ratio of GSPO.

        A_i = (r_i - mean r) / (std r + 1e-4)               std with k - 1; scale_rewards none leaves the division out
        w_i = (pi(y_i|x) / pi_old(y_i|x))^(1 / |y_i|)       https://arxiv.org/abs/2507.18071, Eq. 7
        L   = - min(w_i A_i, clip(w_i, 1 - epsilon, 1 + epsilon_high) A_i)

    TRL's GRPOTrainer with `loss_type: grpo`, `importance_sampling_level: sequence` and `beta: 0`. A ratio per token
    (GRPO's own) has the same gradient, 1 / |y_i| of every token's, as long as the policy is the one that sampled:
    with `online.every: 1`.

    Args:
        scale_rewards: whether advantages are divided by the group's standard deviation; none is Dr. GRPO's.
    """
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    advantages = deviations(scores, group)
    if scale_rewards == "group":
        size = sum_per_group(torch.ones_like(scores), group, groups)
        variance = sum_per_group(advantages**2, group, groups) / (size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)[group]
    log_weights = log_ratios(log_probs, reference) / log_probs.num_tokens
    return _clipped(log_probs, scores, log_weights, advantages, epsilon, epsilon_high)


def _clipped(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    log_weights: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float | None,
) -> tuple[torch.Tensor, Metrics]:
    """PPO's clipped loss (https://arxiv.org/abs/1707.06347, Eq. 7) of responses with log-weights and advantages [N]."""
    group = log_probs.group
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    weights, advantages = log_weights.exp(), advantages.to(log_weights.dtype)
    losses = -torch.minimum(weights * advantages, weights.clamp(low, high) * advantages)
    rank = mean_per_group(losses, group, number_of_groups(group))
    cut = ((weights < low) & (advantages < 0)) | ((weights > high) & (advantages > 0))
    metrics = pair_metrics(log_probs, scores, ordered_pairs(scores, group), rank)
    return rank.mean(), {**metrics, "clip_ratio": mean_of(cut)}
