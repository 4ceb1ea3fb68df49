"""People's ranks: a blind and shuffled sheet out, filled copies in, their merged scores and how far people agree.

A sheet has a row for each response: group, label, prompt, response, and an empty rank. It says nothing of
sources or scores; its key, a file of its own, says which label is which response. 1 is the best rank, equal
ranks are ties, and an empty rank is no answer. In a CSV sheet a text that a spreadsheet would run as a formula
has an apostrophe in front, which spreadsheets show as text; only group, label and rank are read back.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf_peft.data import transcript
from rrhf_peft.files import replace_text
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.score.combine import GroupScores, share_beaten
from rrhf_peft.score.judge import letter_label

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe
    from rrhf_peft.recipe.stages import HumanScorer

COLUMNS = ("group", "label", "prompt", "response", "rank")

#: Ranks of one annotator: group -> response index -> rank. Unranked responses are left out.
Ranks = dict[int, dict[int, float]]


class PeopleScores:
    """People's merged ranks over candidates; the sheets are read when it is made."""

    def __init__(self, section: HumanScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        texts, sizes = texts_of(groups), [len(group.responses) for group in groups]
        annotators = [read_ranks(Path(file), Path(section.sheet), texts) for file in section.annotations]
        self.merged = dict(zip((group.index for group in groups), merged_scores(annotators, sizes), strict=True))
        self.agreement: Agreement = agreement(annotators, sizes)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """Merged ranks; a response that nobody ranked has none."""
        merged = [self.merged[group.index] for group in groups]
        return [
            GroupScores(scores, {index: "not ranked" for index, score in enumerate(scores) if score is None})
            for scores in merged
        ]


# ---- the sheet ----


def texts_of(groups: Sequence[RankedGroup]) -> list[tuple[str, list[str]]]:
    """(prompt, responses) of each group, as people read them."""
    return [(transcript(group.prompt), group.responses) for group in groups]


def write_sheet(path: Path, groups: Sequence[tuple[str, Sequence[str]]], seed: int) -> None:
    """Write the sheet for (prompt, responses) groups, and its key beside it; the key first.

    Raises:
        UserError: the sheet is already there (it may hold answers), a file of the key's name is and it is not this
            sheet's key, or the place cannot be written to.
    """
    if path.exists():
        raise UserError(
            f"{path}: already exists and may hold answers. Name filled copies in scoring.scorer.annotations, or remove "
            "it to write it anew."
        )
    key = _key(groups, seed)
    if key_path(path).exists() and not _is_text(key_path(path), key):
        raise UserError(
            f"{key_path(path)}: already exists, and it is not the key of this sheet, which would stand there. Name "
            "another scoring.scorer.sheet, or move that file away."
        )
    rows = sheet_rows(groups, seed)
    replace_text(key_path(path), key)
    replace_text(path, _as_csv(rows) if path.suffix == ".csv" else _as_jsonl(rows))


def sheet_rows(
    groups: Sequence[tuple[str, Sequence[str]]], seed: int, ranks: Ranks | None = None
) -> list[dict[str, Any]]:
    """The rows of the sheet for (prompt, responses) groups, with one annotator's ranks where there are such."""
    rows = []
    for number, (prompt, responses) in enumerate(groups):
        for position, index in enumerate(_shuffled(len(responses), seed, number)):
            rank = (ranks or {}).get(number, {}).get(index)
            values = (_group_name(number), letter_label(position), prompt, responses[index], rank)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def is_handed_out(path: Path, groups: Sequence[tuple[str, Sequence[str]]], seed: int) -> bool:
    """Whether the sheet of these very groups is there with its key, filled or not."""
    return path.exists() and _is_text(key_path(path), _key(groups, seed))


def key_path(sheet: Path) -> Path:
    """The file that says which label is which response; not for annotators."""
    return sheet.with_name(f"{sheet.stem}.key.jsonl")


def _key(groups: Sequence[tuple[str, Sequence[str]]], seed: int) -> str:
    entries = (
        {"group": _group_name(number), "order": _shuffled(len(texts), seed, number), "digest": _digest(prompt, texts)}
        for number, (prompt, texts) in enumerate(groups)
    )
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _shuffled(count: int, seed: int, number: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {number}").shuffle(order)
    return order


def _is_text(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


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
    responses = _labelled_responses(sheet, groups)
    ranks: Ranks = {}
    seen: dict[tuple[str, str], int] = {}
    for line, row in _rows(path):
        name, label, rank = (row[column] for column in ("group", "label", "rank"))
        if not (isinstance(name, str) and isinstance(label, str)) or (name, label) not in responses:
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
            group, index = responses[name, label]
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
            f"{where}: the rank {value!r} is no number from 1 (best) up. Correct it, or empty it for no answer."
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
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{line}: is not JSON. Undo the change.") from None
        if not isinstance(row, dict) or not {"group", "label", "rank"} <= row.keys():
            raise UserError(f"{path}:{line}: a row needs the keys group, label and rank. Undo the change.")
        yield line, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # responses may be long
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # spreadsheets of some countries save semicolons
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        missing = [column for column in ("group", "label", "rank") if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}:1: the column {missing[0]!r} is missing. Keep the sheet's first line as it was.")
        line = 2
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{line}: has not as many cells as the first line. Undo the change.")
            if any(row.values()):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: is not CSV ({error}). Undo the change.") from None


def _labelled_responses(
    sheet: Path, groups: Sequence[tuple[str, Sequence[str]]]
) -> dict[tuple[str, str], tuple[int, int]]:
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: is not the key that was written with {sheet}. Put that one back.") from None
    responses = {}
    for number, (name, order, digest) in enumerate(keys):
        if number >= len(groups) or digest != _digest(*groups[number]):
            raise UserError(
                f"{path}:{number + 1}: group {name} of the sheet is not that group of scoring.input. Score the data "
                "that the sheet was made from."
            )
        for position, index in enumerate(order):
            responses[name, letter_label(position)] = (number, index)
    return responses


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO(newline="")
    # Lines end as RFC 4180 has it: only what ends a line is quoted where it stands in a text.
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: as_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


#: What makes spreadsheets compute a cell instead of showing it; the wide forms count in East Asian ones.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def as_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs: what would be a formula, or begins with apostrophes and then one, gets one
    apostrophe in front. Taking that one away again gives the text back.
    """
    if isinstance(value, str) and value.lstrip("'").startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value


def _as_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _group_name(number: int) -> str:
    return f"g{number + 1:05}"


def _digest(prompt: str, responses: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([prompt, *responses]).encode()).hexdigest()[:16]


# ---- several people ----


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on which of two responses is better.

    Attributes:
        comparisons: pairs of responses that two annotators both ranked, counted for each two annotators.
        same: share of them in which both say better, tied, or worse alike; None without comparisons.
        no_contradiction: share in which they do not prefer opposite responses.
        alpha: Krippendorff's alpha of the comparisons as ordinal values (worse, tied, better); None where it
            is not defined: nothing compared twice, or only one value given.
        answered: share of the responses that each annotator ranked.
    """

    comparisons: int
    same: float | None
    no_contradiction: float | None
    alpha: float | None
    answered: tuple[float, ...]


def merged_scores(annotators: Sequence[Ranks], sizes: Sequence[int]) -> list[list[float | None]]:
    """Per group (of `sizes` responses) the mean over annotators of the share of the others a response beats.

    An annotator counts for a group where at least two of its responses have a rank; of the others nothing
    is compared. None for a response that nobody ranked.
    """
    merged: list[list[float | None]] = []
    for group, size in enumerate(sizes):
        given: list[list[float]] = [[] for _ in range(size)]
        for ranks in annotators:
            given_ranks = ranks.get(group, {})
            if len(given_ranks) >= 2:
                shares = share_beaten([-given_ranks[index] if index in given_ranks else None for index in range(size)])
                for index, share in enumerate(shares):
                    if share is not None:
                        given[index].append(share)
        merged.append([math.fsum(shares) / len(shares) if shares else None for shares in given])
    return merged


def agreement(annotators: Sequence[Ranks], sizes: Sequence[int]) -> Agreement:
    """Compare every two annotators on every pair of responses that both ranked.

    Raises:
        UserError: the package for Krippendorff's alpha is not installed (only asked for with two annotators).
    """
    pairs = [(group, *pair) for group, size in enumerate(sizes) for pair in itertools.combinations(range(size), 2)]
    relations = [[_relation(ranks.get(group, {}), a, b) for group, a, b in pairs] for ranks in annotators]
    both = [
        (one, other)
        for first, second in itertools.combinations(relations, 2)
        for one, other in zip(first, second, strict=True)
        if one is not None and other is not None
    ]
    responses = sum(sizes)
    return Agreement(
        comparisons=len(both),
        same=sum(one == other for one, other in both) / len(both) if both else None,
        no_contradiction=sum(one * other >= 0 for one, other in both) / len(both) if both else None,
        alpha=_alpha(relations) if both else None,
        answered=tuple(sum(map(len, ranks.values())) / max(1, responses) for ranks in annotators),
    )


def _relation(ranks: dict[int, float], a: int, b: int) -> int | None:
    """1 where `a` is better, -1 where `b` is, 0 for a tie; None where one has no rank."""
    if a not in ranks or b not in ranks:
        return None
    return (ranks[a] < ranks[b]) - (ranks[a] > ranks[b])


def _alpha(relations: Sequence[Sequence[int | None]]) -> float | None:
    try:
        import krippendorff
    except ModuleNotFoundError:
        raise UserError(
            "Krippendorff's alpha needs a package that is not installed: pip install 'rrhf-peft[human]'."
        ) from None
    data = [[math.nan if value is None else float(value) for value in row] for row in relations]
    values = {value for row in relations for value in row if value is not None}
    if len(values) < 2:  # without variation there is nothing that chance could explain
        return None
    return float(krippendorff.alpha(reliability_data=data, level_of_measurement="ordinal", value_domain=[-1, 0, 1]))
