"""What the report says of rounds (IP-n): reward from round to round, and every round's candidates."""

from __future__ import annotations

import itertools
import math
from typing import Any

from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.report.blocks import Paragraph, Pictures, Section, Table, TableRow, picture
from rrhf_peft.report.numbers import MISSING, estimate, is_number, number
from rrhf_peft.report.plots import rounds_figure
from rrhf_peft.report.runs import RoundsRun


def rounds_section(name: str, rounds: RoundsRun, anchor: str) -> Section:
    """One folder of rounds."""
    policies = [str(row["policy"]) for row in rounds.rows]
    rewards = [_reward(row) for row in rounds.rows]
    best = [row["mean_of_max"] if is_number(row.get("mean_of_max")) else None for row in rounds.rows]
    blocks: list[Any] = [Paragraph(sentence) for sentence in _in_words(policies, rewards)]
    blocks.append(_table(rounds.rows, policies, rewards))
    if sum(value is not None for value in rewards) + sum(value is not None for value in best) > 1:
        said = "; ".join(f"{policy}: {estimate(value)}" for policy, value in zip(policies, rewards, strict=True))
        figure = rounds_figure(policies, rewards, best, label=rounds.headline or "the scorer")
        caption = (
            "Held-out reward with its interval. The dashed line is the mean of each training group's best candidate, "
            "which the trained policy's reward is expected to approach."
        )
        blocks.append(Pictures([picture(figure, f"Reward by round. {said}.", caption)]))
    return Section(f"Rounds: {name}", anchor, blocks)


def _in_words(policies: list[str], rewards: list[Interval | None]) -> list[str]:
    measured = [(policy, value) for policy, value in zip(policies, rewards, strict=True) if value is not None]
    if len(measured) < 2:
        return []
    (first, then), (last, now) = measured[0], measured[-1]
    rises = sum(b.mean > a.mean for (_, a), (_, b) in itertools.pairwise(measured))
    return [
        f"Held-out reward went from {estimate(then)} ({first}) to {estimate(now)} ({last}); it rose in {rises} of "
        f"{len(measured) - 1} rounds."
    ]


def _table(rows: list[dict[str, Any]], policies: list[str], rewards: list[Interval | None]) -> Table:
    columns = {
        "groups": [number(row["groups"], ",.0f") if is_number(row.get("groups")) else MISSING for row in rows],
        "candidates": [_cell(row, "candidates") for row in rows],
        "own candidates": [_cell(row, "own") for row in rows],
        "mean of max": [_cell(row, "mean_of_max") for row in rows],
        "held-out reward": [estimate(value, ".3f") for value in rewards],
        "perplexity": [_cell(row, "perplexity", ".2f") for row in rows],
    }
    meanings = {
        "candidates": "mean score of the responses that the policy was trained on",
        "own candidates": "of those that the policy before it wrote",
        "mean of max": "mean over groups of the best score",
    }
    kept = {title: cells for title, cells in columns.items() if any(cell != MISSING for cell in cells)}
    lines = [TableRow([policy, *(cells[place] for cells in kept.values())]) for place, policy in enumerate(policies)]
    return Table(["policy", *kept], lines, [(title, text) for title, text in meanings.items() if title in kept])


def _cell(row: dict[str, Any], key: str, form: str = ".3f") -> str:
    return number(row[key], form) if is_number(row.get(key)) else MISSING


def _reward(row: dict[str, Any]) -> Interval | None:
    mean, low, high = (row[key] if is_number(row.get(key)) else math.nan for key in ("reward", "low", "high"))
    return None if math.isnan(mean) else Interval(mean, low, high)
