"""What scoring came to: numbers per source, ties, failures; as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class ScoreReport:
    """Numbers about the groups kept, except where they say otherwise.

    Attributes:
        groups: groups read.
        groups_kept: groups with at least two scored responses: those of the output.
        responses: responses read.
        responses_kept: responses in the output.
        failures: reason -> responses without a score, those of groups not kept included.
        lost_with_group: responses that have a score, in groups not kept.
        mean: score over all responses.
        std: population standard deviation.
        mean_of_max: mean over groups of the best score, which a trained policy's reward approaches
            (arXiv 2304.05302).
        pairs: pairs of responses within groups.
        tied_pairs: those with equal scores.
        sources: source -> count, mean, std, mean_of_max (over groups, of this source's best) and win_share
            (share of its groups in which it has the best score; a tie of n sources counts 1/n for each).
        counts: the scorers' own totals: requests, retries, truncated texts ...
        agreement: of human annotators, by scorer.
    """

    groups: int
    groups_kept: int
    responses: int
    responses_kept: int
    failures: dict[str, int]
    lost_with_group: int
    mean: float | None
    std: float | None
    mean_of_max: float | None
    pairs: int
    tied_pairs: int
    sources: dict[str, dict[str, float]]
    counts: dict[str, int]
    agreement: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def __rich__(self) -> Group:
        return Group(self._sources_table(), Text("\n".join(self._lines())))

    def _sources_table(self) -> Table:
        table = Table("source", "responses", "mean", "std", "mean of max", "win share")
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        for source, own in self.sources.items():
            numbers = (f"{own[name]:.3f}" for name in ("mean", "std", "mean_of_max"))
            table.add_row(source, f"{own['count']:,.0f}", *numbers, f"{own['win_share']:.0%}")
        return table

    def _lines(self) -> Iterable[str]:
        responses = f"responses: {self.responses_kept:,} of {self.responses:,}"
        yield f"groups kept: {self.groups_kept:,} of {self.groups:,}; {responses}"
        if self.mean is not None:
            yield f"score: mean {self.mean:.3f}, std {self.std:.3f}, mean of group maximum {self.mean_of_max:.3f}"
            yield f"ties: {self.tied_pairs:,} of {self.pairs:,} pairs"
        for reason, count in self.failures.items():
            yield f"not scored: {count:,} ({reason})"
        if self.lost_with_group:
            yield f"scored, but in groups with fewer than two scores: {self.lost_with_group:,}"
        if any(self.counts.values()):
            yield ", ".join(f"{name} {count:,}" for name, count in self.counts.items() if count)
        for label, own in self.agreement.items():
            numbers = (
                f"{name.replace('_', ' ')} {_number(own[name])}" for name in ("same", "no_contradiction", "alpha")
            )
            yield f"{label}: agreement over {own['comparisons']:,} comparisons: {', '.join(numbers)}"


def make_report(
    kept: Sequence[tuple[list[float], list[str]]],
    *,
    groups: int,
    responses: int,
    reasons: Iterable[str],
    lost_with_group: int,
    counts: dict[str, int],
    agreement: dict[str, dict[str, Any]],
) -> ScoreReport:
    """The report over (scores, sources) of the groups kept."""
    scores = [score for own, _ in kept for score in own]
    return ScoreReport(
        groups=groups,
        groups_kept=len(kept),
        responses=responses,
        responses_kept=len(scores),
        failures=dict(Counter(reasons).most_common()),
        lost_with_group=lost_with_group,
        mean=_mean(scores) if scores else None,
        std=statistics.pstdev(scores) if scores else None,
        mean_of_max=_mean([max(own) for own, _ in kept]) if kept else None,
        pairs=sum(math.comb(len(own), 2) for own, _ in kept),
        tied_pairs=sum(math.comb(count, 2) for own, _ in kept for count in Counter(own).values()),
        sources=_by_source(kept),
        counts=counts,
        agreement=agreement,
    )


def _by_source(kept: Sequence[tuple[list[float], list[str]]]) -> dict[str, dict[str, float]]:
    scores: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    wins: Counter[str] = Counter()
    for own, sources in kept:
        highest: dict[str, float] = {}
        for score, source in zip(own, sources, strict=True):
            scores.setdefault(source, []).append(score)
            highest[source] = max(score, highest.get(source, score))
        for source, score in highest.items():
            best.setdefault(source, []).append(score)
        winners = [source for source, score in highest.items() if score == max(own)]
        for source in winners:
            wins[source] += 1 / len(winners)  # type: ignore[assignment]
    return {
        source: {
            "count": len(own),
            "mean": _mean(own),
            "std": statistics.pstdev(own),
            "mean_of_max": _mean(best[source]),
            "win_share": wins[source] / len(best[source]),
        }
        for source, own in sorted(scores.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
