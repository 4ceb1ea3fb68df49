"""Losses over the ordered pairs of ranked groups: DPO and its relatives.

All have one shape, `over_pairs`: a value s of each response, a loss of the difference of two values, its mean over a
group's pairs and then over groups, for some a weighted fine-tuning loss beside it. What a loss adds is s and the loss
of a pair. What they share:

    log_probs        log pi, per response, [N]
    scores           r, float [N], higher is better; a pair (y_w, y_l) is two responses of a group with r_w > r_l
    reference        log pi_ref of the same responses [N], or None where there is none
    pairs            which ordered pairs of a group
    min_score_gap    only pairs with r_w - r_l above it
    label_smoothing  share of pairs thought to be labelled the wrong way round, as in TRL
    tied_best        the first of several best responses, or the mean over them
    returns          the loss (scalar, differentiable) and the metrics; a group without a pair has a pair loss of 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from rrhf_peft.objectives.groups import (
    Pairs,
    best_negative_log_prob,
    log_ratios,
    mean_of,
    mean_per_group,
    normalised,
    number_of_groups,
    ordered_pairs,
    pair_metrics,
)
from rrhf_peft.records import Metrics, ResponseLogProbs

#: What every objective returns: the loss (scalar, differentiable) and the metrics.
Loss = tuple[torch.Tensor, Metrics]


def over_pairs(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    s: torch.Tensor,
    pair_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    pairs: Pairs,
    min_score_gap: float,
    rewards: torch.Tensor | None = None,
    rank_weight: float = 1.0,
    sft: torch.Tensor | None = None,
    sft_weight: float = 1.0,
) -> Loss:
    """The shape of every loss here: mean over groups of rank_weight * (mean over pairs) + sft_weight * sft.

    Args:
        log_probs, scores, pairs, min_score_gap: as above.
        s: what is compared, [N].
        pair_loss: (s_w - s_l, r_w - r_l), both [M] over all pairs, to a loss of each pair [M].
        rewards: the implicit reward [N] that metrics report; None without a reference.
        rank_weight, sft_weight: weights of the two parts.
        sft: the fine-tuning loss of each group [G], or None.
    """
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    h = s[chosen.better] - s[chosen.worse]
    losses = pair_loss(h, (scores[chosen.better] - scores[chosen.worse]).to(h.dtype))
    rank = mean_per_group(losses, chosen.group, number_of_groups(log_probs.group))
    metrics = pair_metrics(log_probs, scores, chosen, rank, rewards)
    if sft is None:
        return rank.mean(), metrics
    return (rank_weight * rank + sft_weight * sft).mean(), {"sft_loss": mean_of(sft), **metrics}


def _logistic(label_smoothing: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """- (1 - e) log sigma(h) - e log sigma(-h)."""
    return lambda h, gap: -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def dpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """DPO, direct preference optimization (https://arxiv.org/abs/2305.18290).

        h = beta * (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x))
        L = - log sigma(h)                                                                  Eq. 7
        L = - (1 - e) log sigma(h) - e log sigma(-h)                 with smoothed labels (cDPO)

    With one pair per group this is TRL's `loss_type: sigmoid`.

    Args:
        beta: Eq. 7; how hard the policy is held to the reference.
        label_smoothing: e.
    """
    s = beta * log_ratios(log_probs, reference)
    return over_pairs(
        log_probs, scores, s, _logistic(label_smoothing), pairs=pairs, min_score_gap=min_score_gap, rewards=s
    )  # Eq. 7


def ipo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    average_log_prob: bool = True,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """IPO, identity preference optimization (https://arxiv.org/abs/2310.12036).

        h = log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)
        L = (h - 1 / (2 tau))^2                                                Eq. 17

    The paper writes sums over tokens. TRL divides each log-ratio by its response's length and reports that the authors'
    results were computed so; `average_log_prob` does that, and is the default here as there. The metrics' rewards are
    beta times the log-ratio summed over tokens, as in TRL.

    Args:
        beta: tau of Eq. 17.
        average_log_prob: log-ratios per token instead of sums over the response.
    """
    ratios = log_ratios(log_probs, reference)
    s = ratios / log_probs.num_tokens if average_log_prob else ratios
    return over_pairs(
        log_probs,
        scores,
        s,
        lambda h, gap: (h - 1 / (2 * beta)) ** 2,  # Eq. 17
        pairs=pairs,
        min_score_gap=min_score_gap,
        rewards=beta * ratios,
    )


def odpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    alpha: float = 1.0,
    offset: Literal["log", "linear"] = "log",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """ODPO, DPO with an offset that grows with a pair's difference in score (https://arxiv.org/abs/2402.10571).

    Section 4 of the paper:

        h     = beta * (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x))
        Delta = alpha * f(r_w - r_l)                   f = log, or the identity
        L     = - log sigma(h - Delta)

    With f = log a score gap below 1 makes a negative offset: such a pair may even be the wrong way round by that much.
    alpha = 0 is DPO.

    Args:
        beta: as in DPO.
        alpha: how much the score gap counts.
        offset: f above.
    """
    s = beta * log_ratios(log_probs, reference)
    return over_pairs(
        log_probs,
        scores,
        s,
        lambda h, gap: -F.logsigmoid(h - alpha * (gap.log() if offset == "log" else gap)),
        pairs=pairs,
        min_score_gap=min_score_gap,
        rewards=s,
    )


def rpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    eta: float = 1.0,
    distance: Literal["squared", "backward_kl", "forward_kl"] = "backward_kl",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """RPO, reward-aware preference optimization (https://arxiv.org/abs/2502.00203), and REBEL.

    The implicit reward's difference is drawn to the scores', whatever its size:

        h = beta * (log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x))       p = sigma(h)
        g = eta * (r_w - r_l)                                                            q = sigma(g)
        L = (h - g)^2                                                squared
        L = q log (q / p) + (1 - q) log ((1 - q) / (1 - p))          backward_kl
        L = p log (p / q) + (1 - p) log ((1 - p) / (1 - q))          forward_kl

    as the authors' NeMo-Aligner has them (`rpo_sq`, `rpo_bwd_kl`, `rpo_fwd_kl`; `eta` is its gt_reward_scale).
    "squared" with eta 1 is REBEL (https://arxiv.org/abs/2404.16767), beta its 1 / eta and the reference the policy of
    the iteration before.

    Args:
        beta: how hard the policy is held to the reference.
        eta: scale of the scores.
        distance: which L.
    """

    def pair_loss(h: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        g = eta * gap
        if distance == "squared":
            return (h - g) ** 2
        of, against = (g, h) if distance == "backward_kl" else (h, g)
        wins = torch.sigmoid(of) * (F.logsigmoid(of) - F.logsigmoid(against))
        return wins + torch.sigmoid(-of) * (F.logsigmoid(-of) - F.logsigmoid(-against))

    s = beta * log_ratios(log_probs, reference)
    return over_pairs(log_probs, scores, s, pair_loss, pairs=pairs, min_score_gap=min_score_gap, rewards=s)


def simpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """SimPO, simple preference optimization (https://arxiv.org/abs/2405.14734): mean log-probs, a margin, no reference.

        r(x, y) = beta / |y| * log pi(y|x)                           Eq. 4
        L       = - log sigma(r(x, y_w) - r(x, y_l) - gamma)         Eq. 6

    With one pair per group this is TRL's CPOTrainer with `loss_type: simpo`, `simpo_gamma: gamma`, `cpo_alpha: 0`.

    Args:
        beta: Eq. 4; the paper takes 2.0 to 2.5.
        gamma: Eq. 6, the margin between two rewards; the paper takes 0.5 to 1.5.
    """
    assert reference is None, "simpo has no reference policy"
    s = beta * normalised(log_probs, log_probs.num_tokens, 1.0)  # Eq. 4
    logistic = _logistic(label_smoothing)
    return over_pairs(
        log_probs, scores, s, lambda h, gap: logistic(h - gamma, gap), pairs=pairs, min_score_gap=min_score_gap
    )  # Eq. 6


def orpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    beta: float = 0.1,
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """ORPO, odds ratio preference optimization (https://arxiv.org/abs/2403.07691): fine-tuning with a relative penalty.

        log P(y|x) = 1/|y| sum_t log pi(y_t | x, y_<t)                          Eq. 1
        odds(y|x)  = P(y|x) / (1 - P(y|x))                                      Eq. 4
        L_OR       = - log sigma(log odds(y_w|x) / odds(y_l|x))                 Eq. 7
        L_SFT      = - 1/|y| sum_t log pi(y_t | ...)  of the best response
        L          = L_SFT + lambda * L_OR                                      Eq. 6

    TRL's ORPOTrainer takes L_SFT over the prompt's tokens as well; here, as in all other objectives, only the response
    is learnt. The odds of a response whose probability rounds to 1 are held at the largest that its type can tell.

    Args:
        beta: lambda of Eq. 6, under TRL's name.
    """
    assert reference is None, "orpo has no reference policy"
    p = normalised(log_probs, log_probs.num_tokens, 1.0)  # Eq. 1
    certain = torch.finfo(p.dtype).eps  # 1 - exp(p) must not be 0
    log_odds = p - torch.log(-torch.expm1(p.clamp(max=-certain)))  # Eq. 4
    sft = best_negative_log_prob(log_probs, scores, "mean", tied_best)
    return over_pairs(
        log_probs,
        scores,
        log_odds,
        _logistic(0.0),  # Eq. 7
        pairs=pairs,
        min_score_gap=min_score_gap,
        rank_weight=beta,
        sft=sft,
    )  # Eq. 6


def cpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 1.0,
    sft_reduction: Literal["sum", "mean"] = "mean",
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """CPO, contrastive preference optimization (https://arxiv.org/abs/2401.08417): DPO without its reference, plus NLL.

        L_prefer = - log sigma(beta * (log pi(y_w|x) - log pi(y_l|x)))     Eq. 3
        L_NLL    = - log pi(y_best|x)
        L        = L_prefer + sft_weight * L_NLL                           the paper's objective has weight 1

    The reference is thought to be uniform. The paper writes L_NLL as a sum over tokens; its code and TRL's take the
    mean, the default here. TRL's `cpo_alpha` is `sft_weight`; its mean is over the tokens of all best responses of a
    batch, ours over each group's.

    Args:
        beta: Eq. 3.
        sft_weight: above.
        sft_reduction: sum or mean over the best response's tokens.
    """
    assert reference is None, "cpo has no reference policy"
    return over_pairs(
        log_probs,
        scores,
        beta * log_probs.sum,
        _logistic(label_smoothing),  # Eq. 3
        pairs=pairs,
        min_score_gap=min_score_gap,
        sft=best_negative_log_prob(log_probs, scores, sft_reduction, tied_best),
        sft_weight=sft_weight,
    )


def hinge(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs | None = None,
    beta: float = 1.0,
    margin: float = 1.0,
    length_penalty: float = 0.0,
    sft_weight: float = 1.0,
    sft_reduction: Literal["sum", "mean"] = "mean",
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> Loss:
    """SLiC-HF, sequence likelihood calibration with a margin (https://arxiv.org/abs/2305.10425), and DPO's hinge form.

    With rank calibration and cross-entropy regularisation:

        s(y)  = beta / |y|^a * log pi(y|x)                      a = 0, beta = 1 in the paper
        L_cal = max(0, delta - s(y_w) + s(y_l))
        L_reg = - log pi(y_best|x)
        L     = L_cal + lambda * L_reg                          the paper's calibration loss (its section 3)

    With a reference, s(y) = beta / |y|^a * log pi(y|x) / pi_ref(y|x). TRL's DPOTrainer with `loss_type: hinge` is that
    with margin 1 and sft_weight 0; its CPOTrainer with `loss_type: hinge` is the first form, with sft_weight
    `cpo_alpha`. The metric `active_pairs` is the share of pairs within the margin.

    Args:
        beta: scales s; 1 / beta is the margin in log-probs when `margin` is 1.
        margin: delta.
        length_penalty: a; 1 compares log-probs per token.
        sft_weight: lambda.
        sft_reduction: sum (as the paper writes it) or mean over the best response's tokens.
    """
    values = log_probs.sum if reference is None else log_ratios(log_probs, reference)
    s = beta * values / log_probs.num_tokens.to(values.dtype) ** length_penalty
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    loss, metrics = over_pairs(
        log_probs,
        scores,
        s,
        lambda h, gap: F.relu(margin - h),
        pairs=pairs,
        min_score_gap=min_score_gap,
        rewards=None if reference is None else s,
        sft=best_negative_log_prob(log_probs, scores, sft_reduction, tied_best),
        sft_weight=sft_weight,
    )
    return loss, {**metrics, "active_pairs": mean_of(s[chosen.better] - s[chosen.worse] < margin)}
