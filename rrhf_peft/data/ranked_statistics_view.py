"""The statistics of ranked groups as tables that read at 80 columns, with or without colour."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rrhf_peft.data.ranked_statistics import NEAR_IDENTICAL, RankedStatistics

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
        ("pairs", f"{s.pairs:,}, of which {s.tied_pairs:,} tied ({_share(s.tied_pairs, s.pairs)})"),
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


def _share(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}"
