"""Rules by dotted name: what loads, what is refused, and that each refusal says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rrhf_peft.records import UserError
from rrhf_peft.score.rule import load_rule
from rrhf_peft.score.sentiment import vader

MODULE = """
import math

def by_length(prompt, responses):
    return [len(response) for response in responses]

def too_few(prompt, responses):
    return [1.0]

def not_finite(prompt, responses):
    return [math.nan for _ in responses]

def nothing(prompt, responses):
    pass

def words(prompt, responses):
    return ["good" for _ in responses]

limit = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(MODULE)
    (tmp_path / "my_broken_rules.py").write_text("1 / 0")
    (tmp_path / "my_needy_rules.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_rules", "my_broken_rules", "my_needy_rules"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_rule_scores_each_response_as_a_float() -> None:
    scores = load_rule("my_rules:by_length")("prompt", ["a", "", "ccc"])
    assert scores == [1.0, 0.0, 3.0]
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_rules", "write package.module:function"),
        ("my_rules:", "write package.module:function"),
        ("my_ruels:by_length", "no module 'my_ruels'"),
        ("my_rules.deep:by_length", "no module 'my_rules.deep'"),
        ("my_needy_rules:rule", "needs the module 'surely_not_installed'"),
        ("my_broken_rules:rule", "fails with ZeroDivisionError"),
        ("my_rules:by_lenght", "did you mean 'by_length'"),
        ("my_rules:limit", "limit is a int"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_rule(name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("too_few", "1 scores for 2 responses"),
        ("not_finite", "score of response 0 is nan"),
        ("nothing", "it returned 'None'"),
        ("words", r"-> list\[float\]"),
    ],
)
def test_scores_that_are_no_scores_name_the_rule_and_the_prompt(function: str, says: str) -> None:
    rule = load_rule(f"my_rules:{function}")
    with pytest.raises(UserError, match=says) as caught:
        rule("What is it?", ["yes", "no"])
    assert f"my_rules:{function}" in str(caught.value)
    assert "What is it?" in str(caught.value)


def test_an_error_inside_a_rule_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        load_rule("my_rules:by_length")("prompt", [3])  # type: ignore[list-item]


def test_vader_orders_sentiment_and_stays_within_one() -> None:
    scores = load_rule("rrhf_peft.score:vader")("", ["I hate this awful day.", "It is a table.", "What a great day!"])
    assert -1 <= scores[0] < scores[1] == 0.0 < scores[2] <= 1


def test_without_its_package_vader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from rrhf_peft.score import sentiment

    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    sentiment._analyzer.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'rrhf-peft\[vader\]'"):
        vader("", ["text"])


def test_a_rule_may_lie_in_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "rule_beside_the_recipe.py").write_text("def count(prompt, responses): return [1.0 for _ in responses]")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert load_rule("rule_beside_the_recipe:count")("a", ["b", "c"]) == [1.0, 1.0]
