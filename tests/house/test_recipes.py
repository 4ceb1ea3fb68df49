"""Every shipped recipe parses, plans as its header says, and takes one step with a tiny model in place of its own."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from house.recipe_checks import (
    CONFIGS,
    ROOT,
    assert_header_is_complete,
    assert_plan_is_the_stated_one,
    assert_snapshot_is_the_same,
)

from rrhf_peft.plan.run import plan_memory
from rrhf_peft.recipe import load_recipe, make_recipe, recipe_text
from rrhf_peft.train.run import train_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAUNCH_CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


#: Short answers, and a rule in the place of a reward model.
ONLINE = (
    "online.decoding.max_new_tokens=8",
    "online.scorer={name: rule, function: 'rrhf_peft.score:vader'}",
)


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe_path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_recipes_and_each_has_a_row_in_the_table() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "qlora_7b", "lora_7b", "full_8xa100"}
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in [*RECIPES, *LAUNCH_CONFIGS]:
        assert f"({path.relative_to(ROOT / 'recipes')})" in table, path.name


def test_the_header_says_how_to_run_it_where_what_to_expect_and_whether_it_was_run(recipe_path: Path) -> None:
    assert_header_is_complete(recipe_path)


def test_its_snapshot_is_the_same_recipe(recipe_path: Path, tmp_path: Path) -> None:
    assert_snapshot_is_the_same(recipe_path, tmp_path)


def test_its_plan_is_the_one_in_its_header(recipe_path: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    if load_recipe(recipe_path).model.name in CONFIGS:
        assert_plan_is_the_stated_one(recipe_path, tmp_path)
    else:
        assert plan_memory(load_recipe(recipe_path, [f"model.name={tiny_model_folder}"])).peak_bytes > 0


def test_it_takes_a_step_with_a_tiny_model(recipe_path: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    ranked = tmp_path / "ranked.jsonl"
    groups = [
        {"prompt": f"Question {i}?", "responses": ["Yes.", "No, not at all.", "Maybe."], "scores": [2, 0, 1]}
        for i in range(20)
    ]
    ranked.write_text("".join(json.dumps(group) + "\n" for group in groups))
    recipe = load_recipe(
        recipe_path,
        [
            f"model.name={tiny_model_folder}",
            f"data.train={ranked}",
            "data.format=ranked",
            "data.template=raw",
            "data.max_tokens=128",
            "data.max_prompt_tokens=64",
            f"training.output_dir={tmp_path / 'run'}",
            "training.max_steps=1",
            "training.gradient_accumulation_steps=1",
            "training.per_device_train_batch_size=4",
            "training.use_cpu=true",
            "training.bf16=false",
            *(["data.eval_size=4"] if load_recipe(recipe_path).data.eval_size is not None else []),
            *(ONLINE if load_recipe(recipe_path).online is not None else []),
        ],
    )
    outcome = train_recipe(recipe)
    assert math.isfinite(outcome.metrics["train_loss"])
    weights = "model.safetensors" if recipe.adapter is None else "adapter_model.safetensors"
    assert (outcome.run_folder / weights).is_file()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the launch config is for machines without one")
@pytest.mark.parametrize("name", ["cpu_2_processes", pytest.param("cpu_fsdp", marks=pytest.mark.slow)])
def test_two_processes_on_a_cpu_are_one_run(name: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    ranked = tmp_path / "ranked.jsonl"
    groups = [
        {"prompt": f"Question {i}?", "responses": ["Yes.", "No, not at all."], "scores": [1, 0]} for i in range(8)
    ]
    ranked.write_text("".join(json.dumps(group) + "\n" for group in groups))
    values = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(ranked), "max_tokens": 64},
        "training": {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "num_train_epochs": 1},
    }
    (tmp_path / "recipe.yaml").write_text(recipe_text(make_recipe(values)), encoding="utf-8")
    config = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        launch += ["--main_process_port", str(probe.getsockname()[1])]
    done = subprocess.run(
        [*launch, "-m", "rrhf_peft.train", str(tmp_path / "recipe.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "8 groups, 4 per step on 2 processes (cpu)" in done.stderr
    losses = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 2


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_launch_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= 1
    assert f"recipes/accelerate/{path.name}" in path.read_text(encoding="utf-8")
    if path.stem.startswith("fsdp"):
        assert config.fsdp_config["fsdp_version"] == 2
