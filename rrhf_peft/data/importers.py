"""Rows into ranked groups: which function reads which format, and how `auto` tells formats apart.

To add a format: one function in `list_formats` (a prompt with a list of responses), `pair_formats` (two responses)
or `gathered_formats` (a group over several rows), one line in `IMPORTERS`, one test, and its name in the recipe
schema. Importers keep every response, order, score and tie as the file has it; ranks become scores, higher is
better; what has no rating is kept apart and never becomes a number.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from rrhf_peft.data import gathered_formats, list_formats, pair_formats
from rrhf_peft.data.rows import Row
from rrhf_peft.records import RankedGroup, UserError


class Importer(NamedTuple):
    """A format: how the rows of a file are read, and how its columns look.

    Attributes:
        read: The rows of one file into groups.
        columns: The sets of columns that it can read; further columns go to the group's `meta`.
        recognises: What `auto` asks beyond the columns.
    """

    read: Callable[[Iterable[Row]], Iterable[RankedGroup]]
    columns: tuple[tuple[str, ...], ...]
    recognises: Callable[[Row], bool] = lambda row: True


def _each(read: Callable[[Row], RankedGroup]) -> Callable[[Iterable[Row]], Iterable[RankedGroup]]:
    """The reader of a format in which every row is a group."""
    return partial(map, read)


def _is_scored_list(row: Row) -> bool:
    output = row.values.get("output")
    return row.has("instances") or (isinstance(output, list) and all(isinstance(answer, dict) for answer in output))


def _oasst(rows: Iterable[Row]) -> Iterable[RankedGroup]:
    """Trees or flat messages, whichever the file's first row shows."""
    rows = iter(rows)
    first = next(rows)
    read = gathered_formats.oasst_messages if first.has("message_id") else gathered_formats.oasst_trees
    return read(row for own in ([first], rows) for row in own)


_PKU = ("prompt", "response_0", "response_1")

#: Format name -> importer, in the order in which `auto` tries them. A name with a colon is a variant that
#: takes another judgement from the same columns; `auto` takes the one before it.
IMPORTERS: dict[str, Importer] = {
    "ranked": Importer(_each(list_formats.ranked), (("prompt", "responses", "scores"),)),
    "rrhf": Importer(_each(list_formats.rrhf), (("query", "responses", "scores"), ("prompt", "response", "scores"))),
    "rm_static": Importer(_each(pair_formats.rm_static), (("prompt", "response", "chosen", "rejected"),)),
    "llama_factory": Importer(
        _each(pair_formats.llama_factory),
        (("instruction", "chosen", "rejected"), ("conversations", "chosen", "rejected")),
        lambda row: not row.has("prompt") and not isinstance(row.values["chosen"], list),
    ),
    "hh": Importer(_each(pair_formats.hh), (("chosen", "rejected"),), pair_formats.are_transcripts),
    "preference": Importer(_each(pair_formats.preference), (("prompt", "chosen", "rejected"), ("chosen", "rejected"))),
    "ultrafeedback": Importer(_each(list_formats.ultrafeedback), (("instruction", "completions"),)),
    "nectar": Importer(_each(list_formats.nectar), (("prompt", "answers"),)),
    "helpsteer2": Importer(
        gathered_formats.helpsteer2,
        (("prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"),),
    ),
    "summarize_comparisons": Importer(_each(pair_formats.summarize_comparisons), (("info", "summaries", "choice"),)),
    "stack_exchange_paired": Importer(
        gathered_formats.stack_exchange_paired, (("question", "response_j", "response_k"),)
    ),
    "shp": Importer(
        gathered_formats.shp,
        (("post_id", "history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),),
    ),
    "pku_saferlhf": Importer(_each(pair_formats.pku_saferlhf), ((*_PKU, "better_response_id"),)),
    "pku_saferlhf:safer": Importer(
        _each(partial(pair_formats.pku_saferlhf, by="safer_response_id")), ((*_PKU, "safer_response_id"),)
    ),
    "pro": Importer(list_formats.pro, (("prefix", "suffix", "reward"),)),
    "oasst": Importer(_oasst, (("message_tree_id", "prompt"), ("message_id", "parent_id", "text", "role", "rank"))),
    "alpaca_farm": Importer(_each(pair_formats.alpaca_farm), (("instruction", "output_1", "output_2", "preference"),)),
    "lmflow": Importer(list_formats.lmflow, (("instances",), ("input", "output")), _is_scored_list),
}


def importer_for(row: Row, format: str) -> Importer:
    """The importer of `format`; for ``auto`` the first one whose columns and look this row has.

    Raises:
        UserError: unknown format, or the columns do not fit; names the columns found and the nearest format.
    """
    if format == "auto":
        for importer in IMPORTERS.values():
            if _fits(row, importer) and importer.recognises(row):
                return importer
        nearest = max(IMPORTERS, key=lambda name: _likeness(row, name))
        raise row.problem(
            f"no format fits the columns {_listed(row.values)}. The nearest, {_what_is_missing(row, nearest)}"
        )
    check_format(format)
    if not _fits(row, IMPORTERS[format]):
        others = [name for name, other in IMPORTERS.items() if _fits(row, other) and other.recognises(row)]
        hint = f" They fit format {others[0]}." if others else ""
        raise row.problem(f"the columns are {_listed(row.values)}; {_what_is_missing(row, format)}{hint}")
    return IMPORTERS[format]


def check_format(format: str) -> None:
    """Raise `UserError` unless `format` is ``auto`` or the name of an importer."""
    known = ["auto", *IMPORTERS]
    if format not in known:
        nearest = difflib.get_close_matches(format, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known formats: {', '.join(known)}."
        raise UserError(f"format {format!r}: there is no such importer; {hint}")


def _fits(row: Row, importer: Importer) -> bool:
    return any(all(name in row.values for name in columns) for columns in importer.columns)


def _likeness(row: Row, format: str) -> float:
    return max(_column_likeness(row, columns) for columns in IMPORTERS[format].columns)


def _column_likeness(row: Row, columns: tuple[str, ...]) -> float:
    """How far the row's columns resemble these, from 0 to 1."""
    best = [
        max((difflib.SequenceMatcher(None, name, found).ratio() for found in row.values), default=0.0)
        for name in columns
    ]
    return sum(best) / len(best)


def _what_is_missing(row: Row, format: str) -> str:
    """What the format needs and this row has not, with the nearest column for each."""
    columns = max(IMPORTERS[format].columns, key=lambda columns: _column_likeness(row, columns))
    missing = []
    for name in columns:
        if name not in row.values:
            unused = [found for found in row.values if found not in columns]
            nearest = difflib.get_close_matches(name, unused, n=1, cutoff=0.6)
            missing.append(name + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    return f"format {format}, needs {_listed(columns)} and misses {', '.join(missing)}. Rename the columns."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "(none)"
