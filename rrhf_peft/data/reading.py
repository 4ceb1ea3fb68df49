"""Ranked groups in and out: any supported place in, our own JSON Lines out, and a split by prompt."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice

from rrhf_peft.data.importers import check_format, importer_for
from rrhf_peft.data.places import rows_of
from rrhf_peft.data.rows import Row
from rrhf_peft.files import replace_text
from rrhf_peft.records import RankedGroup, UserError


def read_groups(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    split: str = "train",
    revision: str | None = None,
    max_groups: int | None = None,
) -> list[RankedGroup]:
    """Read ranked groups from files, folders and hub ids, in order.

    Args:
        where: A file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a folder of them, a folder that
            ``datasets`` saved, or a hub id (``owner/name`` or ``owner/name:config``); or several.
        format: Name of an importer; ``auto`` recognises each file by the columns of its first row.
        split: Split of hub ids and folders; single files are read whole.
        revision: Hub branch, tag or commit.
        max_groups: Read only the first this many groups.

    Returns:
        The groups as the files have them, nothing cleaned. ``meta`` holds the columns that the format
        does not use, responses without a rating (``unrated``), and the origin: ``file``, and ``line`` (from 1)
        or ``row`` (from 0).

    Raises:
        UserError: names the file, line and field, and what to do.
    """
    check_format(format)
    places = [where] if isinstance(where, (str, os.PathLike)) else where
    if not places:
        raise UserError("no data was named. Give at least one file, folder or hub id.")
    rows = chain.from_iterable(rows_of(os.fspath(place), split=split, revision=revision) for place in places)
    groups = list(islice(_groups(rows, format), max_groups))
    if not groups:
        raise UserError(
            f"{', '.join(map(str, places))}: no group was found in the rows of format {format}. Check that some have "
            "ratings or ranks."
        )
    return groups


def _groups(rows: Iterable[Row], format: str) -> Iterator[RankedGroup]:
    """The groups of each file, read by the importer that its first row calls for."""
    for _, file in groupby(rows, key=lambda row: row.file):
        own = iter(file)
        first = next(own)
        importer = importer_for(first, format)
        yield from importer.read(chain([first], own if format == "auto" else _fitting(own, format)))


def _fitting(rows: Iterable[Row], format: str) -> Iterator[Row]:
    """The rows, each checked to have the columns of a format that was named."""
    for row in rows:
        importer_for(row, format)
        yield row


def write_ranked(path: str | os.PathLike[str], groups: Sequence[RankedGroup]) -> None:
    """Write groups as JSON Lines with exactly the columns prompt, responses, scores, sources; whole or not at all.

    ``datasets.load_dataset`` reads the file. ``meta`` is not written.

    Raises:
        UserError: no groups, a score that is not finite, text that is not Unicode, or an unwritable place.
    """
    if not groups:
        raise UserError(f"{path}: there are no groups to write. Check the step that made them.")
    lines = []
    for index, group in enumerate(groups):
        columns = {name: getattr(group, name) for name in ("prompt", "responses", "scores", "sources")}
        if not len(group.responses) == len(group.scores) == len(group.sources):
            raise UserError(f"{path}: group {index} has not as many scores and sources as responses. Mend it.")
        if not all(math.isfinite(score) for score in group.scores):
            raise UserError(f"{path}: group {index} has a score that is not finite. Mend it or leave the group out.")
        line = json.dumps(columns, ensure_ascii=False)
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{path}: group {index} holds text that is not Unicode. Mend it.") from None
        lines.append(line + "\n")
    replace_text(path, "".join(lines))


def hold_out(
    groups: Sequence[RankedGroup], size: int | float, seed: int
) -> tuple[list[RankedGroup], list[RankedGroup]]:
    """Split into (train, eval), both in the order of `groups`; the same arguments give the same split.

    Groups with the same prompt stay together, so that no evaluation prompt is trained on. `size` is
    therefore met exactly only as far as the prompts allow.

    Args:
        size: How many groups to hold out (int), or which share of them (float below 1, at least one group).

    Raises:
        UserError: `size` leaves no group to train on or none to evaluate on.
    """
    wanted = size if isinstance(size, int) else max(1, round(size * len(groups)))
    by_prompt: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        by_prompt.setdefault(json.dumps(group.prompt), []).append(index)
    prompts = list(by_prompt.values())
    random.Random(seed).shuffle(prompts)
    held: set[int] = set()
    for members in prompts:
        if len(held) + len(members) <= wanted and len(held) + len(members) < len(groups):
            held.update(members)
    if not held or wanted >= len(groups):
        raise UserError(
            f"cannot hold out {size} of {len(groups)} groups with {len(prompts)} different prompts: both parts need "
            "a group, and the same prompt is never in both. Set data.eval_size lower, or name data.eval."
        )
    train = [group for index, group in enumerate(groups) if index not in held]
    return train, [group for index, group in enumerate(groups) if index in held]
