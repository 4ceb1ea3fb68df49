"""The shipped sampling recipes: their headers, and each run as it is with a tiny model and a few prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sample.sample_recipes import read_rows

from rrhf_peft.modeling import attach_adapter, load_base_model
from rrhf_peft.recipe import load_recipe
from rrhf_peft.sample.run import sample_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "sampling"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SAMPLED = {"bp": 4, "sp": 4, "dp": 4, "d": 4, "p": 0, "mixed": 6}


def test_each_has_a_row_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES} == set(SAMPLED)
    assert all(f"({path.name})" in table for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_how_to_run_it_where_what_to_expect_and_whether_it_was_run(path):
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group()
    assert f"recipes/sampling/{path.name}" in header
    for part in ("# Hardware: ", "# Expect: "):
        assert part in header
    assert re.search(r"^# (Run|Not run): ", header, flags=re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs_with_a_tiny_model(path, tiny_model_folder, tmp_path):
    prompts = tmp_path / "train.jsonl"
    row = {"response": " Yes.", "chosen": " Yes.", "rejected": " No, never."}
    questions = [f"\n\nHuman: Is it {number}?\n\nAssistant:" for number in range(3)]
    prompts.write_text("".join(json.dumps({"prompt": question, **row}) + "\n" for question in questions))
    changes = [f"sampling.prompts={prompts}", f"sampling.output={tmp_path / 'out.jsonl'}"]
    if path.stem != "p":
        changes += [f"model.name={tiny_model_folder}", "model.dtype=float32"]
    recipe = load_recipe(path, changes, needs=["sampling"])
    if path.stem == "mixed":
        adapter = attach_adapter(load_base_model(tiny_model_folder), {"r": 2})
        adapter.save_pretrained(tmp_path / "quickstart")
        values = recipe.sampling.candidates[1].model_copy(update={"adapter": str(tmp_path / "quickstart")})
        candidates = [recipe.sampling.candidates[0], values]
        sampling = recipe.sampling.model_copy(update={"candidates": candidates})
        recipe = recipe.model_copy(update={"sampling": sampling})
    sample_recipe(recipe)
    provided = ["chosen", "rejected"] if recipe.sampling.keep_provided else []
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == questions
    for row in rows:
        assert row["sources"][: len(provided)] == provided
        assert len(row["responses"]) + len(row["meta"]["removed"]) == len(provided) + SAMPLED[path.stem]
        assert not any("\n\nHuman:" in text for text in row["responses"])
