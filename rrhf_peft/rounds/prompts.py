"""The prompts of one round, where a round takes a part of them: a slice of the file, as files of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrhf_peft.data import read_groups
from rrhf_peft.files import replace_text
from rrhf_peft.recipe import SamplingSection
from rrhf_peft.records import RankedGroup


def slice_of(prompts: Sequence[Any], number: int, size: int) -> list[Any]:
    """What round `number` (from 1) takes: the next `size`, from the start again at the end; none of them twice."""
    size = min(size, len(prompts))
    start = (number - 1) * size
    return [prompts[place % len(prompts)] for place in range(start, start + size)]


def write_slice(folder: Path, sampling: SamplingSection, number: int, size: int, *, write: bool = True) -> list[str]:
    """Write the round's prompts, with the responses that they came with, unless another process does (`write`).

    Returns:
        The files, in order: one, or several where prompts with, without and with scored responses are mixed,
        since a file is read as its first row is.
    """
    found = read_groups(
        sampling.prompts, format=sampling.format, split=sampling.split, max_groups=sampling.max_prompts, needs="prompt"
    )
    files = []
    for place, (_, rows) in enumerate(itertools.groupby(slice_of(found, number, size), _kind), start=1):
        path = folder / f"prompts{f'-{place}' if place > 1 else ''}.jsonl"
        if write:
            replace_text(path, "".join(json.dumps(_row(prompt), ensure_ascii=False) + "\n" for prompt in rows))
        files.append(str(path))
    return files


def _kind(prompt: RankedGroup) -> str:
    if not prompt.responses:
        return "bare"
    return "unscored" if None in prompt.scores else "ranked"


def _row(prompt: RankedGroup) -> dict[str, Any]:
    return {**prompt.row(), "origin": {**prompt.columns, **prompt.origin}}
