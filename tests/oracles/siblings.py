"""The sibling losses in float64, written as plain loops from the papers' formulas; no code shared with the package.

A group is (sums, reference sums, lengths, scores): lists of k numbers. Every function takes a list of groups.
"""

from __future__ import annotations

import math


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def ordered(scores, pairs="all", min_score_gap=0.0):
    found = []
    for w in range(len(scores)):
        for b in range(len(scores)):
            if scores[w] <= scores[b] or scores[w] - scores[b] <= min_score_gap:
                continue
            if pairs in ("best_worst", "best_vs_rest") and scores[w] < max(scores):
                continue
            if pairs == "best_worst" and scores[b] > min(scores):
                continue
            found.append((w, b))
    return found


def over_groups(groups, of_group):
    total = 0.0
    for group in groups:
        total += of_group(*group)
    return total / len(groups)


def over_pairs(scores, of_pair, pairs="all", min_score_gap=0.0):
    found = ordered(scores, pairs, min_score_gap)
    total = 0.0
    for winner, loser in found:
        total += of_pair(winner, loser)
    return total / len(found) if found else 0.0


def negative_log_likelihood(sums, lengths, scores, reduction="mean", tied_best="first"):
    best = [i for i in range(len(scores)) if scores[i] == max(scores)]
    if tied_best == "first":
        best = best[:1]
    return -sum(sums[i] / (lengths[i] if reduction == "mean" else 1) for i in best) / len(best)


def smoothed(h, label_smoothing):
    return -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)


def dpo(groups, beta=0.1, label_smoothing=0.0, **which):
    def of_group(sums, refs, lengths, scores):
        def of_pair(w, b):
            return smoothed(beta * ((sums[w] - refs[w]) - (sums[b] - refs[b])), label_smoothing)

        return over_pairs(scores, of_pair, **which)

    return over_groups(groups, of_group)


def ipo(groups, beta=0.1, average_log_prob=True, **which):
    def of_group(sums, refs, lengths, scores):
        def of_pair(w, b):
            better, worse = sums[w] - refs[w], sums[b] - refs[b]
            if average_log_prob:
                better, worse = better / lengths[w], worse / lengths[b]
            return (better - worse - 1 / (2 * beta)) ** 2

        return over_pairs(scores, of_pair, **which)

    return over_groups(groups, of_group)


def odpo(groups, beta=0.1, alpha=1.0, offset="log", **which):
    def of_group(sums, refs, lengths, scores):
        def of_pair(w, b):
            gap = scores[w] - scores[b]
            delta = alpha * math.log(gap) if offset == "log" else alpha * gap
            return -log_sigmoid(beta * (sums[w] - refs[w]) - beta * (sums[b] - refs[b]) - delta)

        return over_pairs(scores, of_pair, **which)

    return over_groups(groups, of_group)


def simpo(groups, beta=2.0, gamma=0.5, label_smoothing=0.0, **which):
    def of_group(sums, refs, lengths, scores):
        def of_pair(w, b):
            return smoothed(beta / lengths[w] * sums[w] - beta / lengths[b] * sums[b] - gamma, label_smoothing)

        return over_pairs(scores, of_pair, **which)

    return over_groups(groups, of_group)


def orpo(groups, beta=0.1, tied_best="first", **which):
    def of_group(sums, refs, lengths, scores):
        def odds(i):
            probability = math.exp(sums[i] / lengths[i])
            return probability / (1 - probability)

        def of_pair(w, b):
            return -math.log(1 / (1 + odds(b) / odds(w)))

        nll = negative_log_likelihood(sums, lengths, scores, "mean", tied_best)
        return nll + beta * over_pairs(scores, of_pair, **which)

    return over_groups(groups, of_group)


def cpo(groups, beta=0.1, label_smoothing=0.0, sft_weight=1.0, sft_reduction="mean", tied_best="first", **which):
    def of_group(sums, refs, lengths, scores):
        def of_pair(w, b):
            return smoothed(beta * (sums[w] - sums[b]), label_smoothing)

        nll = negative_log_likelihood(sums, lengths, scores, sft_reduction, tied_best)
        return over_pairs(scores, of_pair, **which) + sft_weight * nll

    return over_groups(groups, of_group)


def hinge(
    groups,
    beta=1.0,
    margin=1.0,
    length_penalty=0.0,
    sft_weight=1.0,
    sft_reduction="mean",
    tied_best="first",
    with_reference=False,
    **which,
):
    def of_group(sums, refs, lengths, scores):
        def value(i):
            return beta * (sums[i] - (refs[i] if with_reference else 0)) / lengths[i] ** length_penalty

        def of_pair(w, b):
            return max(0.0, margin - value(w) + value(b))

        nll = negative_log_likelihood(sums, lengths, scores, sft_reduction, tied_best)
        return over_pairs(scores, of_pair, **which) + sft_weight * nll

    return over_groups(groups, of_group)


def kto_reference_point(groups, choice="batch"):
    """z0 of every group."""
    if not isinstance(choice, str):
        return [choice for _ in groups]
    own = []
    for sums, refs, _, _ in groups:
        own.append(sum(s - r for s, r in zip(sums, refs, strict=True)) / len(sums))
    if choice == "group":
        return [max(0.0, value) for value in own]
    return [max(0.0, sum(own) / len(own)) for _ in groups]


def kto(
    groups,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    threshold="group_mean",
    reference_point="batch",
):
    total = 0.0
    points = kto_reference_point(groups, reference_point)
    for (sums, refs, _, scores), z0 in zip(groups, points, strict=True):
        losses = []
        for i in range(len(scores)):
            ratio = sums[i] - refs[i]
            if threshold == "group_mean":
                distance = len(scores) * scores[i] - sum(scores)  # scores of the tests are whole numbers
            else:
                distance = 1 if scores[i] >= threshold else -1
            if distance > 0:
                losses.append(desirable_weight * (1 - 1 / (1 + math.exp(-beta * (ratio - z0)))))
            elif distance < 0:
                losses.append(undesirable_weight * (1 - 1 / (1 + math.exp(-beta * (z0 - ratio)))))
        total += sum(losses) / len(losses) if losses else 0.0
    return total / len(groups)


def plackett_luce(groups, beta=1.0, length_penalty=1.0, top_k=None, with_reference=False):
    def of_group(sums, refs, lengths, scores):
        loss = 0.0
        for i in range(len(scores)):
            if top_k is not None and sum(other > scores[i] for other in scores) >= top_k:
                continue
            value = []
            for j in range(len(scores)):
                value.append(beta * (sums[j] - (refs[j] if with_reference else 0)) / lengths[j] ** length_penalty)
            mass = math.exp(value[i] - value[i])
            for j in range(len(scores)):
                if scores[j] < scores[i]:
                    mass += math.exp(value[j] - value[i])
            loss += math.log(mass)
        return loss

    return over_groups(groups, of_group)


def pro(groups, temperature="score_gap", sft_weight=0.05, sft_reduction="sum", tied_best="first"):
    def of_group(sums, refs, lengths, scores):
        loss, k = 0.0, len(scores)
        for i in range(k):
            lower = [j for j in range(k) if scores[j] < scores[i]]
            if not lower:
                continue
            sharpness = {j: scores[i] - scores[j] if temperature == "score_gap" else 1.0 for j in lower}
            own = sums[i] / lengths[i] * max(sharpness.values())
            mass = 1.0
            for j in lower:
                mass += math.exp(sums[j] / lengths[j] * sharpness[j] - own)
            loss += math.log(mass)
        nll = negative_log_likelihood(sums, lengths, scores, sft_reduction, tied_best)
        return loss + sft_weight * (k - 1) ** 2 * nll

    return over_groups(groups, of_group)
