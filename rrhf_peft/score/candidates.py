"""What is to be scored, as sampling writes it or ranked data in any known format; and what a scorer says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rrhf_peft.data import read_groups
from rrhf_peft.records import RankedGroup, UserError


@dataclass
class GroupScores:
    """What one scorer says of one group.

    Attributes:
        scores: one per response, higher is better; None where there is none.
        failures: response index -> why there is none.
        aspects: further scores to keep with the raw ones, by name.
    """

    scores: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    aspects: dict[str, list[float | None]] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores groups; made from (its section of the recipe, the recipe, a seed, all groups)."""

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """One `GroupScores` for each group, in order."""

    def counts(self) -> dict[str, int]:
        """Running totals since the scorer was made, for the report: requests, truncated texts ..."""


def read_candidates(
    where: str | Sequence[str], *, format: str = "auto", split: str = "train", max_groups: int | None = None
) -> list[RankedGroup]:
    """Read all groups of all sources, in order.

    A file whose first row has responses and no scores holds candidates; all others are ranked data.

    Returns:
        Groups, some perhaps without responses, whose `columns` are `raw_scores`, the scores that the input brought
        along by name, its own column being ``input``; and `meta`, whatever else the input said.

    Raises:
        UserError: names file, line and field; or there is nothing to score.
    """
    groups = read_groups(where, format=format, split=split, max_groups=max_groups, needs="responses")
    if not any(group.responses for group in groups):
        raise UserError(
            f"none of the {len(groups)} groups has a response to score or rank. Name a file with prompts and responses."
        )
    return [replace(group, columns=_columns(group)) for group in groups]


#: Columns that stand elsewhere in the output.
_NOT_META = ("raw_scores", "meta", "left_out", "group_kept")


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
