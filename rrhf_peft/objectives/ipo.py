"""IPO: identity preference optimization (https://arxiv.org/abs/2310.12036) over the ordered pairs of ranked groups."""

from __future__ import annotations

import torch

from rrhf_peft.objectives.groups import Pairs, mean_per_group, number_of_groups, ordered_pairs
from rrhf_peft.objectives.rewards import log_ratios, pair_metrics
from rrhf_peft.records import Metrics, ResponseLogProbs


def ipo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 0.1,
    average_log_prob: bool = True,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """The IPO loss, a mean over each group's pairs (y_w, y_l) with r_w > r_l, then over groups:

        h = log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)
        L = (h - 1 / (2 tau))^2                                                Eq. 17

    The paper writes sums over tokens. TRL divides each log-ratio by its response's length and reports that the authors'
    results were computed so; `average_log_prob` does that, and is the default here as there.

    Args:
        log_probs: log pi, per response, [N].
        scores: r, float [N], higher is better.
        reference: log pi_ref of the same responses, [N].
        beta: tau of Eq. 17.
        average_log_prob: log-ratios per token instead of sums over the response.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics, whose rewards are beta times the log-ratio summed over
        tokens, as in TRL. A group without a pair has loss 0.
    """
    ratios = log_ratios(log_probs, reference)
    values = ratios / log_probs.num_tokens if average_log_prob else ratios
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    h = values[chosen.better] - values[chosen.worse]
    pair_loss = (h - 1 / (2 * beta)) ** 2  # Eq. 17
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    return rank.mean(), pair_metrics(log_probs, scores, chosen, rank, beta * ratios)
