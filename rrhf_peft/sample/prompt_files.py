"""The prompts to sample for, with the responses that they came with.

.txt            one prompt on each line
.json           a list of strings
other files     records with `prompt` alone, with `responses` (and `sources`, and `scores`), or ranked
                data in any format that `rrhf_peft.data` knows
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf_peft.data import read_groups
from rrhf_peft.data.importers import check_format, importer_for
from rrhf_peft.data.places import rows_of
from rrhf_peft.data.rows import Row
from rrhf_peft.records import Message, UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `responses`, `sources` and `scores` (None where unknown) are what it came with.

    `index` is its place among all prompts of the run, and part of the names of its random streams.
    """

    index: int
    prompt: str | list[Message]
    responses: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def read_prompts(
    where: str | Sequence[str], *, format: str = "auto", split: str = "train", max_prompts: int | None = None
) -> list[Prompt]:
    """Read all prompts of all places, in order.

    Raises:
        UserError: names file, line and field; or there is no prompt at all.
    """
    if format != "auto":
        check_format(format)
    found: list[Prompt] = []
    for place in [where] if isinstance(where, str) else where:
        for item in _prompts_of(place, format, split):
            found.append(Prompt(len(found), **item))
            if len(found) == max_prompts:
                return found
    if not found:
        raise UserError("sampling.prompts: no prompts were found. Name a file that holds some.")
    return found


def _prompts_of(where: str, format: str, split: str) -> Iterator[dict[str, Any]]:
    path = Path(where).expanduser()
    if path.suffix == ".txt":
        yield from _lines(path)
        return
    strings = _strings(path) if path.suffix == ".json" and format == "auto" else None
    if strings is not None:
        for row, text in enumerate(strings):
            yield {"prompt": text, "meta": {"file": str(path), "row": row}}
        return
    first = next(iter(rows_of(where, split=split)))
    if format == "auto" and first.has("responses") and not first.has("scores"):
        yield from map(_unscored, rows_of(where, split=split))
    elif format == "auto" and first.has("prompt") and not _is_ranked(first):
        for record in rows_of(where, split=split):
            yield {"prompt": record.prompt("prompt"), "meta": record.meta(("prompt",))}
    else:
        for group in read_groups(where, format=format, split=split):
            yield {
                "prompt": group.prompt,
                "responses": list(group.responses),
                "sources": list(group.sources),
                "scores": list(group.scores),
                "meta": dict(group.meta),
            }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield {"prompt": line.rstrip("\r"), "meta": {"file": str(path), "line": number}}


def _strings(path: Path) -> list[str] | None:
    """The strings of a JSON list of strings; None where the file is something else, or wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None  # the reader of records says what is wrong with it
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        return None
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{path}: row {row} (from 0) is not text, although the first row is. Mend it.")
    return values


def _unscored(row: Row) -> dict[str, Any]:
    """A row of responses without scores, as sampling itself writes them."""
    responses = row.texts("responses")
    sources = row.texts("sources") if row.has("sources") else [f"response-{i}" for i in range(len(responses))]
    if len(sources) != len(responses):
        raise row.problem(f"sources has {len(sources)} entries for {len(responses)} responses. Mend that row.")
    return {
        "prompt": row.prompt("prompt"),
        "responses": responses,
        "sources": sources,
        "scores": [None] * len(responses),
        "meta": row.meta(("prompt", "responses", "sources", "meta")),
    }


def _is_ranked(row: Row) -> bool:
    try:
        importer_for(row, "auto")
    except UserError:
        return False
    return True
