"""Float64 losses written as plain loops from the papers' formulas; they share no code with the package."""

from __future__ import annotations

import math


def pair_value(difference, pair_function):
    if pair_function == "hinge":
        return difference if difference > 0 else 0.0
    return math.log1p(math.exp(-abs(difference))) + max(difference, 0.0)


def rrhf_group(
    sums,
    lengths,
    padded,
    scores,
    variant="balanced",
    rank_weight=1.0,
    sft_weight=1.0,
    length_penalty=1.0,
    margin=0.0,
    min_score_gap=0.0,
    pair_function="hinge",
    pair_reduction="sum",
    sft_reduction=None,
    tied_best="first",
):
    """(loss, rank loss, sft loss) of one group; `sums` and `scores` are lists of k floats."""
    k = len(sums)
    divisor = [padded if variant == "released" else lengths[i] for i in range(k)]
    p = [sums[i] / divisor[i] ** length_penalty for i in range(k)]
    rank, pairs = 0.0, 0
    for i in range(k):
        for j in range(k):
            if scores[j] - scores[i] > min_score_gap:
                rank += pair_value(p[i] - p[j] + margin, pair_function)
                pairs += 1
    if pair_reduction == "mean" and pairs:
        rank /= pairs
    best = [i for i in range(k) if scores[i] == max(scores)]
    if tied_best == "first":
        best = best[:1]
    reduction = sft_reduction or ("sum" if variant == "paper" else "mean")
    sft = 0.0
    for i in best:
        sft -= sums[i] / (divisor[i] if reduction == "mean" else 1) / len(best)
    return rank_weight * rank + sft_weight * sft, rank, sft
