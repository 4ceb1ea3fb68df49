"""Every small recipe parses, plans, says in its header how to run it, and reads what another one writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from reproduce_rows import READERS, RECIPES, ROWS

from rrhf_peft.plan.run import plan_memory
from rrhf_peft.recipe import load_recipe, read_recipe, recipe_text

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted(RECIPES.glob("*.yaml"))
STORIES = {f"runs/reproduce/stories/{name}.jsonl" for name in ("train", "held_out")}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def folders(path: Path) -> set[str]:
    """Rows whose folder the recipe names."""
    return set(re.findall(r"^runs/reproduce/seed-0/([^/]+)/", "\n".join(strings(read_recipe(path))), re.M))


def test_rows_are_recipes_and_recipes_are_rows() -> None:
    assert {path.stem for path in PATHS} == set(ROWS)
    assert all(need in ROWS for row in ROWS.values() for need in row.needs)
    assert READERS["pairs"] == len(ROWS) - 2
    assert READERS["base"] == 0


def test_it_parses_and_its_snapshot_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, needs=["model"])
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml", needs=["model"]) == recipe
    assert recipe.model.name == "raincandy-u/TinyStories-656K"


def test_it_plans(path: Path, tiny_model_folder: Path) -> None:
    recipe = load_recipe(path, [f"model.name={tiny_model_folder}"], needs=["model"])
    if recipe.training is not None:
        assert plan_memory(recipe).peak_bytes > 0


def test_its_header_is_complete(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group()
    assert all(line.startswith("#") and len(line) <= 120 for line in header.splitlines())
    for part in ("Hardware:", "Expect:", "Run:"):
        assert f"\n# {part} " in header
    commands = re.findall(r"^#   rrhf-peft (\w+) (\S+)$", header, flags=re.MULTILINE)
    assert header.index("reproduce.py --only-stories") < header.index("rrhf-peft")
    verbs: dict[str, list[str]] = {}
    for verb, recipe in commands:
        assert (ROOT / recipe).is_file()
        verbs.setdefault(Path(recipe).stem, []).append(verb)
    assert list(verbs)[-1] == path.stem
    assert set(verbs) == {path.stem, *needed(path.stem)}
    sections = {"sampling": "sample", "scoring": "score", "training": "train", "evaluation": "evaluate"}
    values = read_recipe(path)
    expected = ["rounds"] if "rounds" in values else [verb for section, verb in sections.items() if section in values]
    assert verbs[path.stem] == expected


def needed(name: str) -> set[str]:
    """The rows that a row needs, and those that they need to make what it reads."""
    names: set[str] = set()
    for need in ROWS[name].needs:
        names |= {need, *ROWS[need].needs}
    return names


def test_it_writes_into_its_own_folder_and_reads_what_it_needs(path: Path) -> None:
    assert folders(path) - {path.stem} <= set(ROWS[path.stem].needs)
    assert set(ROWS[path.stem].needs) - folders(path) <= {"provided"}  # which DP's readers have through DP
    named = {text for text in strings(read_recipe(path)) if text.startswith("runs/")}
    assert {text for text in named if "seed-0" not in text} <= STORIES


def test_rows_differ_in_what_they_are_named_after() -> None:
    """The ablations train on DP's data with DP's settings, but for the objective."""
    dp = read_recipe(ROWS["dp"].recipe)
    for name in ("without_rank", "without_ft", "variant_paper", "variant_released", "rank_weight_1"):
        other = read_recipe(ROWS[name].recipe)
        assert other["data"] == dp["data"]
        assert other["adapter"] == dp["adapter"]
        assert {**other["training"], "output_dir": None} == {**dp["training"], "output_dir": None}
        assert other["objective"] != dp["objective"]
    for name in ROWS:
        evaluation = read_recipe(ROWS[name].recipe).get("evaluation")
        if evaluation is not None:
            for key in ("prompts", "decoding", "scorers", "perplexity", "pairs", "max_tokens"):
                assert evaluation[key] == dp["evaluation"][key], (name, key)
    with_kl, without = (read_recipe(ROWS[name].recipe) for name in ("op_8_kl", "op_8"))
    assert with_kl["online"].pop("kl_coefficient") > 0
    assert with_kl["online"] == without["online"]
