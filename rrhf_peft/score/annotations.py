"""Several people's ranks: one score per response, and how far the people agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rrhf_peft.records import UserError
from rrhf_peft.score.combining import share_beaten
from rrhf_peft.score.ranking_sheet import Ranks


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on which of two responses is better.

    Attributes:
        comparisons: pairs of responses that two annotators both ranked, counted for each two annotators.
        same: share of them in which both say better, tied, or worse alike; None without comparisons.
        no_contradiction: share in which they do not prefer opposite responses.
        alpha: Krippendorff's alpha of the comparisons as ordinal values (worse, tied, better); None where it
            is not defined: nothing compared twice, or only one value given.
        answered: share of the responses that each annotator ranked.
    """

    comparisons: int
    same: float | None
    no_contradiction: float | None
    alpha: float | None
    answered: tuple[float, ...]


def merged_scores(annotators: Sequence[Ranks], sizes: Sequence[int]) -> list[list[float | None]]:
    """Per group (of `sizes` responses) the mean over annotators of the share of the others a response beats.

    An annotator counts for a group where at least two of its responses have a rank; of the others nothing
    is compared. None for a response that nobody ranked.
    """
    merged: list[list[float | None]] = []
    for group, size in enumerate(sizes):
        given: list[list[float]] = [[] for _ in range(size)]
        for ranks in annotators:
            own = ranks.get(group, {})
            if len(own) >= 2:
                shares = share_beaten([-own[index] if index in own else None for index in range(size)])
                for index, share in enumerate(shares):
                    if share is not None:
                        given[index].append(share)
        merged.append([math.fsum(shares) / len(shares) if shares else None for shares in given])
    return merged


def agreement(annotators: Sequence[Ranks], sizes: Sequence[int]) -> Agreement:
    """Compare every two annotators on every pair of responses that both ranked.

    Raises:
        UserError: the package for Krippendorff's alpha is not installed (only asked for with two annotators).
    """
    pairs = [(group, *pair) for group, size in enumerate(sizes) for pair in itertools.combinations(range(size), 2)]
    relations = [[_relation(ranks.get(group, {}), a, b) for group, a, b in pairs] for ranks in annotators]
    both = [
        (one, other)
        for first, second in itertools.combinations(relations, 2)
        for one, other in zip(first, second, strict=True)
        if one is not None and other is not None
    ]
    responses = sum(sizes)
    return Agreement(
        comparisons=len(both),
        same=sum(one == other for one, other in both) / len(both) if both else None,
        no_contradiction=sum(one * other >= 0 for one, other in both) / len(both) if both else None,
        alpha=_alpha(relations) if both else None,
        answered=tuple(sum(map(len, ranks.values())) / max(1, responses) for ranks in annotators),
    )


def _relation(ranks: dict[int, float], a: int, b: int) -> int | None:
    """1 where `a` is better, -1 where `b` is, 0 for a tie; None where one has no rank."""
    if a not in ranks or b not in ranks:
        return None
    return (ranks[a] < ranks[b]) - (ranks[a] > ranks[b])


def _alpha(relations: Sequence[Sequence[int | None]]) -> float | None:
    try:
        import krippendorff
    except ModuleNotFoundError:
        raise UserError(
            "Krippendorff's alpha needs a package that is not installed: pip install 'rrhf-peft[human]'."
        ) from None
    data = [[math.nan if value is None else float(value) for value in row] for row in relations]
    values = {value for row in relations for value in row if value is not None}
    if len(values) < 2:  # without variation there is nothing that chance could explain
        return None
    return float(krippendorff.alpha(reliability_data=data, level_of_measurement="ordinal", value_domain=[-1, 0, 1]))
