"""An evaluation's numbers as tables: one row for each policy, a column only where there is a number in it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

#: Title, and policy -> what stands there.
Column = tuple[str, Callable[[str], str | None]]
#: Characters between two columns, and of a title's line.
_GAP, _TITLE = 3, 10


def markdown_table(figures: Mapping[str, Any]) -> str:
    """All columns in one Markdown table, with a line on what was compared how."""
    columns = [column for part in _columns(figures) for column in part]
    names = list(figures["policies"])
    rows = [["policy", *(title for title, _ in columns)], ["---", *("---:" for _ in columns)]]
    rows += [[name, *(value(name) or "" for _, value in columns)] for name in names]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", _note(figures), ""])


def terminal_tables(figures: Mapping[str, Any], width: int) -> list[Any]:
    """The columns in as many tables as fit `width` characters, and the note."""
    tables: list[Any] = []
    names = list(figures["policies"])
    longest = min(max(map(len, names)), width // 3)
    for columns in (own for part in _columns(figures) for own in _fitting(part, names, width - longest - 2)):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("policy", overflow="fold", min_width=longest)
        for column in columns:
            table.add_column("\n".join(_title_lines(column, names)), justify="right", no_wrap=True)
        for name in names:
            table.add_row(name, *(value(name) or "" for _, value in columns))
        tables.append(table)
    return [*tables, _note(figures)]


def _fitting(columns: Sequence[Column], names: Sequence[str], room: int) -> list[list[Column]]:
    """The columns in turn, as many side by side as there is room for; a title may break between words."""
    parts: list[list[Column]] = []
    left = 0
    for column in columns:
        need = _width(column, names) + _GAP
        if not parts or need > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= need
    return parts


def _title_lines(column: Column, names: Sequence[str]) -> list[str]:
    title, value = column
    return textwrap.wrap(title, max([_TITLE, *(len(value(name) or "") for name in names)]), break_long_words=False)


def _width(column: Column, names: Sequence[str]) -> int:
    return max([*map(len, _title_lines(column, names)), *(len(column[1](name) or "") for name in names)])


def _columns(figures: Mapping[str, Any]) -> list[list[Column]]:
    """What the policies are worth; how they write."""
    policies = figures["policies"]
    labels = list(dict.fromkeys(label for own in policies.values() for label in own["rewards"]))

    def number(form: str, *keys: str) -> Callable[[str], str | None]:
        def value(name: str) -> str | None:
            found = policies[name]
            for key in keys:
                found = None if found is None else found.get(key)
            return None if found is None else format(found, form)

        return value

    def interval(form: str, *keys: str) -> Callable[[str], str | None]:
        def value(name: str) -> str | None:
            parts = [number(form, *keys, bound)(name) for bound in ("mean", "low", "high")]
            return None if parts[0] is None else f"{parts[0]} [{parts[1]}, {parts[2]}]"

        return value

    worth: list[Column] = [(f"reward {label}", interval(".3f", "rewards", label)) for label in labels]
    worth += _difference_columns(figures)
    worth += [
        ("perplexity", number(".2f", "perplexity")),
        ("reference perplexity", number(".2f", "reference_perplexity")),
        ("pair accuracy", interval(".1%", "preference", "pair_accuracy")),
        ("Kendall's tau", number(".3f", "preference", "kendall_tau")),
    ]
    worth += _win_columns(figures["wins"])
    headline = figures["headline"]
    sizes = list(dict.fromkeys(size for own in policies.values() for size in own["best_of_n"].get(headline, {})))
    writing: list[Column] = [
        (f"best of {size}", number(".3f", "best_of_n", headline, size, "mean")) for size in sizes if size != "1"
    ]
    writing += [
        ("distinct-1", number(".3f", "distinct_1")),
        ("distinct-2", number(".3f", "distinct_2")),
        ("repetition", number(".1%", "repetition")),
        ("words", number(".1f", "words")),
        ("tokens", number(".1f", "tokens")),
        ("unfinished", number(".0%", "unfinished")),
        ("train s", number(".0f", "train", "seconds")),
        ("train GiB", number(".2f", "train", "peak_memory_gib")),
    ]
    return [[column for column in part if any(column[1](name) for name in policies)] for part in (worth, writing)]


def _difference_columns(figures: Mapping[str, Any]) -> list[Column]:
    """How much more reward by the headline scorer than the policy compared with, on the prompts that both have."""
    label, rows = figures["headline"], figures["differences"]
    apart = {row["policy"]: row["rewards"][label] for row in rows if label in row["rewards"]}
    if not apart:
        return []

    def value(name: str) -> str | None:
        own = apart.get(name)
        return None if own is None else f"{own['mean']:+.3f} [{own['low']:+.3f}, {own['high']:+.3f}]"

    return [(f"more than {rows[0]['against']}", value)]


def _win_columns(wins: Sequence[Mapping[str, Any]]) -> list[Column]:
    if not any(own["prompts"] for own in wins):
        return []
    rows = {own["policy"]: own for own in wins if own["prompts"]}
    against = wins[0]["against"]

    def shares(name: str) -> str | None:
        own = rows.get(name)
        return None if own is None else " / ".join(f"{own[key]:.0%}" for key in ("win", "tie", "lose"))

    def rate(name: str) -> str | None:
        own = (rows.get(name) or {}).get("win_rate")
        return None if own is None else f"{own['mean']:.0%} [{own['low']:.0%}, {own['high']:.0%}]"

    def controlled(name: str) -> str | None:
        at_equal_length = rows.get(name, {}).get("length_controlled_win_rate")
        return None if at_equal_length is None else f"{at_equal_length:.0%}"

    return [
        (f"win / tie / lose against {against}", shares),
        (f"win rate against {against}", rate),
        ("win rate at equal length", controlled),
    ]


def _note(figures: Mapping[str, Any]) -> str:
    settings = figures["settings"]
    decoding = settings["decoding"]
    parts = [
        f"{settings['prompts']} prompts, {decoding['k']} responses each ({decoding['strategy']}, temperature "
        f"{decoding['temperature']:g}, at most {decoding['max_new_tokens']} tokens)",
        f"intervals: {settings['confidence']:.0%} bootstrap over prompts",
    ]
    if settings["perplexity_judge"] is not None:
        parts.append(f"perplexity under {settings['perplexity_judge']}")
    if len(figures["differences"]) and figures["headline"] is not None:
        parts.append(f"'more than' compares answers to the same prompts by {figures['headline']}")
    parts += [
        f"wins are shares of answer pairs, each prompt weighing the same, by {by}"
        for by in dict.fromkeys(own["by"] for own in figures["wins"])
    ]
    unrewarded = sum(sum(own["unrewarded"].values()) for own in figures["policies"].values())
    if unrewarded:
        parts.append(f"{unrewarded} rewards missing, so that the means may be over different prompts")
    failures = sum(own["failures"] for own in figures["wins"])
    if failures:
        parts.append(f"{failures} comparisons failed")
    said = "; ".join(parts) + "."
    for name, own in figures["policies"].items():
        if own["differs_from_training"]:
            said += f" Not as it was trained: {name}, {', '.join(own['differs_from_training'])}."
    return said
