"""Every shipped scoring recipe parses, says how to run it, and where that needs no download, runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.recipe import load_recipe, recipe_text

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "scoring").glob("*.yaml"))


@pytest.fixture
def candidates(tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "responses": ["I love it!", "It is bad.", "Well."], "sources": ["a", "b", "c"]}
        for i in range(5)
    ]
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(recipe, candidates, *overrides):
    output = candidates.with_name("scored.jsonl")
    arguments = ["score", str(ROOT / "recipes" / "scoring" / recipe), f"scoring.input={candidates}"]
    result = CliRunner().invoke(app, [*arguments, f"scoring.output={output}", *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result, output


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_parses_and_its_header_says_how_to_run_it(path, tmp_path):
    recipe = load_recipe(path, needs=["scoring"])
    assert recipe.scoring is not None
    (tmp_path / "again.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "again.yaml", needs=["scoring"]) == recipe
    header = path.read_text().partition("\nscoring:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"recipes/scoring/{path.name}" in header
    assert "# Hardware:" in header
    assert "# Expect:" in header
    assert re.search(r"^# (Run|Not run): ", header, flags=re.MULTILINE)
    assert f"({path.name})" in (path.parent / "README.md").read_text()


def test_every_scorer_has_an_example():
    names = {load_recipe(path, needs=["scoring"]).scoring.scorer.name for path in RECIPES}
    assert names == {"reward_model", "judge", "rule", "policy", "human", "composite"}


def test_the_rule_recipe_runs(candidates):
    result, output = run("rule.yaml", candidates)
    scores = [json.loads(line)["scores"] for line in output.read_text().splitlines()]
    assert all(own[0] > own[2] > own[1] for own in scores)
    assert "best of group" in result.output
    assert f"Done: {output}" in result.output
    result, _ = run("rule.yaml", candidates, "--overwrite", "--json")
    assert json.loads(result.stdout)["report"]["sources"]["a"]["best_share"] == 1.0


def test_the_policy_recipe_runs(candidates, tmp_path, tiny_model_folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), LoraConfig()).save_pretrained(
        tmp_path / "adapter"
    )
    _, output = run("policy.yaml", candidates, f"scoring.scorer.adapter={tmp_path / 'adapter'}")
    assert all(score < 0 for line in output.read_text().splitlines() for score in json.loads(line)["scores"])


def test_the_human_recipe_runs(candidates, tmp_path):
    sheet = tmp_path / "sheet.csv"
    result, output = run("human.yaml", candidates, f"scoring.scorer.sheet={sheet}")
    assert f"Sheet: {sheet}" in result.output
    assert not output.exists()
    lines = sheet.read_text().splitlines()
    rank = {"I love it!": 1, "Well.": 2, "It is bad.": 3}
    filled = [lines[0], *(line + str(next(own for text, own in rank.items() if text in line)) for line in lines[1:])]
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.csv").write_text("\n".join(filled) + "\n")
    annotations = f"scoring.scorer.annotations=[{tmp_path / 'ann.csv'}, {tmp_path / 'bob.csv'}]"
    result, output = run("human.yaml", candidates, f"scoring.scorer.sheet={sheet}", annotations)
    assert all(json.loads(line)["scores"] == [1.0, 0.0, 0.5] for line in output.read_text().splitlines())
    assert "no contradiction 1.000" in result.output


def test_errors_are_one_paragraph(candidates, tmp_path):
    arguments = ["score", str(ROOT / "recipes" / "scoring" / "rule.yaml"), f"scoring.input={tmp_path / 'none.jsonl'}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "there is no such file" in result.output
    assert "Traceback" not in result.output
