"""What is to be scored: candidate files as sampling writes them, or ranked data in any known format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rrhf_peft.data import read_groups
from rrhf_peft.data.places import rows_of
from rrhf_peft.data.rows import Row
from rrhf_peft.records import Message, UserError


@dataclass(frozen=True, slots=True)
class Candidates:
    """One prompt with k responses, not scored yet.

    Attributes:
        index: position in the input.
        prompt: text or chat messages.
        responses: k texts.
        sources: who wrote each.
        raw_scores: scores that the input brought along, by name; its own column is ``input``.
        meta: whatever else the input said, without the place it was read from.
    """

    index: int
    prompt: str | list[Message]
    responses: list[str]
    sources: list[str]
    raw_scores: dict[str, list[float]]
    meta: dict[str, Any]


def read_candidates(
    where: str | Sequence[str], *, format: str = "auto", split: str = "train", max_groups: int | None = None
) -> list[Candidates]:
    """Read all groups of all places, in order.

    A file whose first row has responses and no scores holds candidates; all others are ranked data.

    Raises:
        UserError: names file, line and field; or there is nothing to score.
    """
    found: list[Candidates] = []
    for place in [where] if isinstance(where, str) else where:
        room = None if max_groups is None else max_groups - len(found)
        if room is None or room > 0:
            found += islice(_place(place, len(found), format, split, room), room)
    if not found:
        raise UserError("scoring.input: no groups were found to score. Name a file with prompts and responses.")
    return found


def _place(where: str, start: int, format: str, split: str, room: int | None) -> Iterator[Candidates]:
    first = next(iter(rows_of(os.fspath(where), split=split)), None)
    if format == "auto" and first is not None and first.has("responses") and not first.has("scores"):
        for index, row in enumerate(rows_of(os.fspath(where), split=split), start):
            yield _candidates(row, index)
        return
    groups = read_groups(where, format=format, split=split, max_groups=room)
    for index, group in enumerate(groups, start):
        meta = {name: value for name, value in group.meta.items() if name not in _NOT_META}
        nested = group.meta.get("meta")
        meta.update(nested if isinstance(nested, dict) else {})
        raw = {**_raw_scores(group.meta.get("raw_scores"), len(group.responses)), "input": list(group.scores)}
        yield Candidates(index, group.prompt, list(group.responses), list(group.sources), raw, meta)


#: Columns that stand elsewhere in the output, and the place of reading, which says nothing once rewritten.
_NOT_META = ("file", "line", "row", "raw_scores", "meta", "left_out", "group_kept")


def _candidates(row: Row, index: int) -> Candidates:
    responses = row.texts("responses")
    if row.has("sources"):
        sources = row.texts("sources")
        if len(sources) != len(responses):
            raise row.problem(
                f"sources has {len(sources)} entries for {len(responses)} responses. Name every response's source, or "
                "leave the column out."
            )
    else:
        sources = [f"response-{place}" for place in range(len(responses))]
    used = ("prompt", "responses", "sources")
    meta = {name: value for name, value in row.meta(used).items() if name not in _NOT_META}
    nested = row.values.get("meta")
    meta.update(nested if isinstance(nested, dict) else {})
    raw = _raw_scores(row.values.get("raw_scores"), len(responses))
    return Candidates(index, row.prompt("prompt"), responses, sources, raw, meta)


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
