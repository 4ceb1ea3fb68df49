"""What a ranked file holds, before any tokenizer or recipe: scores, sources, length bias, repetition.

Everything is about the groups as they are read, nothing cleaned or cut: `report` says what training will see.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rrhf_peft.data.rank_correlation import mean_rank_correlation
from rrhf_peft.records import RankedGroup, UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Two responses of a group are near-identical from this share of common words on.
NEAR_IDENTICAL = 0.9


@dataclass(frozen=True)
class SourceReport:
    """One source's responses. Rates are None where nothing was there to count.

    Attributes:
        responses: How many there are.
        groups: Groups that have at least one.
        mean: Mean score.
        std: Population standard deviation of the scores.
        mean_of_max: Mean over its groups of its best score there.
        best_share: Share of its groups in which it has the best score, alone or tied.
        win_rate: Share won of its ordered pairs with other sources' responses; ties do not count.
        ties: Its pairs with other sources' responses that are tied.
        mean_characters: Mean length of its responses.
    """

    responses: int
    groups: int
    mean: float
    std: float
    mean_of_max: float
    best_share: float
    win_rate: float | None
    ties: int
    mean_characters: float


@dataclass(frozen=True)
class RankedStatistics:
    """Statistics of ranked groups as read.

    Attributes:
        groups: How many there are.
        responses: Responses of all groups.
        k_histogram: Responses per group -> groups.
        score_mean: Over all responses.
        score_std: Population standard deviation over all responses.
        score_mean_of_max: Mean over groups of the best score (arXiv 2304.05302).
        pairs: Pairs of responses within groups.
        tied_pairs: Those with equal scores.
        groups_without_order: Groups without two different scores.
        repeated_prompts: Groups whose prompt an earlier group has too.
        length_correlation: Mean over groups of Spearman's rank correlation between score and characters;
            None where no group has both different scores and different lengths.
        longer_wins: Share of the ordered pairs of different lengths in which the longer response is better.
        empty_responses: Responses of white space only.
        duplicates: Responses whose text an earlier response of their group has too.
        conflicting_duplicates: Texts that a group holds with different scores.
        near_identical_pairs: Pairs of different texts of a group whose words, without case and counted once
            each, are the same to at least `NEAR_IDENTICAL` (Jaccard: common words / words of either).
        groups_with_near_identical: Groups with such a pair.
        sources: Source -> its report, the best mean of max first.
    """

    groups: int
    responses: int
    k_histogram: dict[int, int]
    score_mean: float
    score_std: float
    score_mean_of_max: float
    pairs: int
    tied_pairs: int
    groups_without_order: int
    repeated_prompts: int
    length_correlation: float | None
    longer_wins: float | None
    empty_responses: int
    duplicates: int
    conflicting_duplicates: int
    near_identical_pairs: int
    groups_with_near_identical: int
    sources: dict[str, SourceReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the histogram's keys are strings, as JSON has no others."""
        return {**asdict(self), "k_histogram": {str(k): count for k, count in self.k_histogram.items()}}

    def __rich__(self) -> RenderableType:
        from rrhf_peft.data.ranked_statistics_view import statistics_table

        return statistics_table(self)


def ranked_statistics(groups: Sequence[RankedGroup]) -> RankedStatistics:
    """Describe ranked groups; those without any response only count as groups.

    Raises:
        UserError: there is no response at all.
    """
    scores = np.array([score for group in groups for score in group.known_scores])
    if not len(scores):
        raise UserError(f"none of the {len(groups)} groups has a response, so there is nothing to describe.")
    longer, shorter = _wins_by_length(groups)
    near = [_near_identical_pairs(group.responses) for group in groups]
    return RankedStatistics(
        groups=len(groups),
        responses=len(scores),
        k_histogram=dict(sorted(Counter(len(group.responses) for group in groups).items())),
        score_mean=float(scores.mean()),
        score_std=float(scores.std()),
        score_mean_of_max=float(np.mean([max(group.known_scores) for group in groups if group.known_scores])),
        pairs=sum(math.comb(len(group.known_scores), 2) for group in groups),
        tied_pairs=sum(math.comb(count, 2) for group in groups for count in Counter(group.known_scores).values()),
        groups_without_order=sum(len(set(group.known_scores)) < 2 for group in groups),
        repeated_prompts=len(groups) - len({repr(group.prompt) for group in groups}),
        length_correlation=mean_rank_correlation((group.known_scores, _characters(group)) for group in groups),
        longer_wins=longer / (longer + shorter) if longer + shorter else None,
        empty_responses=sum(not response.strip() for group in groups for response in group.responses),
        duplicates=sum(len(group.responses) - len(set(group.responses)) for group in groups),
        conflicting_duplicates=sum(_conflicts(group) for group in groups),
        near_identical_pairs=sum(near),
        groups_with_near_identical=sum(count > 0 for count in near),
        sources=_source_reports(groups),
    )


@dataclass
class _Tally:
    """What is collected of one source on the way to its report."""

    scores: list[float] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    groups_best: int = 0
    wins: int = 0
    losses: int = 0
    ties: int = 0

    def report(self) -> SourceReport:
        ordered = self.wins + self.losses
        return SourceReport(
            responses=len(self.scores),
            groups=len(self.best),
            mean=float(np.mean(self.scores)),
            std=float(np.std(self.scores)),
            mean_of_max=float(np.mean(self.best)),
            best_share=self.groups_best / len(self.best),
            win_rate=self.wins / ordered if ordered else None,
            ties=self.ties,
            mean_characters=float(np.mean(self.characters)),
        )


def _source_reports(groups: Sequence[RankedGroup]) -> dict[str, SourceReport]:
    tallies: dict[str, _Tally] = {}
    for group in groups:
        best: dict[str, float] = {}
        entries = list(zip(group.sources, group.known_scores, strict=True))
        for (source, score), length in zip(entries, _characters(group), strict=True):
            tally = tallies.setdefault(source, _Tally())
            tally.scores.append(score)
            tally.characters.append(length)
            best[source] = max(score, best.get(source, score))
        for source, score in best.items():
            tallies[source].best.append(score)
            tallies[source].groups_best += score == max(best.values())
        for (one, high), (other, low) in itertools.combinations(sorted(entries, key=lambda entry: -entry[1]), 2):
            if one == other:
                continue
            tallies[one].wins += high > low
            tallies[other].losses += high > low
            tallies[one].ties += high == low
            tallies[other].ties += high == low
    reports = {source: tally.report() for source, tally in tallies.items()}
    return dict(sorted(reports.items(), key=lambda item: (-item[1].mean_of_max, -item[1].mean, item[0])))


def _characters(group: RankedGroup) -> list[int]:
    return [len(response) for response in group.responses]


def _wins_by_length(groups: Sequence[RankedGroup]) -> tuple[int, int]:
    """Ordered pairs that the longer response wins, and those that the shorter wins."""
    outcomes = Counter(
        (high > low) == (long > short)
        for group in groups
        for (high, long), (low, short) in itertools.combinations(
            zip(group.known_scores, _characters(group), strict=True), 2
        )
        if high != low and long != short
    )
    return outcomes[True], outcomes[False]


def _conflicts(group: RankedGroup) -> int:
    scores: dict[str, set[float]] = {}
    for response, score in zip(group.responses, group.known_scores, strict=True):
        scores.setdefault(response, set()).add(score)
    return sum(len(own) > 1 for own in scores.values())


def _near_identical_pairs(responses: Sequence[str]) -> int:
    words = [set(re.findall(r"\w+", text.lower())) for text in dict.fromkeys(responses)]
    return sum(
        len(one & other) >= NEAR_IDENTICAL * len(one | other)
        for one, other in itertools.combinations(words, 2)
        if one and other
    )
