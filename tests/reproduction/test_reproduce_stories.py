"""Stories become prompts with their own continuation; which ones does not depend on how many are wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_stories import distinct_beginnings, read_stories, write_stories

from rrhf_peft.records import UserError


def story(number: int, words: int = 60) -> str:
    return f"Story {number} begins\n\n" + " ".join(f"word{place}" for place in range(words))


def test_the_prompt_is_the_first_twelve_words_and_the_response_what_follows() -> None:
    (row,) = distinct_beginnings([story(0)])
    assert row["prompt"] == "Story 0 begins\n\n" + " ".join(f"word{place}" for place in range(9))
    (response,) = row["responses"]
    assert response == " " + " ".join(f"word{place}" for place in range(9, 45))
    assert story(0).startswith(row["prompt"] + response)
    assert row["sources"] == ["own"]


def test_a_beginning_comes_once_and_a_short_story_not_at_all() -> None:
    rows = list(distinct_beginnings([story(0), story(0) + " and more", story(1, words=9), story(2)]))
    assert [row["prompt"].split()[1] for row in rows] == ["0", "2"]


def test_training_and_held_out_prompts_differ(tmp_path: Path) -> None:
    (tmp_path / "stories.json").write_text(json.dumps([story(number) for number in range(10)]))
    write_stories(str(tmp_path / "stories.json"), tmp_path / "out", train=6, held_out=4)
    train, held_out = (
        [json.loads(line)["prompt"] for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (6, 4)
    assert len({*train, *held_out}) == 10


def test_too_few_stories_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "stories.json").write_text(json.dumps([story(number) for number in range(3)]))
    with pytest.raises(UserError, match="holds 3 different story beginnings of 12 words, and 10 are needed"):
        write_stories(str(tmp_path / "stories.json"), tmp_path / "out", train=6, held_out=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "cannot be read as JSON"), ('{"a": 1}', "not a JSON list of texts")]
)
def test_a_file_that_holds_no_stories_is_an_error(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "stories.json").write_text(text)
    with pytest.raises(UserError, match=problem):
        list(read_stories(str(tmp_path / "stories.json")))


def test_a_hub_data_set_gives_its_texts(tmp_path: Path) -> None:
    """A folder stands in for the hub's; it is read by the same call."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": story(number)}) + "\n" for number in range(3)))
    assert list(read_stories(str(tmp_path))) == [story(number) for number in range(3)]


def test_a_data_set_without_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"story": "once"}) + "\n")
    with pytest.raises(UserError, match="gives no stories"):
        list(read_stories(str(tmp_path)))
