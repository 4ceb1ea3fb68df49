"""What the objectives with a reference policy share: the implicit reward, and its metrics under TRL's names."""

from __future__ import annotations

import torch

from rrhf_peft.objectives.groups import OrderedPairs, mean_of, normalised, ordered_pairs, ranking_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def log_ratios(log_probs: ResponseLogProbs, reference: ResponseLogProbs | None) -> torch.Tensor:
    """log pi(y|x) - log pi_ref(y|x) of every response [N], in nats; no gradient reaches the reference."""
    assert reference is not None, "this objective compares with a reference policy"
    assert reference.sum.shape == log_probs.sum.shape, "the reference scored other responses"
    return log_probs.sum - reference.sum.detach().to(log_probs.sum.dtype)


def pair_metrics(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    pairs: OrderedPairs,
    rank: torch.Tensor,
    rewards: torch.Tensor | None = None,
) -> Metrics:
    """What every sibling objective logs.

    Args:
        log_probs: per response, [N].
        scores: float [N].
        pairs: the M ordered pairs that the objective learns from; `rewards/...` are means over them, as in TRL.
        rank: the ranking loss of each group [G].
        rewards: the implicit reward [N] of an objective with a reference; None without one.

    Returns:
        `rank_loss`, pair accuracy of the mean log-prob per token over all ordered pairs of a group (the same for all
        objectives, so that runs can be compared), best-of-k hit rate, and `rewards/chosen`, `rewards/rejected`,
        `rewards/margins`, `rewards/accuracies`.
    """
    p = normalised(log_probs, log_probs.num_tokens, 1.0).detach()
    metrics = {
        "rank_loss": mean_of(rank),
        **ranking_metrics(p, scores, log_probs.group, ordered_pairs(scores, log_probs.group)),
    }
    if rewards is not None:
        chosen, rejected = rewards.detach()[pairs.better], rewards.detach()[pairs.worse]
        metrics |= {
            "rewards/chosen": mean_of(chosen),
            "rewards/rejected": mean_of(rejected),
            "rewards/margins": mean_of(chosen - rejected),
            "rewards/accuracies": mean_of(chosen > rejected),
        }
    return metrics
