"""Rules by dotted name: what loads, what is refused, and that each refusal says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rrhf_peft.records import UserError
from rrhf_peft.score.rule import _vader_analyzer, load_rule, rule_source, vader

MODULE = """
import itertools
import math
import sys
from decimal import Decimal
from fractions import Fraction

import numpy
import torch

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

def stops(prompt, responses):
    sys.exit(0)

def fails(prompt, responses):
    return [1 / len(response) for response in responses]

def recurses(prompt, responses):
    return recurses(prompt, responses)

def fails_late(prompt, responses):
    yield 1.0
    raise RuntimeError("no more")

def endless(prompt, responses):
    return itertools.count()

def text(prompt, responses):
    return "12"

def dictionary(prompt, responses):
    return {response: 1.0 for response in responses}

def unordered(prompt, responses):
    return {1.0, 2.0}

def numbers_as_text(prompt, responses):
    return ["1", "2"]

def huge(prompt, responses):
    return [1e308 for _ in responses]

def whole_and_huge(prompt, responses):
    return [10**400 for _ in responses]

def infinite(prompt, responses):
    return [1.0, -math.inf]

def table(prompt, responses):
    return numpy.ones((len(responses), 2))

def one_number(prompt, responses):
    return numpy.float32(3)

def complex_numbers(prompt, responses):
    return [1j for _ in responses]

def three(prompt, responses):
    return [1.0, 2.0, 3.0]

def array(prompt, responses):
    return numpy.array([1.5, 2.5], dtype=numpy.float32)

def tensor(prompt, responses):
    return torch.tensor([1.5, 2.5], requires_grad=True)

def tensors(prompt, responses):
    return [torch.tensor(1.5), numpy.float64(2.5)]

def generator(prompt, responses):
    return (score for score in (1.5, 2.5))

def exact(prompt, responses):
    return (Fraction(3, 2), Decimal("2.5"))

def truths(prompt, responses):
    return [True, False]

def changes_its_arguments(prompt, responses):
    responses.append("more")
    return [1.0, 2.0]

def only_one(prompt, responses):
    return [None, 2.0]
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(MODULE)
    (tmp_path / "my_broken_rules.py").write_text("1 / 0")
    (tmp_path / "my_needy_rules.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_leaving_rules.py").write_text("import sys\n\nsys.exit(0)\n")
    for name in ("my_rules", "my_broken_rules", "my_needy_rules", "my_leaving_rules"):
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
        ("my_ruless:by_length", "did you mean 'my_rules'"),
        ("rrhf_peft.scor:vader", r"did you mean 'rrhf_peft\.score'"),
        ("../my_rules:by_length", "write package.module:function"),
        (".my_rules:by_length", "write package.module:function"),
        ("my_leaving_rules:rule", r"fails with a call of sys\.exit\(0\) \(.*my_leaving_rules\.py:3\)"),
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
        ("nothing", r"it returned nothing \('None'\)"),
        ("words", r"score of response 0 is text .* -> list\[float\]"),
        ("three", "more than 2|3 scores for 2 responses"),
        ("text", "it returned text"),
        ("dictionary", "it returned a dictionary"),
        ("unordered", "it returned a set, which has no order"),
        ("numbers_as_text", "score of response 0 is text"),
        ("huge", r"score of response 0 is 1e\+308"),
        ("whole_and_huge", "score of response 0 is inf"),
        ("infinite", "score of response 1 is -inf"),
        ("table", "score of response 0 is a list"),
        ("one_number", "it returned a float"),
        ("complex_numbers", "score of response 0 is a complex"),
        ("endless", "more than 2 scores for 2 responses"),
        ("only_one", "score of response 0 is None"),
        ("stops", r"fails with a call of sys\.exit\(0\) \(.*my_rules\.py:"),
        ("recurses", r"fails with RecursionError.*my_rules\.py:"),
        ("fails_late", r"fails with RuntimeError: no more \(.*my_rules\.py:"),
    ],
)
def test_scores_that_are_no_scores_name_the_rule_and_the_prompt(function: str, says: str) -> None:
    rule = load_rule(f"my_rules:{function}")
    with pytest.raises(UserError, match=says) as caught:
        rule("What is it?", ["yes", "no"])
    assert f"my_rules:{function}" in str(caught.value)
    assert "What is it?" in str(caught.value)


@pytest.mark.parametrize("function", ["array", "tensor", "tensors", "generator", "exact"])
def test_numbers_of_any_kind_are_read(function: str) -> None:
    scores = load_rule(f"my_rules:{function}")("prompt", ["a", "b"])
    assert scores == [1.5, 2.5]
    assert {type(score) for score in scores} == {float}


def test_truths_are_ones_and_zeros_and_the_responses_are_the_rules_to_change() -> None:
    assert load_rule("my_rules:truths")("prompt", ["a", "b"]) == [1.0, 0.0]
    responses = ["a", "b"]
    assert load_rule("my_rules:changes_its_arguments")("prompt", responses) == [1.0, 2.0]
    assert responses == ["a", "b"]


def test_an_error_inside_a_rule_is_told_with_its_line_and_keeps_its_traceback() -> None:
    with pytest.raises(UserError, match=r"prompt 'p': it fails with ZeroDivisionError: .*my_rules\.py:\d+\)") as caught:
        load_rule("my_rules:fails")("p", ["a", ""])
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    assert cause.__traceback__ is not None


def test_the_fingerprint_of_a_rule_follows_its_code_and_the_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rule_parts.py").write_text("def worth(text): return len(text)")
    (tmp_path / "my_two_files.py").write_text(
        "import rule_parts\ndef rule(prompt, responses): return [rule_parts.worth(text) for text in responses]"
    )
    (tmp_path / "unrelated.py").write_text("x = 1")
    first = rule_source("my_two_files:rule")
    (tmp_path / "unrelated.py").write_text("x = 2")
    assert rule_source("my_two_files:rule") == first
    (tmp_path / "rule_parts.py").write_text("def worth(text): return -len(text)")
    assert rule_source("my_two_files:rule") != first
    assert rule_source("rrhf_peft.score:vader") != rule_source("rrhf_peft.demo.stories:cheerfulness")


def test_vader_orders_sentiment_and_stays_within_one() -> None:
    scores = load_rule("rrhf_peft.score:vader")("", ["I hate this awful day.", "It is a table.", "What a great day!"])
    assert -1 <= scores[0] < scores[1] == 0.0 < scores[2] <= 1


def test_without_its_package_vader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    _vader_analyzer.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'rrhf-peft\[vader\]'"):
        vader("", ["text"])


def test_a_rule_may_lie_in_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "rule_beside_the_recipe.py").write_text("def count(prompt, responses): return [1.0 for _ in responses]")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert load_rule("rule_beside_the_recipe:count")("a", ["b", "c"]) == [1.0, 1.0]
