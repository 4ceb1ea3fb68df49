"""Losses over the ordered pairs of ranked groups: DPO and its relatives; and KTO, which labels single responses."""

from __future__ import annotations

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


def dpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """DPO, direct preference optimization (https://arxiv.org/abs/2305.18290).

    A mean over each group's pairs (y_w, y_l) with r_w > r_l, then over groups:

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
    pair_loss = _smoothed(h, label_smoothing)  # Eq. 7
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    return rank.mean(), pair_metrics(log_probs, scores, chosen, rank, rewards)


def _smoothed(h: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """- (1 - e) log sigma(h) - e log sigma(-h)."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def ipo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    average_log_prob: bool = True,
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """IPO, identity preference optimization (https://arxiv.org/abs/2310.12036).

    A mean over each group's pairs (y_w, y_l) with r_w > r_l, then over groups:

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
) -> tuple[torch.Tensor, Metrics]:
    """ODPO, DPO with an offset that grows with a pair's difference in score (https://arxiv.org/abs/2402.10571).

    Section 4 of the paper, a mean over each group's pairs with r_w > r_l, then over groups:

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
) -> tuple[torch.Tensor, Metrics]:
    """SimPO, simple preference optimization (https://arxiv.org/abs/2405.14734): mean log-probs, a margin, no reference.

    A mean over each group's pairs (y_w, y_l) with r_w > r_l, then over groups:

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
    pair_loss = _smoothed(h, label_smoothing)  # Eq. 6
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    return rank.mean(), pair_metrics(log_probs, scores, chosen, rank)


def orpo(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: None = None,
    beta: float = 0.1,
    tied_best: Literal["first", "mean"] = "first",
    pairs: Pairs = "all",
    min_score_gap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """ORPO, odds ratio preference optimization (https://arxiv.org/abs/2403.07691): fine-tuning with a relative penalty.

    A mean over groups of

        log P(y|x) = 1/|y| sum_t log pi(y_t | x, y_<t)                          Eq. 1
        odds(y|x)  = P(y|x) / (1 - P(y|x))                                      Eq. 4
        L_OR       = - log sigma(log odds(y_w|x) / odds(y_l|x))                 Eq. 7, mean over pairs with r_w > r_l
        L_SFT      = - 1/|y| sum_t log pi(y_t | ...)  of the best response
        L          = L_SFT + lambda * L_OR                                      Eq. 6

    TRL's ORPOTrainer takes L_SFT over the prompt's tokens as well; here, as in all other objectives, only the response
    is learnt.

    Args:
        log_probs: per response, [N].
        scores: r, float [N], higher is better.
        reference: not used; ORPO has no reference policy.
        beta: lambda of Eq. 6, under TRL's name.
        tied_best: the first of several best responses, or the mean over them.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics. A group without a pair has L_OR = 0. The odds of a response
        whose probability rounds to 1 are held at the largest that its type can tell.
    """
    assert reference is None, "orpo has no reference policy"
    p = normalised(log_probs, log_probs.num_tokens, 1.0)  # Eq. 1
    certain = torch.finfo(p.dtype).eps  # 1 - exp(p) must not be 0
    log_odds = p - torch.log(-torch.expm1(p.clamp(max=-certain)))  # Eq. 4
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    pair_loss = -F.logsigmoid(log_odds[chosen.better] - log_odds[chosen.worse])  # Eq. 7
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    sft = best_negative_log_prob(log_probs, scores, "mean", tied_best)
    loss = (sft + beta * rank).mean()  # Eq. 6
    return loss, {"sft_loss": mean_of(sft), **pair_metrics(log_probs, scores, chosen, rank)}


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
) -> tuple[torch.Tensor, Metrics]:
    """CPO, contrastive preference optimization (https://arxiv.org/abs/2401.08417): DPO without its reference, plus NLL.

    A mean over groups of

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
    pair_loss = _smoothed(h, label_smoothing)  # Eq. 3
    rank = mean_per_group(pair_loss, chosen.group, number_of_groups(log_probs.group))
    sft = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)
    loss = (rank + sft_weight * sft).mean()
    return loss, {"sft_loss": mean_of(sft), **pair_metrics(log_probs, scores, chosen, rank)}


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
) -> tuple[torch.Tensor, Metrics]:
    """SLiC-HF, sequence likelihood calibration with a margin (https://arxiv.org/abs/2305.10425), and DPO's hinge form.

    With rank calibration and cross-entropy regularisation, a mean over groups of

        s(y)  = beta / |y|^a * log pi(y|x)                      a = 0, beta = 1 in the paper
        L_cal = max(0, delta - s(y_w) + s(y_l))                 mean over the group's pairs with r_w > r_l
        L_reg = - log pi(y_best|x)
        L     = L_cal + lambda * L_reg                          the paper's calibration loss (its section 3)

    With a reference, s(y) = beta / |y|^a * log pi(y|x) / pi_ref(y|x). TRL's DPOTrainer with `loss_type: hinge` is that
    with margin 1 and sft_weight 0; its CPOTrainer with `loss_type: hinge` is the first form, with sft_weight
    `cpo_alpha`.

    Args:
        log_probs: log pi, per response, [N].
        scores: r, float [N], higher is better.
        reference: log pi_ref of the same responses [N], or None.
        beta: scales s; 1 / beta is the margin in log-probs when `margin` is 1.
        margin: delta.
        length_penalty: a; 1 compares log-probs per token.
        sft_weight: lambda.
        sft_reduction: sum (as the paper writes it) or mean over the best response's tokens.
        tied_best: the first of several best responses, or the mean over them.
        pairs: which ordered pairs of a group.
        min_score_gap: only pairs with r_w - r_l above it.

    Returns:
        The loss (scalar, differentiable) and the metrics; `active_pairs` is the share of pairs within the margin. A
        group without a pair has L_cal 0.
    """
    values = log_probs.sum if reference is None else log_ratios(log_probs, reference)
    s = beta * values / log_probs.num_tokens.to(values.dtype) ** length_penalty
    chosen = ordered_pairs(scores, log_probs.group, min_score_gap, pairs)
    difference = margin - s[chosen.better] + s[chosen.worse]
    rank = mean_per_group(F.relu(difference), chosen.group, number_of_groups(log_probs.group))
    sft = best_negative_log_prob(log_probs, scores, sft_reduction, tied_best)
    loss = (rank + sft_weight * sft).mean()
    return loss, {
        "sft_loss": mean_of(sft),
        **pair_metrics(log_probs, scores, chosen, rank, None if reference is None else s),
        "active_pairs": mean_of(difference > 0),
    }


def kto(
    log_probs: ResponseLogProbs,
    scores: torch.Tensor,
    *,
    reference: ResponseLogProbs,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: Literal["group_mean"] | float = "group_mean",
    reference_point: Literal["batch", "group"] | float = "batch",
) -> tuple[torch.Tensor, Metrics]:
    """KTO, model alignment as prospect theoretic optimization (https://arxiv.org/abs/2402.01306).

    Learns from single responses, desirable or not, rather than from pairs: a mean over each group's responses, then
    over groups:

        r(x, y) = log pi(y|x) / pi_ref(y|x)
        z0      = max(0, estimate of KL(pi || pi_ref))                        no gradient
        L(y)    = lambda_D * (1 - sigma(beta * (r(x, y) - z0)))               y desirable
        L(y)    = lambda_U * (1 - sigma(beta * (z0 - r(x, y))))               y undesirable, Eq. 7

    Which is which: the scores above the threshold are desirable, those below it not. On a number as threshold, a
    response is desirable; on its group's mean it teaches nothing, so that a group of ties has loss 0.

    The reference point z0. The paper and TRL estimate the KL from mismatched pairs, each prompt with the response to
    another, which costs two more forward passes. Here z0 is the mean log-ratio of the responses themselves: "batch"
    averages each group's and then the groups of the micro-batch on this process, so z0 is the same for all of them and
    depends on how groups are batched; "group" takes each group's mean, which does not depend on the batch. Both
    follow the trained responses, so they lie above TRL's when mostly desirable responses gain probability and below it
    (down to 0) when mostly undesirable ones lose it. A number fixes z0; 0 is TRL's `apo_zero_unpaired`.

    Args:
        log_probs: log pi, per response, [N].
        scores: float [N], higher is better.
        reference: log pi_ref of the same responses, [N].
        beta: Eq. 7.
        desirable_weight, undesirable_weight: lambda_D, lambda_U.
        threshold: a number in the scores' units, or each group's mean score.
        reference_point: z0 as above; in nats when it is a number.

    Returns:
        The loss (scalar, differentiable) and the metrics: `kl` is z0, and `rewards/...` are means over ordered pairs.
    """
    ratios = log_ratios(log_probs, reference)
    group, groups = log_probs.group, number_of_groups(log_probs.group)
    desirable, undesirable = _labels(scores, group, groups, threshold)
    counted = desirable | undesirable
    z0 = _reference_point(ratios.detach(), group, groups, reference_point)  # [G]

    distance = beta * (ratios - z0[group])
    good, bad = desirable.to(distance.dtype), undesirable.to(distance.dtype)
    weight = desirable_weight * good + undesirable_weight * bad
    losses = weight * (1 - torch.sigmoid((good - bad) * distance))  # Eq. 7
    rank = mean_per_group(losses[counted], group[counted], groups)
    pairs = ordered_pairs(scores, group)
    return rank.mean(), {
        **pair_metrics(log_probs, scores, pairs, rank, beta * ratios),
        "kl": mean_of(z0),
        "desirable": mean_of(desirable[counted]),
    }


def _labels(
    scores: torch.Tensor, group: torch.Tensor, groups: int, threshold: Literal["group_mean"] | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(desirable, undesirable), bool [N] each."""
    if threshold != "group_mean":
        return scores >= threshold, scores < threshold
    distance = scores - mean_per_group(scores, group, groups)[group]
    on_it = 1e-9 * mean_per_group(scores.abs(), group, groups)[group]  # as near, it is rounding
    return distance > on_it, distance < -on_it


def _reference_point(
    ratios: torch.Tensor, group: torch.Tensor, groups: int, choice: Literal["batch", "group"] | float
) -> torch.Tensor:
    """z0 of each group, [G]."""
    mean = mean_per_group(ratios, group, groups)
    if choice == "group":
        return mean.clamp(min=0)
    if choice == "batch":
        return mean.mean().clamp(min=0).expand(groups)
    return mean.new_full((groups,), choice)
