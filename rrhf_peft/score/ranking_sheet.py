"""Ranking sheets for people: blind and shuffled ones out, filled ones in.

A sheet has a row for each response: group, label, prompt, response, and an empty rank. It says nothing
of sources or scores; its key, a file of its own, says which label is which response. 1 is the best
rank, equal ranks are ties, and an empty rank is no answer.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError
from rrhf_peft.score.labels import letter_label

COLUMNS = ("group", "label", "prompt", "response", "rank")

#: Ranks of one annotator: group -> response index -> rank. Unranked responses are left out.
Ranks = dict[int, dict[int, float]]


def write_sheet(path: Path, groups: Sequence[tuple[str, Sequence[str]]], seed: int) -> None:
    """Write the sheet for (prompt, responses) groups, and its key beside it; the key first.

    Raises:
        UserError: the sheet is already there (it may hold answers), or the place cannot be written to.
    """
    if path.exists():
        raise UserError(
            f"{path}: already exists and may hold answers. Name filled copies in scoring.scorer.annotations, or remove "
            "it to write it anew."
        )
    key_lines, rows = [], []
    for number, (prompt, responses) in enumerate(groups):
        order = list(range(len(responses)))
        random.Random(f"{seed} {number}").shuffle(order)
        key = {"group": _group_name(number), "order": order, "digest": _digest(prompt, responses)}
        key_lines.append(json.dumps(key) + "\n")
        for place, index in enumerate(order):
            values = (_group_name(number), letter_label(place), prompt, responses[index], None)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    replace_text(key_path(path), "".join(key_lines))
    replace_text(path, _as_csv(rows) if path.suffix == ".csv" else _as_jsonl(rows))


def key_path(sheet: Path) -> Path:
    """The file that says which label is which response; not for annotators."""
    return sheet.with_name(f"{sheet.stem}.key.jsonl")


def read_ranks(path: Path, sheet: Path, groups: Sequence[tuple[str, Sequence[str]]]) -> Ranks:
    """The ranks in one filled sheet.

    Args:
        path: the filled copy, .csv or .jsonl.
        sheet: the sheet that was handed out; its key lies beside it.
        groups: the same groups as the sheet was made from.

    Raises:
        UserError: names file, line and remedy: an unknown group or label, a rank that is no number from 1 up,
            a row twice; or the key is not that of these groups.
    """
    places = _places(sheet, groups)
    ranks: Ranks = {}
    seen: dict[tuple[str, str], int] = {}
    for line, row in _rows(path):
        name, label, rank = (row[column] for column in ("group", "label", "rank"))
        if (name, label) not in places:
            raise UserError(
                f"{path}:{line}: the sheet has no group {name!r} with a response {label!r}. Undo the change."
            )
        if (name, label) in seen:
            raise UserError(
                f"{path}:{line}: response {label} of group {name} stands here a second time (first in line "
                f"{seen[name, label]}). Keep one of the rows."
            )
        seen[name, label] = line
        if (value := _rank(rank, f"{path}:{line}")) is not None:
            group, index = places[name, label]
            ranks.setdefault(group, {})[index] = value
    return ranks


def _rank(value: Any, where: str) -> float | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    try:
        rank = float(text)
    except ValueError:
        rank = 0.0
    if isinstance(value, bool) or not 1 <= rank < 1e6:
        raise UserError(
            f"{where}: the rank {value!r} is no number from 1 (best) up. Mend it, or empty it for no answer."
        )
    return rank


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a filled sheet, columns checked."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check scoring.scorer.annotations.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text. Save the sheet as CSV in UTF-8.") from None
    if path.suffix == ".csv":
        yield from _csv_rows(text, path)
        return
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            row = json.loads(record)
        except ValueError:
            raise UserError(f"{path}:{line}: is not JSON. Undo the change.") from None
        if not isinstance(row, dict) or not {"group", "label", "rank"} <= row.keys():
            raise UserError(f"{path}:{line}: a row needs the keys group, label and rank. Undo the change.")
        yield line, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # spreadsheets of some countries save semicolons
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    missing = [column for column in ("group", "label", "rank") if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path}:1: the column {missing[0]!r} is missing. Keep the sheet's first line as it was.")
    line = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{line}: has not as many cells as the first line. Undo the change.")
            if any(row.values()):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: is not CSV ({error}). Undo the change.") from None


def _places(sheet: Path, groups: Sequence[tuple[str, Sequence[str]]]) -> dict[tuple[str, str], tuple[int, int]]:
    """(group name, label) -> (group, response index), from the key."""
    path = key_path(sheet)
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [(entry["group"], entry["order"], entry["digest"]) for entry in entries]
    except FileNotFoundError:
        raise UserError(
            f"{path}: the key of {sheet} is not there, so nobody knows which response is which. Put it back; it was "
            "written together with the sheet."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not the key that was written with {sheet}. Put that one back.") from None
    places = {}
    for number, (name, order, digest) in enumerate(keys):
        if number >= len(groups) or digest != _digest(*groups[number]):
            raise UserError(
                f"{path}:{number + 1}: group {name} of the sheet is not that group of scoring.input. Score the data "
                "that the sheet was made from."
            )
        for place, index in enumerate(order):
            places[name, letter_label(place)] = (number, index)
    return places


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _as_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _group_name(number: int) -> str:
    return f"g{number + 1:05}"


def _digest(prompt: str, responses: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([prompt, *responses]).encode()).hexdigest()[:16]
