"""Ranked groups in and out: any supported place in, our own JSON Lines out, and a split by prompt."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rrhf_peft.data.arrow import GroupTable, contents_hash, fingerprint, stored_groups
from rrhf_peft.data.formats import IMPORTERS, check_format, importer_for, unranked
from rrhf_peft.data.rows import UNRATED, Row, data_path, rows_of, size_and_origin
from rrhf_peft.files import check_output, replace_text, write_files
from rrhf_peft.records import RankedGroup, UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


#: Bytes of text up to which groups are held as objects, which take about ten times as much.
HELD_IN_MEMORY = 2**25


def read_groups(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    split: str = "train",
    revision: str | None = None,
    max_groups: int | None = None,
    needs: Literal["scores", "responses", "prompt"] = "scores",
) -> list[RankedGroup]:
    """Read groups from files, folders and hub ids, in order.

    Args:
        where: A file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a folder of them, a folder that
            ``datasets`` saved, or a hub id (``owner/name`` or ``owner/name:config``); or several.
        format: Name of an importer; ``auto`` recognises each file by the columns of its first row.
        split: Split of hub ids and folders; single files are read whole.
        revision: Hub branch, tag or commit.
        max_groups: Read only the first this many groups.
        needs: What a row must have. ``responses`` also takes rows without scores, as sampling writes them; ``prompt``
            also takes prompts alone: rows, .txt files with one on each line, and .json lists of strings.

    Returns:
        The groups as the files have them, nothing cleaned. ``columns`` holds the columns that the format
        does not use, and responses without a rating (``unrated``).

    Raises:
        UserError: names the file, line and field, and what to do.
    """
    return list(_stream(where, format, split, revision, max_groups, needs))


def open_groups(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    split: str = "train",
    revision: str | None = None,
    max_groups: int | None = None,
    needs: Literal["scores", "responses", "prompt"] = "scores",
) -> Sequence[RankedGroup]:
    """The same groups as `read_groups` reads; those of large data stay on disk (`GroupTable`)."""
    places = [os.fspath(where)] if isinstance(where, (str, os.PathLike)) else [os.fspath(place) for place in where]
    contents = [size_and_origin(place, split=split, revision=revision) for place in places]

    def stream() -> Iterator[RankedGroup]:
        return _stream(places, format, split, revision, max_groups, needs)

    if sum(size for size, _ in contents) <= HELD_IN_MEMORY:
        return list(stream())
    hashes = [origin if isinstance(origin, str) else contents_hash(origin) for _, origin in contents]
    return stored_groups(stream, fingerprint(hashes, places, format, split, revision, max_groups, needs))


def _stream(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    format: str,
    split: str,
    revision: str | None,
    max_groups: int | None,
    needs: str,
) -> Iterator[RankedGroup]:
    check_format(format)
    paths = [where] if isinstance(where, (str, os.PathLike)) else where
    if not paths:
        raise UserError("no data was named. Give at least one file, folder or hub id.")
    read = chain.from_iterable(_groups_of(os.fspath(path), format, split, revision, needs) for path in paths)
    index = -1
    for index, group in enumerate(islice(read, max_groups)):
        yield group if group.index == index else replace(group, index=index)
    if index < 0:
        raise UserError(
            f"{', '.join(map(str, paths))}: no group was found in the rows of format {format}. Check that some have "
            "ratings or ranks."
        )


def _groups_of(where: str, format: str, split: str, revision: str | None, needs: str) -> Iterator[RankedGroup]:
    if needs == "prompt" and format == "auto" and (path := data_path(where)).is_file():
        texts = _lines(path) if path.suffix == ".txt" else _strings(path)
        if texts is not None:
            for origin, text in texts:
                yield RankedGroup(text, origin={"file": where, **origin})
            return
    rows = rows_of(where, split=split, revision=revision)
    for _, file in groupby(rows, key=lambda row: row.file):
        rest = iter(file)
        first = next(rest)
        read = _reader(first, format, needs)
        yield from read(chain([first], rest if format == "auto" else _fitting(rest, format)))


def _reader(first: Row, format: str, needs: str) -> Callable[[Iterable[Row]], Iterable[RankedGroup]]:
    """What reads a file with this first row."""
    if format == "auto" and needs != "scores":
        if first.has("responses") and not first.has("scores"):
            return lambda rows: map(unranked, rows)
        if needs == "prompt" and first.has("prompt") and not _is_ranked(first):
            return lambda rows: map(unranked, rows)
    importer = importer_for(first, format)
    if needs != "scores" and importer is IMPORTERS["ranked"]:
        return lambda rows: map(unranked, rows)
    return importer.read


def _is_ranked(row: Row) -> bool:
    try:
        importer_for(row, "auto")
    except UserError:
        return False
    return True


def _fitting(rows: Iterable[Row], format: str) -> Iterator[Row]:
    """The rows, each checked to have the columns of a format that was named."""
    for row in rows:
        importer_for(row, format)
        yield row


def _lines(path: Path) -> Iterator[tuple[dict[str, int], str]]:
    """The lines of a text file that are not empty, each with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield {"line": number}, line.rstrip("\r")


def _strings(path: Path) -> list[tuple[dict[str, int], str]] | None:
    """The strings of a JSON list of strings; None where the file is something else, or wrong."""
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None  # the reader of records says what is wrong with it
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        return None
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{path}: row {row} (from 0) is not text, although the first row is. Fix it.")
    return [({"row": row}, value) for row, value in enumerate(values)]


def write_ranked(path: str | os.PathLike[str], groups: Sequence[RankedGroup]) -> None:
    """Write groups as JSON Lines, whole or not at all: prompt, responses, scores, sources, and where it is known how
    the responses were sampled (`records.PER_RESPONSE`).

    ``datasets.load_dataset`` reads the file. ``columns`` are not written.

    Raises:
        UserError: no groups, text that is not Unicode, or an unwritable place.
    """
    replace_text(path, _ranked_lines(path, groups))


def _ranked_lines(path: str | os.PathLike[str], groups: Sequence[RankedGroup]) -> str:
    if not groups:
        raise UserError(f"{path}: there are no groups to write. Check the step that made them.")
    lines = []
    for index, group in enumerate(groups):
        group.known_scores  # noqa: B018 - a ranked file has all scores
        line = json.dumps(group.row(), ensure_ascii=False)
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{path}: group {index} holds text that is not Unicode. Fix it.") from None
        lines.append(line + "\n")
    return "".join(lines)


def hold_out(
    groups: Sequence[RankedGroup], size: int | float, seed: int
) -> tuple[Sequence[RankedGroup], Sequence[RankedGroup]]:
    """Split into (train, eval), both in the order of `groups`; the same arguments give the same split.

    Groups with the same prompt stay together, so that no evaluation prompt is trained on. `size` is
    therefore met exactly only as far as the prompts allow.

    Args:
        size: How many groups to hold out (int), or which share of them (float below 1, at least one group).

    Raises:
        UserError: `size` leaves no group to train on or none to evaluate on.
    """
    wanted = size if isinstance(size, int) else max(1, round(size * len(groups)))
    numbers: dict[bytes, int] = {}  # prompts in the order of their first groups
    prompt_of = array("q")
    for group in groups:
        digest = hashlib.blake2b(json.dumps(group.prompt).encode(), digest_size=12).digest()
        prompt_of.append(numbers.setdefault(digest, len(numbers)))
    sizes, prompts = Counter(prompt_of), list(range(len(numbers)))
    random.Random(seed).shuffle(prompts)
    held: set[int] = set()
    count = 0
    for prompt in prompts:
        if count + sizes[prompt] <= wanted and count + sizes[prompt] < len(groups):
            held.add(prompt)
            count += sizes[prompt]
    if not held or wanted >= len(groups):
        raise UserError(
            f"cannot hold out {size} of {len(groups)} groups with {len(prompts)} different prompts: both parts need "
            "a group, and the same prompt is never in both. Set data.eval_size lower, or name data.eval."
        )
    train = [index for index, prompt in enumerate(prompt_of) if prompt not in held]
    return _select(groups, train), _select(groups, [index for index, prompt in enumerate(prompt_of) if prompt in held])


@dataclass(frozen=True)
class PromptOverlap:
    """Prompts that are the same but for case, punctuation and white space.

    Attributes:
        repeated: Groups to train on whose prompt an earlier one has too.
        held_out: Held-out groups whose prompt is trained on.
        trained: Groups to train on whose prompt is held out.
    """

    repeated: int
    held_out: int
    trained: int

    def notes(self) -> list[str]:
        """What there is to tell of it."""
        notes = [f"{self.repeated:,} groups nearly repeat the prompt of an earlier one"] if self.repeated else []
        if self.held_out:
            notes.append(
                f"{self.held_out:,} held-out groups have a prompt that is also trained on, in {self.trained:,} groups; "
                "data.overlap: remove takes these out"
            )
        return notes


def prompt_overlap(train: Sequence[RankedGroup], held_out: Sequence[RankedGroup] = ()) -> PromptOverlap:
    """How far prompts repeat within the training data, and between it and the held-out data."""
    ours, theirs = _prompt_keys(train), _prompt_keys(held_out)
    return PromptOverlap(
        repeated=len(ours) - len(np.unique(ours)),
        held_out=int(np.isin(theirs, ours).sum()),
        trained=int(np.isin(ours, theirs).sum()),
    )


def without_overlap(train: Sequence[RankedGroup], held_out: Sequence[RankedGroup]) -> Sequence[RankedGroup]:
    """The groups to train on whose prompt is not held out, also not with other case, punctuation or white space.

    Raises:
        UserError: none is left.
    """
    stay = np.flatnonzero(~np.isin(_prompt_keys(train), _prompt_keys(held_out))).tolist()
    if not stay:
        raise UserError("data.overlap: remove leaves nothing to train on: every prompt of data.train is held out.")
    return _select(train, stay)


def _prompt_keys(groups: Iterable[RankedGroup]) -> np.ndarray:
    """uint64 [G], the same for prompts of the same words in the same order; of prompts without words, their text."""
    keys = array("Q")
    for group in groups:
        text = group.prompt if isinstance(group.prompt, str) else json.dumps(group.prompt, ensure_ascii=False)
        words = " ".join(re.findall(r"\w+", text.lower())) or text
        keys.append(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little"))
    return np.array(keys, dtype=np.uint64)


def _select(groups: Sequence[RankedGroup], indices: Sequence[int]) -> Sequence[RankedGroup]:
    return groups.select(indices) if isinstance(groups, GroupTable) else [groups[index] for index in indices]


@dataclass(frozen=True)
class ConversionReport:
    """What was read and written.

    Attributes:
        output: The file written.
        groups_read: Groups that the importer found.
        groups_written: Those with at least one rated response.
        groups_without_response: The rest: nothing in them was rated.
        responses_written: Responses of the groups written.
        unrated_responses: Responses without a rating, which are not written.
        single_response_groups: Groups written with one response: nothing to rank, but fine-tuning can use them.
        groups_without_order: Groups written with several responses that are all tied.
        sources: How many different sources wrote the responses.
        columns_left_out: What the rows said besides (`RankedGroup.columns`), by name; a ranked file does not keep it.
    """

    output: str
    groups_read: int
    groups_written: int
    groups_without_response: int
    responses_written: int
    unrated_responses: int
    single_response_groups: int
    groups_without_order: int
    sources: int
    columns_left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, fact in self._facts():
            table.add_row(Text(name), Text(fact))
        return table

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("written", self.output),
            ("groups", f"{self.groups_written:,} of {self.groups_read:,} read"),
        ]
        if self.groups_without_response:
            facts.append(("", f"- {self.groups_without_response:,} without a rated response, left out"))
        if self.single_response_groups:
            facts.append(("", f"{self.single_response_groups:,} have a single response, nothing to rank"))
        if self.groups_without_order:
            facts.append(("", f"{self.groups_without_order:,} have only ties"))
        facts.append(("responses", f"{self.responses_written:,}, by {self.sources:,} sources"))
        if self.unrated_responses:
            facts.append(("", f"- {self.unrated_responses:,} without a rating, left out"))
        if self.columns_left_out:
            facts.append(("not kept", f"{', '.join(self.columns_left_out)} (a ranked file has four columns)"))
        return facts


def convert(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    format: str = "auto",
    split: str = "train",
    revision: str | None = None,
    max_groups: int | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Read data in any format and write it as a ranked file, whole or not at all.

    A ranked file has the columns prompt, responses, scores and sources, and no others; what the source
    knew besides is named in the report and not kept. The other arguments are those of `read_groups`.

    Args:
        output: The file to write; its name ends in ``.jsonl``.
        overwrite: Replace an existing `output` that was converted before.

    Raises:
        UserError: the data cannot be read, nothing in it is rated, or `output` exists and was not converted before,
            is misnamed, is what is read, or cannot be written.
    """
    output = Path(output)
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: a ranked file is JSON Lines. Choose a name that ends in .jsonl.")
    sources = [where] if isinstance(where, (str, os.PathLike)) else where
    check_output(output, key="--output", reads=sources, overwrite=overwrite)
    groups = read_groups(where, format=format, split=split, revision=revision, max_groups=max_groups)
    written = [group for group in groups if group.responses]
    if not written:
        raise UserError(f"{output}: nothing to write, because none of the {len(groups)} groups has a rated response.")
    write_files(output, {output: _ranked_lines(output, written)}, verb="convert")
    return ConversionReport(
        output=str(output),
        groups_read=len(groups),
        groups_written=len(written),
        groups_without_response=len(groups) - len(written),
        responses_written=sum(len(group.responses) for group in written),
        unrated_responses=sum(len(group.columns.get(UNRATED, ())) for group in groups),
        single_response_groups=sum(len(group.responses) == 1 for group in written),
        groups_without_order=sum(len(group.responses) > 1 and len(set(group.scores)) == 1 for group in written),
        sources=len({source for group in written for source in group.sources}),
        columns_left_out=sorted({name for group in groups for name in group.columns} - {"instance", UNRATED}),
    )
