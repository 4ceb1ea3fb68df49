"""What is to be scored: candidate files as sampling writes them, or ranked data in any known format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rrhf_peft.data import read_groups
from rrhf_peft.records import RankedGroup

#: Columns that stand elsewhere in the output.
_NOT_META = ("raw_scores", "meta", "left_out", "group_kept")


def read_candidates(
    where: str | Sequence[str], *, format: str = "auto", split: str = "train", max_groups: int | None = None
) -> list[RankedGroup]:
    """Read all groups of all places, in order.

    A file whose first row has responses and no scores holds candidates; all others are ranked data.

    Returns:
        Groups whose `columns` are `raw_scores`, the scores that the input brought along by name, its own column
        being ``input``; and `meta`, whatever else the input said.

    Raises:
        UserError: names file, line and field; or there is nothing to score.
    """
    groups = read_groups(where, format=format, split=split, max_groups=max_groups, needs="responses")
    return [replace(group, columns=_columns(group)) for group in groups]


def _columns(group: RankedGroup) -> dict[str, Any]:
    meta = {name: value for name, value in group.columns.items() if name not in _NOT_META}
    nested = group.columns.get("meta")
    meta.update(nested if isinstance(nested, dict) else {})
    raw = _raw_scores(group.columns.get("raw_scores"), len(group.responses))
    if group.responses and None not in group.scores:
        raw["input"] = list(group.known_scores)
    return {"raw_scores": raw, "meta": meta}


def _raw_scores(value: Any, count: int) -> dict[str, list[float]]:
    """Earlier raw scores that are complete; a column that lacks one says nothing that could be kept."""
    if not isinstance(value, dict):
        return {}
    return {
        name: [float(score) for score in scores]
        for name, scores in value.items()
        if isinstance(scores, list)
        and len(scores) == count
        and all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores)
    }
