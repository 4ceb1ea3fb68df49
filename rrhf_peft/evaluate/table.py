"""An evaluation's numbers as tables: one row for each policy, a column only where there is a number in it.

`columns` is the one list of what tables show, for Markdown, the terminal and the report.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table

from rrhf_peft.evaluate.statistics import Interval

if TYPE_CHECKING:
    from rrhf_peft.evaluate.numbers import Numbers, PolicyNumbers

#: Characters between two columns, and of a title's line.
_GAP, _TITLE = 3, 10


class Column(NamedTuple):
    """A title, what it means where that does not say it, and policy -> cell for those that were measured."""

    title: str
    meaning: str
    cells: dict[str, str]


def columns(numbers: Numbers) -> tuple[list[Column], list[Column]]:
    """What the policies are worth; more about their order and their texts."""
    policies, headline = numbers.policies, numbers.headline
    per_interval = f"{100 * numbers.settings['confidence']:g}% " if "confidence" in numbers.settings else ""

    def column(
        title: str, form: str, value: Callable[[PolicyNumbers], float | Interval | None], meaning: str = ""
    ) -> Column:
        values = {name: value(policy) for name, policy in policies.items()}
        cells = {name: format(one, form) for name, one in values.items() if one is not None and _is_finite(one)}
        return Column(title, meaning, cells)

    def preference(key: str) -> Callable[[PolicyNumbers], Any]:
        return lambda policy: getattr(policy.preference, key, None)

    labels = dict.fromkeys(label for policy in policies.values() for label in policy.rewards)
    bootstrap = f"mean over prompts with its {per_interval}bootstrap interval"
    worth = [
        column(f"reward {label}", ".3f", lambda policy, label=label: policy.rewards.get(label), bootstrap)  # type: ignore[misc]
        for label in sorted(labels, key=lambda label: label != headline)
    ]
    worth += _differences(numbers)
    worth += [
        column("perplexity", ".2f", lambda policy: policy.perplexity, "of the policy's answers under the judge model"),
        column(
            "reference perplexity",
            ".2f",
            lambda policy: policy.reference_perplexity,
            "of reference answers under the policy",
        ),
        column(
            "pair accuracy",
            ".1%",
            preference("pair_accuracy"),
            "share of labelled pairs that the policy's own log-prob per token orders right",
        ),
    ]
    wins, at_equal_length = _wins(numbers)
    worth += wins
    sizes = dict.fromkeys(size for policy in policies.values() for size in policy.best_of_n.get(str(headline), {}))
    more = [
        column(
            f"best of {size}",
            ".3f",
            lambda policy, size=size: getattr(policy.best_of_n.get(str(headline), {}).get(size), "mean", None),  # type: ignore[misc]
        )
        for size in sizes
        if size != "1"
    ]
    more += at_equal_length
    more += [
        column("Kendall's tau", ".3f", preference("kendall_tau"), "of labelled scores and the policy's log-probs"),
        column("best found", ".0%", preference("best_hit_rate"), "groups whose best response is the likeliest"),
        column("distinct-1", ".3f", lambda policy: policy.distinct_1, "different words over all words"),
        column("distinct-2", ".3f", lambda policy: policy.distinct_2, "different pairs of words over all"),
        column("repetition", ".1%", lambda policy: policy.repetition, "within an answer"),
        column("words", ".1f", lambda policy: policy.words, "mean length of an answer"),
        column("tokens", ".1f", lambda policy: policy.tokens, "mean length of an answer"),
        column("unfinished", ".0%", lambda policy: policy.unfinished, "answers cut at the limit"),
    ]
    trained = {name: policy.train for name, policy in policies.items() if policy.train is not None}
    seconds = {name: duration(train.seconds) for name, train in trained.items() if train.seconds is not None}
    peaks = {name: train.peak_memory_gib for name, train in trained.items() if train.peak_memory_gib is not None}
    more += [
        Column("training", "wall time", seconds),
        Column("peak memory", "of training", {name: f"{peak:.1f} GiB" for name, peak in peaks.items()}),
    ]
    return [one for one in worth if one.cells], [one for one in more if one.cells]


def markdown_table(numbers: Numbers) -> str:
    """All columns in one Markdown table, with a line on what was compared how."""
    shown = [column for part in columns(numbers) for column in part]
    rows = [["policy", *(column.title for column in shown)], ["---", *("---:" for _ in shown)]]
    rows += [[name, *(column.cells.get(name, "") for column in shown)] for name in numbers.policies]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", note(numbers), ""])


def terminal_tables(numbers: Numbers, width: int) -> Iterator[Any]:
    """The columns in as many tables as fit `width` characters, and the note."""
    names = list(numbers.policies)
    longest = min(max(map(len, names)), width // 3)
    for part in (fitting for some in columns(numbers) for fitting in _fitting(some, width - longest - 2)):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("policy", overflow="fold", min_width=longest)
        for column in part:
            table.add_column("\n".join(_title_lines(column)), justify="right", no_wrap=True)
        for name in names:
            table.add_row(name, *(column.cells.get(name, "") for column in part))
        yield table
    yield note(numbers)


def note(numbers: Numbers) -> str:
    """What was compared how, in a sentence or two."""
    settings = numbers.settings
    parts = []
    if decoding := settings.get("decoding"):
        parts.append(
            f"{settings['prompts']} prompts, {decoding['k']} responses each ({decoding['strategy']}, temperature "
            f"{decoding['temperature']:g}, at most {decoding['max_new_tokens']} tokens)"
        )
        parts.append(f"intervals: {settings['confidence']:.0%} bootstrap over prompts")
    if settings.get("perplexity_judge") is not None:
        parts.append(f"perplexity under {settings['perplexity_judge']}")
    pairs = max((policy.preference.pairs for policy in numbers.policies.values() if policy.preference), default=0)
    if pairs:
        parts.append(f"pair accuracy over {pairs:,} labelled pairs")
    if any(numbers.headline in row.rewards for row in numbers.differences):
        parts.append(f"'more than' compares answers to the same prompts by {numbers.headline}")
    parts += [
        f"wins are shares of answer pairs, each prompt weighing the same, by {by}"
        for by in dict.fromkeys(row.by for row in numbers.wins)
    ]
    unrewarded = sum(sum(policy.unrewarded.values()) for policy in numbers.policies.values())
    if unrewarded:
        parts.append(f"{unrewarded} rewards missing, so that the means may be over different prompts")
    if failures := sum(row.failures for row in numbers.wins):
        parts.append(f"{failures} comparisons failed")
    said = "; ".join(parts) + "." if parts else ""
    for name, policy in numbers.policies.items():
        if policy.differs_from_training:
            said += f" Not as it was trained: {name}, {', '.join(policy.differs_from_training)}."
    return said


def duration(seconds: float) -> str:
    """28 s, 12 min, 3 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _is_finite(value: float | Interval) -> bool:
    return math.isfinite(value.mean if isinstance(value, Interval) else value)


def _differences(numbers: Numbers) -> list[Column]:
    """How much more reward by the headline scorer than the policy compared with, on the prompts that both have."""
    rows = {row.policy: row.rewards[numbers.headline] for row in numbers.differences if numbers.headline in row.rewards}
    if not rows:
        return []
    cells = {name: format(interval, "+.3f") for name, interval in rows.items()}
    return [Column(f"more than {numbers.differences[0].against}", "on the same prompts", cells)]


def _wins(numbers: Numbers) -> tuple[list[Column], list[Column]]:
    """Shares and rates against each other policy by each judge; and what the rates would be at equal length."""
    compared = [row for row in numbers.wins if row.prompts != 0 and any(row.shares)]
    judges = dict.fromkeys((row.against, row.by) for row in compared)
    shown, controlled = [], []
    for against, by in judges:
        rows = [row for row in compared if (row.against, row.by) == (against, by)]
        name = f"against {against}" + (f", {by}" if len(judges) > 1 else "")
        shown += [
            Column(
                f"win / tie / lose {name}",
                f"of answer pairs, every prompt weighing the same, by {by}",
                {row.policy: " / ".join(f"{share:.0%}" for share in row.shares) for row in rows},
            ),
            Column(
                f"win rate {name}",
                "a tie counts half",
                {row.policy: format(row.win_rate, ".0%") for row in rows if row.win_rate is not None},
            ),
        ]
        rates = {row.policy: row.length_controlled_win_rate for row in rows}
        controlled.append(
            Column(
                "win rate at equal length" + (f" {name}" if len(judges) > 1 else ""),
                "by a regression on the difference in length",
                {policy: f"{rate:.0%}" for policy, rate in rates.items() if rate is not None},
            )
        )
    return shown, controlled


def _fitting(some: Sequence[Column], room: int) -> list[list[Column]]:
    """The columns in turn, as many side by side as there is room for; a title may break between words."""
    parts: list[list[Column]] = []
    left = 0
    for column in some:
        need = max(map(len, [*_title_lines(column), *column.cells.values()])) + _GAP
        if not parts or need > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= need
    return parts


def _title_lines(column: Column) -> list[str]:
    return textwrap.wrap(column.title, max([_TITLE, *map(len, column.cells.values())]), break_long_words=False)
