"""Rules that see the row: ground truth, TRL's signature, time limits, and mathematics from sampling to evaluation."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import yaml
from house.recipe_checks import ROOT, assert_header_is_complete

from rrhf_peft.evaluate.run import evaluate_recipe
from rrhf_peft.recipe import load_recipe, make_recipe
from rrhf_peft.records import UserError
from rrhf_peft.sample.run import sample_recipe
from rrhf_peft.score import math_answer
from rrhf_peft.score.run import score_recipe
from rrhf_peft.train.run import train_recipe

RULES = """
import os
import time

def ours(prompt, responses, answer):
    return [float(answer in response) for response in responses]

def every_column(prompt, responses, **columns):
    return [float(len(columns["tests"])) for _ in responses]

def trl(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer) == len(columns["tests"]), "lists of one length"
    texts = [item if isinstance(item, str) else item[0]["content"] for item in completions]
    return [None if text == "?" else float(truth in text) for text, truth in zip(texts, answer)]

def never_ends(prompt, responses):
    while "1" in prompt:
        try:
            time.sleep(0.01)
        except Exception:
            pass
    return [float(len(response)) for response in responses]

def crashes(prompt, responses):
    os._exit(3)
"""


def score(folder, function, rows, **scorer):
    name = f"rules_{os.path.basename(folder)}"
    (folder / f"{name}.py").write_text(RULES)
    (folder / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "input": str(folder / "candidates.jsonl"),
        "output": str(folder / "scored.jsonl"),
        "scorer": {"name": "rule", "function": f"{name}:{function}", **scorer},
    }
    score_recipe(make_recipe({"scoring": section}, needs=["scoring"]))
    return [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]


@pytest.fixture
def rules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))  # of worker processes
    return tmp_path


ROWS = [
    {"prompt": "1 + 1", "responses": ["2", "3", "?"], "answer": "2", "tests": ["a"]},
    {"prompt": [{"role": "user", "content": "2 + 1"}], "responses": ["2", "3"], "answer": "3", "tests": ["a", "b"]},
]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("ours", [[1.0, 0.0, 0.0], [0.0, 1.0]]),
        ("every_column", [[1.0, 1.0, 1.0], [2.0, 2.0]]),
        ("trl", [[1.0, 0.0], [0.0, 1.0]]),
    ],
)
def test_rules_see_the_columns_of_the_row(rules, function, expected):
    assert [row["scores"] for row in score(rules, function, ROWS)] == expected


def test_a_rule_that_wants_a_column_that_is_not_there(rules):
    with pytest.raises(UserError, match=r"group 0 \(from 0\).* needs the column answer, which its row does not have"):
        score(rules, "ours", [{"prompt": "1 + 1", "responses": ["2", "3"]}])


def test_a_group_that_takes_too_long_costs_itself(rules):
    began = time.monotonic()
    rows = [{"prompt": str(number), "responses": ["a", "bb"]} for number in range(4)]
    scored = score(rules, "never_ends", rows, timeout=1.0, processes=2)
    assert [row["prompt"] for row in scored] == ["0", "2", "3"]
    (failed,) = map(json.loads, (rules / "scored.failures.jsonl").read_text().splitlines())
    assert set(failed["left_out"].values()) == {"the rule took more than 1.0 seconds"}
    assert time.monotonic() - began < 200


def test_a_rule_that_ends_its_process_is_told(rules):
    with pytest.raises(UserError, match="its process ended in the middle of a call"):
        score(rules, "crashes", ROWS, processes=2)


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("72", ["The answer is \\boxed{72}.", "So it is 72.", "#### 72", "$72.0$"], ["\\boxed{73}", "none", ""]),
        ("She has 2 + 2 = 4.\n#### 1,000", ["\\boxed{1000}"], ["\\boxed{4}"]),
        ("1/2", ["\\boxed{\\frac{1}{2}}", "It is 0.5"], ["\\boxed{\\frac{1}{3}}"]),
    ],
)
def test_mathematics_is_compared_by_value(answer, right, wrong):
    pytest.importorskip("math_verify")
    scores = math_answer("", [*right, *wrong], answer)
    assert scores == [1.0] * len(right) + [0.0] * len(wrong)


def test_the_math_recipe_runs_from_sampling_to_evaluation(tiny_model_folder, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / "math" / "math.yaml"
    assert_header_is_complete(path)
    text = path.read_text(encoding="utf-8").replace("runs/math", str(tmp_path))
    (tmp_path / "math.yaml").write_text(text)
    changes = [
        f"model.name={tiny_model_folder}",
        *("sampling.template=raw", "data.template=raw", "data.max_tokens=400", "sampling.max_prompts=6"),
        *("sampling.candidates.0.k=2", "sampling.candidates.0.max_new_tokens=6"),
        *("training.max_steps=1", "training.use_cpu=true"),
        *("evaluation.max_prompts=2", "evaluation.decoding.max_new_tokens=6", "evaluation.decoding.k=2"),
    ]

    def recipe(verb):
        return load_recipe(tmp_path / "math.yaml", changes, needs=[verb])

    sample_recipe(recipe("sampling"))
    score_recipe(recipe("scoring"))
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert rows  # an untrained model may say nothing to some problems
    assert all(row["scores"][0] == 1.0 and row["sources"][0] == "worked" for row in rows)
    assert any(0.0 in row["scores"] for row in rows)
    train_recipe(load_recipe(tmp_path / "math.yaml", changes))
    evaluate_recipe(recipe("evaluation"))
    numbers = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert set(numbers["policies"]) == {"base", "trained"}
    assert yaml.safe_load(text)["scoring"]["scorer"]["function"] == "rrhf_peft.score:math_answer"
