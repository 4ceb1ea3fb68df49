"""A killed run continues as if nothing had happened; a changed one does not continue at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from train.ranked_files import logged, small_recipe, write_groups

from rrhf_peft.recipe import recipe_text
from rrhf_peft.records import UserError
from rrhf_peft.train.run import train_recipe
from rrhf_peft.train.run_folder import last_checkpoint

STEPS = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine"}
SEEN = ("loss", "grad_norm", "learning_rate", "rank_loss", "sft_loss", "pair_accuracy")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 24)


def launch(recipe_file, *arguments):
    command = [sys.executable, "-m", "rrhf_peft.train", str(recipe_file), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_kill_minus_nine_and_resume(tiny_model_folder, ranked, tmp_path, dropout):
    adapter = {"r": 4, "lora_dropout": dropout}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(small_recipe(tiny_model_folder, ranked, whole, adapter=adapter, training=STEPS))

    recipe = small_recipe(tiny_model_folder, ranked, cut, adapter=adapter, training=STEPS)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    run = launch(tmp_path / "recipe.yaml")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if (cut / "metrics.jsonl").exists() and len((cut / "metrics.jsonl").read_text().splitlines()) >= 6:
            break
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    output, _ = run.communicate()
    assert run.returncode == -signal.SIGKILL, output
    assert last_checkpoint(cut) is not None

    train_recipe(recipe, resume=True)
    expected, got = logged(whole), logged(cut)
    assert [line["step"] for line in got] == [line["step"] for line in expected] == list(range(1, 19))
    for name in SEEN:
        assert [line[name] for line in got] == pytest.approx([line[name] for line in expected], rel=1e-6), name
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_cut_short_is_passed_over(tiny_model_folder, ranked, tmp_path):
    run = tmp_path / "run"
    train_recipe(small_recipe(tiny_model_folder, ranked, run, training=STEPS))
    assert last_checkpoint(run).name == "checkpoint-18"
    (run / "checkpoint-18" / "trainer_state.json").write_text('{"global_step": 1')
    assert last_checkpoint(run).name == "checkpoint-16"
    (run / "checkpoint-20").mkdir()
    assert last_checkpoint(run).name == "checkpoint-16"


def test_resume_refuses_a_changed_recipe_or_data(tiny_model_folder, ranked, tmp_path):
    run = tmp_path / "run"
    training = {**STEPS, "num_train_epochs": 1}
    train_recipe(small_recipe(tiny_model_folder, ranked, run, training=training))
    changed = small_recipe(tiny_model_folder, ranked, run, training={**training, "learning_rate": 2e-3})
    with pytest.raises(UserError, match=r"training\.learning_rate was 0\.001 and is 0\.002"):
        train_recipe(changed, resume=True)
    other = write_groups(tmp_path / "other.jsonl", 24, seed=9)
    other.replace(ranked_copy := tmp_path / "ranked.jsonl")
    with pytest.raises(UserError, match="other tokens or scores"):
        train_recipe(small_recipe(tiny_model_folder, ranked_copy, run, training=training), resume=True)
    train_recipe(changed, resume=True, ignore_changes=True)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["learning_rate"] == 2e-3


def test_an_occupied_folder_is_left_alone_unless_told(tiny_model_folder, ranked, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    recipe = small_recipe(tiny_model_folder, ranked, run)
    with pytest.raises(UserError, match="already holds files"):
        train_recipe(recipe)
    with pytest.raises(UserError, match="replaces run folders only"):
        train_recipe(recipe, overwrite=True)
    assert (run / "thesis.txt").read_text() == "years of work"

    again = tmp_path / "again"
    train_recipe(small_recipe(tiny_model_folder, ranked, again))
    (again / "stale").touch()
    train_recipe(small_recipe(tiny_model_folder, ranked, again), overwrite=True)
    assert not (again / "stale").exists()
