"""Stories in, prompts out: each story's first words, with its own continuation as the first provided response.

Left to others: sampling, scoring and everything after it (the recipes in `small/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

#: The data set on the hub that the model was trained on.
HUB_STORIES = "roneneldan/TinyStories"
PROMPT_WORDS, RESPONSE_WORDS = 12, 36

_PROMPT = re.compile(rf"(?:\S+\s+){{{PROMPT_WORDS - 1}}}\S+")
_RESPONSE = re.compile(rf"(?:\s+\S+){{1,{RESPONSE_WORDS}}}")


def write_stories(where: str, folder: Path, *, train: int, held_out: int) -> None:
    """Write `train.jsonl` and `held_out.jsonl`: different beginnings, each with the story's own next words.

    Args:
        where: a JSON list of stories, or a data set of the hub with the column `text`.
        folder: where the two files go.
        train: beginnings to train on.
        held_out: beginnings to measure with.

    Raises:
        UserError: there are no such stories, or too few.
    """
    rows = []
    for row in distinct_beginnings(read_stories(where)):
        rows.append(row)
        if len(rows) == train + held_out:
            break
    if len(rows) < train + held_out:
        raise UserError(
            f"{where}: holds {len(rows)} different story beginnings of {PROMPT_WORDS} words, and {train + held_out} "
            "are needed. Give more stories."
        )
    for name, own in (("train", rows[:train]), ("held_out", rows[train:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        path = folder / f"{name}.jsonl"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)


def read_stories(where: str) -> Iterator[str]:
    """The stories of a JSON list, or of a hub data set, which is streamed and not downloaded as a whole.

    Raises:
        UserError: the file is no list of texts, or the hub has no such data.
    """
    if where.endswith(".json"):
        try:
            stories = json.loads(Path(where).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: cannot be read as JSON ({error}). Give a list of stories.") from None
        if not isinstance(stories, list) or not all(isinstance(story, str) for story in stories):
            raise UserError(f"{where}: is not a JSON list of texts. Give a list of stories.")
        yield from stories
        return
    from datasets import load_dataset

    try:
        data = load_dataset(where, split="train", streaming=True)
        for row in data:
            yield row["text"]
    except (OSError, ValueError, KeyError) as error:  # no network, no such data set, no such column
        raise UserError(
            f"{where}: the hub gives no stories ({type(error).__name__}: {error}). Give a JSON list of stories instead."
        ) from None


def distinct_beginnings(stories: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A row `prompt, responses, sources` for each story that is long enough and begins like none before it."""
    seen: set[str] = set()
    for story in stories:
        prompt = _PROMPT.match(story.lstrip())
        own = prompt and _RESPONSE.match(story.lstrip(), prompt.end())
        if prompt and own and prompt.group() not in seen:
            seen.add(prompt.group())
            yield {"prompt": prompt.group(), "responses": [own.group()], "sources": ["own"]}
