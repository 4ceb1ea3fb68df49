"""The rounds' numbers, read from what the stages wrote: as rows, as JSON, as Markdown and for the terminal.

`rounds.json` and `table.md` hold what a repeated or resumed run gives again, byte for byte. Seconds are not among
that: they stand in each round's `stages.json`, and in the terminal's table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from rrhf_peft.evaluate.numbers import read_evaluation
from rrhf_peft.files import replace_text
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.stages import is_current_policy
from rrhf_peft.rounds.stages import RoundFolder, policy_name, source_of
from rrhf_peft.train.run_folder import read_object


@dataclass(frozen=True)
class Row:
    """One policy: what it was trained on, and how it does on held-out prompts. None where not measured.

    Attributes:
        policy: base, round-1, round-2 ...
        groups: groups of candidates that it was trained on; training leaves out those that teach it nothing.
        candidates: mean score of all scored candidates.
        own: mean score of those that the policy before it wrote.
        mean_of_max: mean over groups of the best score, which the held-out reward approaches (arXiv 2304.05302).
        reward: held-out reward by the evaluation's first scorer, with its bootstrap interval.
        low, high: that interval.
        perplexity: of its answers, under the evaluation's judge.
        pair_accuracy: share of the evaluation's ranked pairs that it orders right.
        train_seconds: of the training stage; not in the files.
        train_resumed: whether these are only the seconds since the last resumption.
    """

    policy: str
    groups: int | None = None
    candidates: float | None = None
    own: float | None = None
    mean_of_max: float | None = None
    reward: float | None = None
    low: float | None = None
    high: float | None = None
    perplexity: float | None = None
    pair_accuracy: float | None = None
    train_seconds: float | None = None
    train_resumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the seconds."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("train_")}


def read_rows(recipe: Recipe, output: Path, last: int) -> list[Row]:
    """The rows up to round `last`, all of whose stages are finished."""
    first = 0 if recipe.evaluation is not None else 1
    return [_row(recipe, RoundFolder(output, number), number) for number in range(first, last + 1)]


def write_tables(output: Path, rows: Sequence[Row]) -> None:
    """Write `rounds.json` and `table.md`."""
    values = {"rounds": [row.to_dict() for row in rows]}
    replace_text(output / "rounds.json", json.dumps(values, indent=2) + "\n")
    columns = _shown(_COLUMNS, rows)
    lines = [
        "| policy | " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {row.policy} | " + " | ".join(column.cell(row) or "-" for column in columns) + " |" for row in rows),
    ]
    legend = [f"- {column.title}: {column.meaning}." for column in columns]
    replace_text(output / "table.md", "\n".join([*lines, "", *legend]) + "\n")


def rows_table(rows: Sequence[Row]) -> Table:
    """For the terminal, with the seconds of training."""
    columns = _shown([*_COLUMNS[1:], _SECONDS], rows)  # without the groups, to fit 80 columns
    table = Table(box=box.SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for column in columns:
        width = max(len(text) for text in (*column.title.split(), *map(column.cell, rows)))
        table.add_column(column.title, justify="right", min_width=width)
    for row in rows:
        table.add_row(row.policy, *(column.cell(row) or "-" for column in columns))
    return table


def _shown(columns: Sequence[_Column], rows: Sequence[Row]) -> list[_Column]:
    """Those with something in them; `own` says nothing where the policy wrote all candidates."""
    all_own = all(row.own == row.candidates for row in rows)
    return [column for column in columns if any(map(column.cell, rows)) and not (column.title == "own" and all_own)]


def _row(recipe: Recipe, folder: RoundFolder, number: int) -> Row:
    facts: dict[str, Any] = {}
    if number > 0:
        report = read_object(folder.path / "scored.report.json")
        data = read_object(folder.path / "run" / "data_report.json")
        training = folder.finished()["train"]
        facts = {
            "groups": data["train"]["groups_kept"],
            "candidates": report["mean"],
            "own": _own_mean(recipe, report["sources"], number),
            "mean_of_max": report["mean_of_max"],
            "train_seconds": training["seconds"],
            "train_resumed": training["resumed"],
        }
    if recipe.evaluation is not None:
        facts |= _evaluated(folder.path / "evaluation", policy_name(number))
    return Row(policy_name(number), **facts)


def _own_mean(recipe: Recipe, sources: dict[str, dict[str, float]], number: int) -> float | None:
    """Mean score of the responses that the policy of the round before wrote."""
    assert recipe.sampling is not None
    names = {source_of(entry, number) for entry in recipe.sampling.candidates if is_current_policy(entry)}
    present = [sources[name] for name in sorted(names & sources.keys())]
    count = sum(source["count"] for source in present)
    return sum(source["mean"] * source["count"] for source in present) / count if count else None


def _evaluated(folder: Path, policy: str) -> dict[str, float | None]:
    """What an evaluation's folder says of one policy."""
    numbers = read_evaluation(folder).numbers
    result = numbers.policies[policy]
    reward = result.rewards.get(str(numbers.headline))
    return {
        **({} if reward is None else {"reward": reward.mean, "low": reward.low, "high": reward.high}),
        "perplexity": result.perplexity,
        "pair_accuracy": None if result.preference is None else result.preference.pair_accuracy.mean,
    }


@dataclass(frozen=True)
class _Column:
    title: str
    meaning: str
    cell: Callable[[Row], str]


def _number(name: str, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return cell


def _interval(row: Row) -> str:
    if row.reward is None:
        return ""
    return f"{row.reward:.3f}" + ("" if row.low is None else f" [{row.low:.3f}, {row.high:.3f}]")


def _seconds(row: Row) -> str:
    if row.train_seconds is None:
        return ""
    return f"{'>' if row.train_resumed else ''}{row.train_seconds:.0f}"


_COLUMNS = (
    _Column("groups", "groups of candidates that the policy was trained on", _number("groups", ",d")),
    _Column("mean", "mean score of all scored candidates", _number("candidates", ".3f")),
    _Column("own", "mean score of those that the policy before it wrote", _number("own", ".3f")),
    _Column("mean of max", "mean over groups of the best candidate's score", _number("mean_of_max", ".3f")),
    _Column("held-out reward", "on the evaluation's prompts, with its bootstrap interval", _interval),
    _Column("ppl", "perplexity of its answers to them under the evaluation's judge", _number("perplexity", ".2f")),
    _Column("pairs", "share of labelled pairs that its p_i orders right", _number("pair_accuracy", ".3f")),
)
_SECONDS = _Column("train s", "seconds of training; > where it was resumed", _seconds)
