"""Scores by who wrote a response: the first pattern counts, and a source that none matches is told."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import UserError
from rrhf_peft.score.rule import source_score
from rrhf_peft.score.run import score_recipe


@pytest.mark.parametrize(
    ("source", "score"),
    [("provided", 1.0), ("provided:human", 1.0), ("top_p:base", 0.5), ("top_p:Base", 0.25), ("beam:x", 0.0)],
)
def test_the_first_pattern_that_matches_counts(source, score):
    patterns = {"provided*": 1.0, "top_p:base": 0.5, "top_p:[A-Z]*": 0.25, "*": 0.0, "beam:x": 9.0}
    assert source_score(source, patterns) == score


def score(folder, patterns):
    rows = [
        {"prompt": "a", "responses": ["x", "y"], "sources": ["provided", "top_p:base"]},
        {"prompt": "b", "responses": ["x", "y", "z"], "sources": ["top_p:base", "provided", "top_p:base"]},
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = {"name": "source", "scores": patterns}
    scoring = {"input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl"), "scorer": scorer}
    return score_recipe(make_recipe({"scoring": scoring}, needs=["scoring"]), console=Console(quiet=True))


def test_spin_puts_the_provided_answer_above_the_policys_own(tmp_path):
    outcome = score(tmp_path, {"provided*": 1.0, "*": 0.0})
    rows = [json.loads(line) for line in outcome.output.read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[1.0, 0.0], [0.0, 1.0, 0.0]]
    assert rows[0]["raw_scores"] == {"source": [1.0, 0.0]}


def test_a_source_without_a_score_is_named_before_anything_is_scored(tmp_path):
    with pytest.raises(UserError, match=r"no pattern matches the source 'top_p:base' \(there are: provided\*\)"):
        score(tmp_path, {"provided*": 1.0})
    assert not (tmp_path / "out.jsonl").exists()


def test_no_patterns_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"scoring\.scorer\.scores"):
        score(tmp_path, {})
