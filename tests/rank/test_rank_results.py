"""What is ranked, who gets what, and what the answers become: sheets, agreement, wins, Argilla, Label Studio."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rank.conftest import write_candidates

from rrhf_peft.rank.answers import Answers, shared_groups
from rrhf_peft.rank.results import figures, write_results
from rrhf_peft.rank.run import pairs_of, rank_candidates
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.score.combine import read_candidates


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    opened = Answers(tmp_path / "answers.sqlite")
    opened.links(["", "ann", "bob", "cyd"])
    return opened


def everything(answers: Answers, name: str, count: int, shared: int, per_group: int = 1) -> list[int]:
    """Rank until nothing is left; the groups, in order."""
    numbers: list[int] = []
    while (number := answers.next_group(name, count, shared, per_group)[0]) is not None:
        answers.save(name, number, "ranked", [1, 2], "")
        numbers.append(number)
    return numbers


def test_three_people_share_thirty_of_330_pairs_as_in_the_paper(answers: Answers) -> None:
    turns: dict[str, list[int]] = {"ann": [], "bob": [], "cyd": []}
    for _ in range(130):  # in turn, as people who work at the same time
        for name, numbers in turns.items():
            number, total = answers.next_group(name, 330, shared=30, per_group=1)
            assert total == 130
            assert number is not None
            answers.save(name, number, "ranked", [1, 2], "")
            numbers.append(number)
    assert all(answers.next_group(name, 330, 30, 1) == (None, 130) for name in turns)  # nobody does another's share
    everyones = shared_groups(330, 30)
    assert all(everyones <= {*numbers} and len({*numbers}) == 130 for numbers in turns.values())
    assert len({*turns["ann"], *turns["bob"], *turns["cyd"]}) == 330
    assert turns["ann"][:40] != turns["bob"][:40]  # everyone in an order of their own


def test_what_was_left_open_or_skipped_goes_to_others(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    left_open, _ = answers.next_group("ann", 2, 0, 1)
    assert left_open is not None
    assert answers.next_group("ann", 2, 0, 1)[0] == left_open  # the same again after a reload
    assert everything(answers, "bob", 2, 0) == [1 - left_open]
    assert everything(answers, "cyd", 2, 0) == []
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert everything(answers, "cyd", 2, 0) == [left_open]
    answers.save("ann", left_open, "skipped", [None, None], "no idea")
    assert answers.counts()["ann"] == {"ranked": 0, "skipped": 1, "open": 0}
    assert answers.next_group("ann", 2, 0, 1) == (None, 1)
    assert answers.next_group("ann", 2, 0, 2) == (1 - left_open, 2)  # two people for each: there is more to do


def test_answers_survive_the_process_and_damage_is_told(tmp_path: Path, answers: Answers) -> None:
    number, _ = answers.next_group("ann", 3, 3, 1)
    assert number is not None
    answers.save("ann", number, "ranked", [2, 1], "why")
    again = Answers(tmp_path / "answers.sqlite")  # while the first one is open, as after a kill
    assert again.ranks()["ann"] == {number: {0: 2.0, 1: 1.0}}
    assert again.links() == answers.links()
    (mode,) = sqlite3.connect(tmp_path / "answers.sqlite").execute("PRAGMA journal_mode").fetchone()
    assert mode == "wal"
    (tmp_path / "letter").write_text("Dear reader," * 100)
    with pytest.raises(UserError, match="cannot be used"):
        Answers(tmp_path / "letter")
    sqlite3.connect(tmp_path / "newer").execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="newer rrhf-peft"):
        Answers(tmp_path / "newer")


GROUPS = [
    RankedGroup("p0", ["a", "b", "c"], columns={"raw_scores": {"judge": [3, 2, 1]}}, index=0),
    RankedGroup("p1", ["a", "b"], columns={"raw_scores": {"judge": [1, 2]}}, index=1),
]


def test_agreement_by_hand() -> None:
    ranks = {"ann": {0: {0: 1.0, 1: 2.0, 2: 3.0}, 1: {0: 1.0, 1: 2.0}}, "bob": {0: {0: 1.0, 1: 1.0, 2: 1.0}}}
    shown = figures(GROUPS, {name: {} for name in ranks}, ranks, 30, None)
    people, judge = shown["agreement"]
    # In group 0 ann says 3 times better where bob says tied: never the same, never opposite.
    assert (people["comparisons"], people["same"], people["no_contradiction"]) == (3, 0.0, 1.0)
    # Together they say a > b > c, as the judge does; in group 1 ann alone says the opposite of the judge.
    assert (judge["comparisons"], judge["same"], judge["no_contradiction"]) == (4, 0.75, 0.75)
    assert (shown["groups"], shown["shared"], shown["wins"]) == (2, 2, None)


def test_wins_are_counted_by_person_and_each_pair_once_together() -> None:
    groups = [RankedGroup(f"p{n}", ["x", "y"], index=n) for n in range(3)]
    ranks = {
        "ann": {0: {0: 1.0, 1: 2.0}, 1: {0: 1.0, 1: 1.0}, 2: {0: 2.0, 1: 1.0}},
        "bob": {0: {0: 1.0, 1: 2.0}, 2: {0: 1.0, 1: 2.0}},
    }
    shown = figures(groups, {}, ranks, 30, ("new", "old"))["wins"]
    assert shown == {
        "a": "new",
        "b": "old",
        "rows": [
            {"by": "ann", "win": 1, "tie": 1, "lose": 1},
            {"by": "bob", "win": 2, "tie": 0, "lose": 0},
            {"by": "together", "win": 1, "tie": 2, "lose": 0},
        ],
    }


def test_pairs_join_two_sources_by_prompt_with_their_scores_in_line() -> None:
    groups = [
        RankedGroup("q", ["x", "new"], [1.0, 2.0], ["x", "n"], {"raw_scores": {"r": [1.0, 2.0]}}, index=0),
        RankedGroup("q", ["old"], [5.0], ["o"], {"raw_scores": {"r": [5.0], "s": [0.0]}}, index=1),
        RankedGroup("alone", ["new"], sources=["n"], columns={"raw_scores": {}}, index=2),
    ]
    (pair,) = pairs_of(groups, "n", "o")
    assert (pair.responses, pair.scores, pair.sources) == (["new", "old"], [2.0, 5.0], ("n", "o"))
    assert pair.columns["raw_scores"] == {"r": [2.0, 5.0]}
    for names in (("n", "nobody"), ("x", "x")):
        with pytest.raises(UserError, match="--compare"):
            pairs_of(groups, *names)


@pytest.fixture
def written(tmp_path: Path, answers: Answers) -> Path:
    """Results of: ann ranks both groups, one with a tie and a note; bob ranks the small one and skips the other."""
    for name, number, state, ranks, note in (
        ("ann", 0, "ranked", [2, 1, 2], "c is b"), ("ann", 1, "ranked", [1, 2], ""),
        ("bob", 1, "ranked", [2, 1], ""), ("bob", 0, "skipped", [None, None, None], "both bad"),
    ):  # fmt: skip
        answers._connection.execute(
            "INSERT INTO answers (annotator, number, state, changed) VALUES (?, ?, 'open', 0)", (name, number)
        )
        answers.save(name, number, state, ranks, note)  # type: ignore[arg-type]
    write_results(tmp_path, GROUPS, answers, 30, None)
    return tmp_path


def test_argilla_records_are_those_of_its_sdk(written: Path) -> None:
    """As `Record.from_dict` of argilla 2.8 reads them, and as the server checks submitted rankings."""
    big, small = json.loads((written / "argilla.json").read_text())
    assert big["fields"] == {"prompt": "p0", "response-1": "a", "response-2": "b", "response-3": "c"}
    (ranking,) = big["responses"]["ranking"]
    assert ranking["value"] == [
        {"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}, {"value": "response-3", "rank": 2}
    ]  # fmt: skip
    assert ranking["status"] == "submitted"
    (note,) = big["responses"]["note"]
    assert (note["value"], note["user_id"]) == ("c is b", ranking["user_id"])
    users = [answer["user_id"] for answer in small["responses"]["ranking"]]
    assert len({*users}) == 2
    assert users[0] == ranking["user_id"]
    for answer in small["responses"]["ranking"]:  # all three values must be ranked, from 1 to 3
        assert sorted(item["value"] for item in answer["value"]) == ["response-1", "response-2", "response-3"]
        assert answer["value"][2]["rank"] == 3
    assert "response-3" not in small["fields"]


def test_label_studio_tasks_fit_their_configuration(written: Path) -> None:
    """As the documentation of Ranker with Buckets says it: bucket name -> ids of the list's items."""
    config = ElementTree.parse(written / "label_studio.xml").getroot()
    buckets = [one.get("name") for one in config.iter("Bucket")]
    assert buckets == ["rank-1", "rank-2", "rank-3"]
    ranker, items, note = (config.find(tag) for tag in ("Ranker", "List", "TextArea"))
    assert ranker is not None
    assert items is not None
    assert note is not None
    assert (ranker.get("toName"), items.get("value"), note.get("toName")) == (items.get("name"), "$items", "prompt")
    big, small = json.loads((written / "label_studio.json").read_text())
    assert [item["id"] for item in big["data"]["items"]] == ["response-1", "response-2", "response-3"]
    assert big["data"]["annotators"] == ["ann", "bob"]
    ranked, skipped = big["annotations"]
    result: dict[str, Any] = ranked["result"][0]
    assert (result["from_name"], result["to_name"], result["type"]) == (ranker.get("name"), items.get("name"), "ranker")
    assert result["value"]["ranker"] == {"rank-1": ["response-2"], "rank-2": ["response-1", "response-3"]}
    assert ranked["result"][1]["value"] == {"text": ["c is b"]}
    assert (ranked["was_cancelled"], skipped["was_cancelled"]) == (False, True)
    assert [one["result"][0]["value"]["ranker"] for one in small["annotations"]] == [
        {"rank-1": ["response-1"], "rank-2": ["response-2"]}, {"rank-1": ["response-2"], "rank-2": ["response-1"]}
    ]  # fmt: skip


def test_a_ranking_goes_on_with_the_same_groups_only(tmp_path: Path) -> None:
    candidates = write_candidates(tmp_path / "candidates.jsonl", count=3)
    folder = tmp_path / "ranking"
    with pytest.raises(UserError, match="holds no answers"):
        rank_candidates([str(candidates)], folder, port=None)
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="no folder of rrhf-peft rank"):
        rank_candidates([str(candidates)], folder, port=0)
    (folder / "letter.txt").unlink()

    def stop(_: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        rank_candidates([str(candidates)], folder, port=0, on_ready=stop)
    kept = (folder / "groups.jsonl").read_bytes()
    ranking = rank_candidates([str(candidates)], folder, port=None)
    assert [one["name"] for one in ranking.figures["annotators"]] == ["me"]
    with pytest.raises(UserError, match="to other groups than these"):
        rank_candidates([str(candidates)], folder, port=0, max_groups=2)
    assert (folder / "groups.jsonl").read_bytes() == kept
    assert read_candidates(str(folder / "groups.jsonl"))[1].columns["raw_scores"] == {
        "reward_model": [0.0, 1.0, 2.0], "input": [0.0, 1.0, 2.0]
    }  # fmt: skip


def test_the_web_packages_may_be_missing_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    candidates = write_candidates(tmp_path / "candidates.jsonl", count=1)
    with pytest.raises(UserError, match=r"pip install 'rrhf-peft\[rank\]'"):
        rank_candidates([str(candidates)], tmp_path / "ranking")
    assert not (tmp_path / "ranking").exists()
