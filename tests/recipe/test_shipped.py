"""Shipped recipes: every one is listed with a sentence, and a copy stands without the rest of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.recipe import read_recipe
from rrhf_peft.recipe.shipped import NO_RECIPES, copy_recipes, shipped_recipes
from rrhf_peft.records import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_every_recipe_is_listed_with_its_first_sentence() -> None:
    listed = shipped_recipes()
    files = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")}
    assert files > set(NO_RECIPES)
    assert {f"{name}.yaml" for name in listed} == files - set(NO_RECIPES)
    assert listed["qlora_7b"].startswith("QLoRA on a 7B model with one 24 GB GPU")
    assert all(20 < len(sentence) < 250 for sentence in listed.values()), listed


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_copy_reads_as_the_shipped_one_does(name: str, tmp_path: Path) -> None:
    copies = copy_recipes(name, tmp_path)
    assert copies[0] == tmp_path / f"{name}.yaml"
    assert read_recipe(copies[0]) == read_recipe(RECIPES / f"{name}.yaml")


def test_a_folder_is_copied_with_its_data(tmp_path: Path) -> None:
    assert {path.name for path in copy_recipes("example/", tmp_path)} == {"prompts.txt", "ranked.jsonl"}
    assert len(copy_recipes("all", tmp_path)) > len(shipped_recipes())


def test_what_is_there_and_differs_stays(tmp_path: Path) -> None:
    (tmp_path / "sampling").mkdir()
    (tmp_path / "sampling" / "sp.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"sp\.yaml: is there already and differs"):
        copy_recipes("sampling", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sp.yaml"]
    copy_recipes("sampling/dp", tmp_path)
    copy_recipes("sampling/dp.yaml", tmp_path)  # again: the same


def test_wrong_names_and_words_are_answered() -> None:
    runner = CliRunner()
    assert "did you mean 'qlora_7b'" in runner.invoke(app, ["recipes", "copy", "qlora_7B"]).stderr
    assert runner.invoke(app, ["recipes", "copy"]).exit_code == 2
    assert runner.invoke(app, ["recipes", "list", "x"]).exit_code == 2
