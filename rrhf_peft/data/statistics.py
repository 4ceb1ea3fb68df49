"""What a ranked file holds, before any tokenizer or recipe: scores, sources, length bias, repetition.

Everything is about the groups as they are read, nothing cleaned or cut: `report` says what training will see.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rrhf_peft.records import RankedGroup, UserError

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


# ---- Rank correlation ----


def mean_rank_correlation(groups: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Mean over groups of the rank correlation between their two lists; ties share their mean rank.

    Groups in which either list has a single value do not count; None where no group counts.
    """
    coefficients = []
    for scores, numbers in groups:
        if len(set(scores)) > 1 and len(set(numbers)) > 1:
            one, other = _centred_ranks(scores), _centred_ranks(numbers)
            coefficients.append(one @ other / math.sqrt((one @ one) * (other @ other)))
    return float(np.mean(coefficients)) if coefficients else None


def _centred_ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks less their mean; equal values share the mean of their ranks."""
    _, rank, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[rank] - (len(values) + 1) / 2


# ---- As tables that read at 80 columns, with or without colour ----

#: Sources shown; data sets with hundreds of them name the rest in one line.
_SOURCES_SHOWN = 30


def statistics_table(statistics: RankedStatistics) -> RenderableType:
    """A table of facts, and one of sources."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in _facts(statistics):
        facts.add_row(Text(name), Text(value))
    legend = Text(
        "max: mean of its best score in a group. best: share of its groups in which it has the best score, alone or "
        "tied. wins: share of its untied pairs with other sources.",
        style="dim",
    )
    return Group(Text("Ranked data", style="bold underline"), facts, Text(), _source_table(statistics), Text(), legend)


def _facts(statistics: RankedStatistics) -> list[tuple[str, str]]:
    s = statistics
    sizes = ", ".join(f"{k} in {count:,}" for k, count in sorted(s.k_histogram.items(), reverse=True)[:8])
    facts = [
        ("groups", f"{s.groups:,}, with {s.responses:,} responses"),
        ("k, responses", sizes + (" groups" if len(s.k_histogram) <= 8 else " groups ...")),
        ("scores", f"mean {_number(s.score_mean)}, std {_number(s.score_std)}"),
        ("", f"mean of each group's best {_number(s.score_mean_of_max)}"),
        ("pairs", f"{s.pairs:,}, of which {s.tied_pairs:,} tied ({_share_of(s.tied_pairs, s.pairs)})"),
        ("", f"{s.groups_without_order:,} groups have no two different scores"),
        ("length bias", f"rank correlation of score and characters {_signed(s.length_correlation)}"),
        ("", f"the longer response wins {_percent(s.longer_wins)} of the untied pairs"),
        ("repetition", f"{s.duplicates:,} responses repeat another of their group"),
        ("", f"{s.near_identical_pairs:,} pairs share {NEAR_IDENTICAL:.0%} of their words, in {_near(s)}"),
    ]
    if s.conflicting_duplicates:
        facts.append(("", f"{s.conflicting_duplicates:,} equal texts have different scores in one group"))
    if s.empty_responses:
        facts.append(("empty", f"{s.empty_responses:,} responses are white space only"))
    if s.repeated_prompts:
        facts.append(("prompts", f"{s.repeated_prompts:,} groups repeat the prompt of an earlier one"))
    return facts


def _source_table(statistics: RankedStatistics) -> Table:
    table = Table("source", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("responses", "mean", "std", "max", "best", "wins", "characters"):
        table.add_column(name, justify="right", no_wrap=True)
    sources = list(statistics.sources.items())
    for source, own in sources[:_SOURCES_SHOWN]:
        numbers = map(_number, (own.mean, own.std, own.mean_of_max))
        rates = (_percent(own.best_share), _percent(own.win_rate))
        table.add_row(Text(source), f"{own.responses:,}", *numbers, *rates, f"{own.mean_characters:,.0f}")
    if len(sources) > _SOURCES_SHOWN:
        table.add_row(f"and {len(sources) - _SOURCES_SHOWN:,} more")
    return table


def _near(statistics: RankedStatistics) -> str:
    count = statistics.groups_with_near_identical
    return f"{count:,} group" + ("" if count == 1 else "s")


def _share_of(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}"
