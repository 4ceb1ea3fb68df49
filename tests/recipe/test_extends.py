"""A recipe that builds on another: what differs is written, the rest is inherited, errors name the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rrhf_peft.recipe import load_recipe, recipe_text
from rrhf_peft.records import UserError

BASE = """\
model: {name: some/model, quantization: nf4}
adapter: {r: 16}
data:
  train: ranked.jsonl
  max_tokens: 256
  eval_size: 5
objective: {name: rrhf, variant: paper}
training: {output_dir: runs/base, learning_rate: 1.0e-4, report_to: [tensorboard]}
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def test_what_differs_is_enough(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, base=BASE)
    path = write(
        tmp_path / "inner",
        mine="extends: ../base.yaml\ndata: {max_tokens: 64, eval_size: null}\n"
        "training: {output_dir: runs/mine, report_to: [wandb]}\n",
    )
    recipe = load_recipe(path)
    assert (recipe.model.name, recipe.model.quantization, recipe.adapter.r) == ("some/model", "nf4", 16)
    assert (recipe.data.train, recipe.data.max_tokens, recipe.data.eval_size) == ("ranked.jsonl", 64, None)
    assert (recipe.training.output_dir, recipe.training.learning_rate) == ("runs/mine", 1e-4)
    assert recipe.training.report_to == ["wandb"]  # lists are replaced
    assert load_recipe(path, ["data.max_tokens=32"]).data.max_tokens == 32
    snapshot = write(tmp_path / "elsewhere", snapshot=recipe_text(recipe))
    assert "extends" not in yaml.safe_load(snapshot.read_text())
    assert load_recipe(snapshot) == recipe


def test_another_kind_of_objective_replaces_and_the_same_kind_is_merged(tmp_path: Path) -> None:
    write(tmp_path, base=BASE)
    other = load_recipe(write(tmp_path, other="extends: base.yaml\nobjective: {name: dpo, beta: 0.5}\n"))
    assert (other.objective.name, other.objective.beta) == ("dpo", 0.5)
    same = load_recipe(write(tmp_path, same="extends: base.yaml\nobjective: {rank_weight: 2}\n"))
    assert (same.objective.variant, same.objective.rank_weight) == ("paper", 2)


def test_adapter_null_means_all_weights_here_as_well(tmp_path: Path) -> None:
    write(tmp_path, base=BASE)
    path = write(tmp_path, mine="extends: base.yaml\nadapter: null\nmodel: {quantization: none}\n")
    assert load_recipe(path).adapter is None


def test_a_chain_of_recipes(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, middle="extends: base.yaml\ndata: {max_tokens: 64}\n")
    recipe = load_recipe(write(tmp_path, mine="extends: middle.yaml\ndata: {template: hh}\n"))
    assert (recipe.data.train, recipe.data.max_tokens, recipe.data.template) == ("ranked.jsonl", 64, "hh")


@pytest.mark.parametrize(
    ("mine", "says"),
    [
        ("extends: mine.yaml\n", "mine.yaml: extends (line 1): mine.yaml extends this recipe in turn"),
        ("data: {train: x}\nextends: bas.yaml\n", "extends (line 2): there is no recipe"),
        ("extends: bas.yaml\n", "did you mean"),
        ("extends: [a, b]\n", "must be the path of one other recipe, not a list"),
        ("extends: ''\n", "must be the path of one other recipe"),
        ("extends: wrong.yaml\n", "model.quant (line 3 of"),
        ("extends: wrong.yaml\nmodel: {quant: x}\n", "model.quant (line 2): unknown key"),
        ("extends: broken.yaml\n", "broken.yaml, line 1: this is not valid YAML"),
        ("extends: cycle.yaml\n", "extends this recipe in turn"),
    ],
)
def test_errors_name_the_file_that_holds_the_key(tmp_path: Path, mine: str, says: str) -> None:
    write(
        tmp_path,
        base=BASE,
        wrong="model:\n  name: x\n  quant: nf4\ndata: {train: x}\ntraining: {output_dir: runs/x}\n",
        broken="model: [",
        cycle="extends: mine.yaml\n",
    )
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, mine=mine))
    assert says in str(caught.value)


def test_extends_is_no_override(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"extends \(override\): unknown key; is read in recipe files only"):
        load_recipe(recipe_file, ["extends=base.yaml"])
