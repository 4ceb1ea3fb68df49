"""Recipes of `recipes/paper/paper`, `recipes/compare` and `recipes/wombat`: complete, planned, and run in miniature.

Wombat's run is in `test_wombat`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from house.recipe_checks import (
    ROOT,
    assert_header_is_complete,
    assert_plan_is_the_stated_one,
    assert_snapshot_is_the_same,
)
from reward_folders import value_head_state

from rrhf_peft.compare.run import evaluation_recipe, objective_recipe
from rrhf_peft.evaluate.run import evaluate_recipe
from rrhf_peft.objectives import ONLINE_ONLY
from rrhf_peft.recipe import load_recipe, make_recipe, read_recipe
from rrhf_peft.recipe.schema import OBJECTIVE_NAMES
from rrhf_peft.rounds.run import run_rounds
from rrhf_peft.sample.run import sample_recipe
from rrhf_peft.score.run import score_recipe
from rrhf_peft.train.run import train_recipe

PAPER = sorted((ROOT / "recipes" / "paper" / "paper").glob("*.yaml"))
COMPARE = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))
WOMBAT = sorted((ROOT / "recipes" / "wombat").glob("*.yaml"))
TRAINED_7B = [path for path in (*PAPER, *WOMBAT) if "training" in read_recipe(path)]
EVALUATED = ("table", "best_of_4", "reward_model_accuracy")


def by_folder(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def paper(name: str) -> Path:
    return ROOT / "recipes" / "paper" / "paper" / f"{name}.yaml"


@pytest.mark.parametrize("path", [*PAPER, *COMPARE, *WOMBAT], ids=by_folder)
def test_it_is_complete_and_in_its_folders_table(path: Path, tmp_path: Path) -> None:
    assert_header_is_complete(path)
    assert_snapshot_is_the_same(path, tmp_path)
    assert f"({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TRAINED_7B, ids=by_folder)
def test_its_plan_is_the_one_in_its_header(path: Path, tmp_path: Path) -> None:
    assert_plan_is_the_stated_one(path, tmp_path)


def test_the_folders_are_in_the_index() -> None:
    index = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    folders = {path.parent for path in (ROOT / "recipes").rglob("*.yaml")} - {ROOT / "recipes"}
    for folder in folders - {ROOT / "recipes" / "accelerate", ROOT / "recipes" / "paper"}:
        assert f"({folder.relative_to(ROOT / 'recipes')}/" in index, folder


@pytest.mark.parametrize("name", ["bp", "sp", "dp", "d", "p"])
def test_the_papers_settings_sample_as_the_sampling_recipes_do(name: str) -> None:
    """Those are run by tests of their own."""
    whole, other = load_recipe(paper(name)), load_recipe(ROOT / "recipes" / "sampling" / f"{name}.yaml", needs=[])
    paths = {"output"}
    assert whole.sampling.model_dump(exclude=paths) == other.sampling.model_dump(exclude=paths)
    assert whole.scoring.input == whole.sampling.output
    assert whole.data.train == whole.scoring.output


def test_the_papers_rows_differ_in_what_they_are_about() -> None:
    dp = load_recipe(paper("dp"))
    for path in PAPER:
        recipe = load_recipe(path, needs=[])
        if recipe.training is None:
            continue
        if recipe.adapter is None:  # online training is LoRA's
            changed = {"output_dir"}
            assert recipe.training.model_dump(exclude=changed) == dp.training.model_dump(exclude=changed)
        if recipe.scoring is not None:
            assert recipe.scoring.scorer == dp.scoring.scorer
        if recipe.online is not None:
            assert recipe.online.scorer == dp.scoring.scorer
    plain, penalised = load_recipe(paper("op_32")), load_recipe(paper("op_32_kl"))
    assert (plain.online.kl_coefficient, penalised.online.kl_coefficient > 0) == (0, True)
    assert plain.online.model_dump(exclude={"kl_coefficient"}) == penalised.online.model_dump(
        exclude={"kl_coefficient"}
    )
    policies = load_recipe(paper("table"), needs=[]).evaluation.policies
    runs = {recipe.training.output_dir for path in TRAINED_7B if (recipe := load_recipe(path, needs=[])).rounds is None}
    rounds = {f"runs/paper/ip/round-{number}/run" for number in (1, 2, 3)}
    named = {policy.model or policy.adapter for policy in policies.values()}
    assert named == (runs - {"runs/wombat/run"}) | rounds | {None, "huggyllama/llama-7b"}


# Miniatures: HH dialogues in rm-static's layout, a byte-level Llama, and gptj-rm-static's layout on a small GPT-J.


@pytest.fixture(scope="module")
def hh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"\n\nHuman: Is {n} odd?\n\nAssistant:", "response": " Yes.", "chosen": " Yes.", "rejected": " Oh."}
        for n in range(4)
    ]
    path = tmp_path_factory.mktemp("hh") / "rm_static.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, str]:
    """Where the scorer of the paper's recipes finds its model in miniature."""
    folder = tmp_path_factory.mktemp("gptj")
    config, _, state = value_head_state(tiny_model_folder)
    config.save_pretrained(folder)
    torch.save(state, folder / "hf_ckpt.pt")
    return {"model": str(folder), "base": str(folder), "tokenizer": str(tiny_model_folder)}


def in_miniature(name: str, model: Path, hh: Path, reward: dict[str, str], folder: Path, *changes: str):
    """The recipe with its models, data and sizes replaced, and nothing else."""
    values = read_recipe(paper(name))
    if "model" in values:
        values["model"].update(name=str(model), dtype="float32")
    for section in ("sampling", "evaluation"):
        if section in values:
            values[section].update(prompts=str(hh), max_prompts=2)
    for entry in values.get("sampling", {}).get("candidates", []):
        entry["max_new_tokens"] = 6
    if "online" in values:
        values["online"]["decoding"]["max_new_tokens"] = 6
        values["online"]["every"] = 1
    evaluation = values.get("evaluation", {})
    if evaluation:
        evaluation["decoding"]["max_new_tokens"] = 6
        if "perplexity" in evaluation:
            evaluation["perplexity"]["model"] = str(model)
        if "pairs" in evaluation:
            evaluation.update(pairs=str(hh), max_tokens=128)
        if "policies" in evaluation:
            evaluation["policies"] = {policy: {"model": str(model)} for policy in list(evaluation["policies"])[:2]}
    scorers = [values.get("scoring", {}).get("scorer"), values.get("online", {}).get("scorer")]
    for scorer in [*scorers, *evaluation.get("scorers", {}).values()]:
        if scorer is not None:
            scorer.update(reward, max_tokens=128)
    if "scoring" in values and "sampling" not in values:
        values["scoring"]["input"] = str(hh)
    if values.get("data", {}).get("train") == "Dahoas/rm-static":
        values["data"]["train"] = str(hh)
    if "training" in values:
        values["training"].update(max_steps=1, gradient_accumulation_steps=1, use_cpu=True, bf16=False)
        values["training"].update(per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True)
    text = yaml.safe_dump(values).replace("runs/paper", str(folder))
    return make_recipe(yaml.safe_load(text), overrides=changes, needs=[])


def test_dp_goes_from_prompts_to_a_table(tiny_model_folder, hh, reward_folder, tmp_path) -> None:
    recipe = in_miniature("dp", tiny_model_folder, hh, reward_folder, tmp_path)
    sample_recipe(recipe)
    score_recipe(recipe)
    rows = [json.loads(line) for line in (tmp_path / "dp_scored.jsonl").read_text().splitlines()]
    assert all(row["sources"][:2] == ["chosen", "rejected"] and len(row["scores"]) > 2 for row in rows)
    for name in ("dp", "without_rank", "without_ft", "variant_paper", "variant_balanced", "rank_weight"):
        outcome = train_recipe(in_miniature(name, tiny_model_folder, hh, reward_folder, tmp_path))
        assert math.isfinite(outcome.metrics["train_loss"]), name
        assert (outcome.run_folder / "model.safetensors").is_file()
    table = in_miniature("table", tiny_model_folder, hh, reward_folder, tmp_path)
    trained = {"alpaca": {}, "dp": {"model": str(tmp_path / "dp")}}
    values = {"model": table.model, "evaluation": {**table.evaluation.model_dump(), "policies": trained}}
    evaluate_recipe(make_recipe({**values, "model": table.model.model_dump()}, needs=[]))
    assert "dp" in (tmp_path / "table" / "table.md").read_text()


def test_sft_needs_no_reward_model(tiny_model_folder, hh, reward_folder, tmp_path) -> None:
    outcome = train_recipe(in_miniature("sft", tiny_model_folder, hh, reward_folder, tmp_path))
    assert math.isfinite(outcome.metrics["train_loss"])


def test_provided_responses_are_scored(tiny_model_folder, hh, reward_folder, tmp_path) -> None:
    outcome = score_recipe(in_miniature("provided", tiny_model_folder, hh, reward_folder, tmp_path))
    assert set(outcome.report.sources) == {"chosen", "rejected"}


@pytest.mark.parametrize("name", ["op_32", "op_32_kl"])
def test_online_training_answers_its_prompts(name, tiny_model_folder, hh, reward_folder, tmp_path) -> None:
    outcome = train_recipe(in_miniature(name, tiny_model_folder, hh, reward_folder, tmp_path))
    assert math.isfinite(outcome.metrics["train_loss"])
    assert (outcome.run_folder / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_iterated_rounds_train_all_weights_further(tiny_model_folder, hh, reward_folder, tmp_path) -> None:
    recipe = in_miniature("ip", tiny_model_folder, hh, reward_folder, tmp_path, "rounds.count=2")
    outcome = run_rounds(recipe)
    assert len(outcome.rows) == 3  # the untrained model, and two rounds
    assert (tmp_path / "ip" / "round-2" / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in EVALUATED if name != "table"])
def test_it_evaluates(name, tiny_model_folder, hh, reward_folder, tmp_path) -> None:
    evaluate_recipe(in_miniature(name, tiny_model_folder, hh, reward_folder, tmp_path))
    figures = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert len(figures["policies"]) == 2


# The comparison.


COMPARISON = ROOT / "recipes" / "compare" / "compare.yaml"


def test_every_objective_is_compared_on_the_same_terms() -> None:
    recipe = load_recipe(COMPARISON, needs=["compare"])
    recipes = {name: objective_recipe(recipe, name) for name in recipe.compare.names}
    assert set(recipes) == OBJECTIVE_NAMES - ONLINE_ONLY
    for name, one in recipes.items():
        assert one.objective.name == name
        assert one.training.output_dir == f"runs/compare/{name}"
        same = one.model_dump(mode="json", exclude={"objective": True, "training": {"output_dir"}})
        assert same == recipes["rrhf"].model_dump(mode="json", exclude={"objective": True, "training": {"output_dir"}})
    policies = evaluation_recipe(recipe).evaluation.policies
    assert {name: policy.adapter for name, policy in policies.items()} == {
        "base": None,
        **{name: f"runs/compare/{name}" for name in recipes},
    }


# What is known of the paper's figures.


def test_the_papers_tables_are_whole_and_say_where_they_come_from() -> None:
    known = yaml.safe_load((ROOT / "recipes" / "paper" / "paper_numbers.yaml").read_text(encoding="utf-8"))
    assert known["source"] == "https://arxiv.org/abs/2304.05302"
    assert all(source["who"] and "address" in source for source in known["sources"].values())
    sizes = {name: len(rows) for name, rows in known["tables"].items()}
    assert sizes == {
        "2_hh": 13,
        "3_people": 3,
        "5_reward_model_accuracy": 5,
        "6_sampling": 15,
        "7_without_rank": 2,
        "8_samples_per_query": 5,
        "imdb": 9,
        "wombat": 3,
    }
    for row in [row for name in ("2_hh", "6_sampling", "7_without_rank", "imdb") for row in known["tables"][name]]:
        assert isinstance(row["reward"], float), row
        assert isinstance(row["perplexity"], float) or row["setting"] == "Best-of-4", row
    for row in known["tables"]["3_people"]:
        assert row["win"] + row["tie"] + row["lose"] == 100, row
