"""Plackett-Luce: the likelihood of a whole ranking (DPO's appendix A.3, https://arxiv.org/abs/2305.18290; the
list-MLE loss of LiPO, https://arxiv.org/abs/2402.01878).
"""

from __future__ import annotations

import torch

from rrhf_peft.objectives.groups import number_of_groups, ordered_pairs, ranked_below, sum_per_group
from rrhf_peft.objectives.rewards import log_ratios, pair_metrics
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
    """Minus the log-likelihood of each group's order, a mean over groups of

        s(y) = beta / |y|^a * log pi(y|x) / pi_ref(y|x)         without a reference: beta / |y|^a * log pi(y|x)
        L    = - sum_i log [exp s(y_i) / sum_{j not above i} exp s(y_j)]          (DPO, appendix A.3)

    where i runs from the best response to the worst. DPO's own is beta 0.1, a = 0 with a reference. Two responses in a
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
