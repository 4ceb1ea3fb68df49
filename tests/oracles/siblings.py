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


def log_ratios(sums, refs, beta):
    return [beta * (a - b) for a, b in zip(sums, refs, strict=True)]


def softmax(values):
    top = max(values)
    masses = [math.exp(value - top) for value in values]
    return [mass / sum(masses) for mass in masses]


def lipo_lambda(groups, beta=0.1):
    def of_group(sums, refs, lengths, scores):
        s, k = log_ratios(sums, refs, beta), len(scores)
        order = sorted(range(k), key=lambda i: (-s[i], -scores[i]))
        tau = {i: 1 + position for position, i in enumerate(order)}
        for i in range(k):  # those that nothing tells apart share the mean of their ranks
            alike = [1 + order.index(j) for j in range(k) if s[j] == s[i] and scores[j] == scores[i]]
            tau[i] = sum(alike) / len(alike)
        loss = 0.0
        for i in range(k):
            for j in range(k):
                if scores[i] > scores[j]:
                    gain = abs((2 ** scores[i] - 1) - (2 ** scores[j] - 1))
                    discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
                    loss += gain * discount * math.log(1 + math.exp(-(s[i] - s[j])))
        return loss

    return over_groups(groups, of_group)


def info_nca(groups, beta=0.1, alpha=1.0):
    def of_group(sums, refs, lengths, scores):
        target, model = softmax([r / alpha for r in scores]), softmax(log_ratios(sums, refs, beta))
        return -sum(t * math.log(p) for t, p in zip(target, model, strict=True))

    return over_groups(groups, of_group)


def nca(groups, beta=0.1, alpha=1.0):
    def of_group(sums, refs, lengths, scores):
        target, s = softmax([r / alpha for r in scores]), log_ratios(sums, refs, beta)
        loss = 0.0
        for i in range(len(s)):
            loss -= target[i] * log_sigmoid(s[i]) + log_sigmoid(-s[i]) / len(s)
        return loss

    return over_groups(groups, of_group)


def mpo(groups, beta=0.1, alpha=0.0, deviation="absolute"):
    def of_group(sums, refs, lengths, scores):
        s, mean = log_ratios(sums, refs, beta), sum(scores) / len(scores)
        above, everything = 0.0, 0.0
        for i in range(len(s)):
            distance = abs(scores[i] - mean) if deviation == "absolute" else scores[i] - mean
            mass = math.exp(s[i] + alpha * distance)
            everything += mass
            if len(scores) * scores[i] > sum(scores):  # scores of the tests are whole numbers
                above += mass
        return -math.log(above / everything) if above else 0.0

    return over_groups(groups, of_group)


def rpo(groups, beta=0.1, eta=1.0, distance="backward_kl", **which):
    def of_group(sums, refs, lengths, scores):
        s = log_ratios(sums, refs, beta)

        def of_pair(w, b):
            h, g = s[w] - s[b], eta * (scores[w] - scores[b])
            if distance == "squared":
                return (h - g) ** 2
            p, q = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(-g))
            if distance == "forward_kl":
                p, q = q, p
            return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))

        return over_pairs(scores, of_pair, **which)

    return over_groups(groups, of_group)


def gvpo(groups, beta=0.1):
    def of_group(sums, refs, lengths, scores):
        s, k = log_ratios(sums, refs, beta), len(scores)
        if k == 1:
            return 0.0
        loss = 0.0
        for i in range(k):
            loss += ((s[i] - sum(s) / k) - (scores[i] - sum(scores) / k)) ** 2
        return loss / (2 * (k - 1))

    return over_groups(groups, of_group)


def qrpo(groups, beta=0.1):
    def of_group(sums, refs, lengths, scores):
        k, loss = len(scores), 0.0
        for i in range(k):
            quantile = sum(other <= scores[i] for other in scores) / k
            partition = beta * (math.exp(1 / beta) - 1)
            loss += (quantile - beta * math.log(partition) - beta * (sums[i] - refs[i])) ** 2
        return loss / k

    return over_groups(groups, of_group)
