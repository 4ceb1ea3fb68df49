"""Online training that is killed, shared among processes, or weighed: as if it had been one run of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train.online_rules import online_recipe, write_prompts
from train.ranked_files import logged
from train.test_processes import accelerate_launch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rrhf_peft.recipe import make_recipe, recipe_text
from rrhf_peft.train.run import train_recipe
from rrhf_peft.train.run_folder import last_checkpoint

TESTS = str(Path(__file__).resolve().parents[1])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.txt")


@pytest.fixture(autouse=True)
def rules_are_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sampled(run):
    """File name -> its rows by prompt; which process came first is no part of the result."""
    return {
        path.name: sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["meta"]["prompt_index"])
        for path in sorted((run / "online").iterdir())
    }


def test_kill_minus_nine_and_resume(tiny_model_folder, prompts, tmp_path):
    """Killed between two checkpoints, in the middle of what one refresh has sampled."""
    sections = {
        "online": {"every": 2, "kl_coefficient": 0.05},
        "training": {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 5, "lr_scheduler_type": "cosine"},
        "adapter": {"lora_dropout": 0.2},
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(online_recipe(tiny_model_folder, prompts, whole, **sections))
    recipe = online_recipe(tiny_model_folder, prompts, cut, **sections)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    command = [sys.executable, "-m", "rrhf_peft.train", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    while run.poll() is None:
        if (cut / "metrics.jsonl").exists() and len(logged(cut)) >= 6 and last_checkpoint(cut) is not None:
            break
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    output, _ = run.communicate()
    assert run.returncode == -signal.SIGKILL, output

    train_recipe(recipe, resume=True)
    expected, got = lines(whole), lines(cut)
    assert [(line["step"], line.get("refresh")) for line in got] == [
        (line["step"], line.get("refresh")) for line in expected
    ]
    for name in ("loss", "grad_norm", "rewards/mean", "kl/response", "response_tokens"):
        assert [line.get(name, 0) for line in got] == pytest.approx(
            [line.get(name, 0) for line in expected], rel=1e-6
        ), name
    assert sampled(cut) == sampled(whole)
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_two_processes_equal_one(tiny_model_folder, prompts, tmp_path):
    """With ties: a process may have nothing to learn from where the other has.

    Equal is what does not hang on a draw: the first refresh, from the same weights, and the steps that learn from it.
    Two processes add gradients in another order, and a draw of the second refresh may lie at a border, after which a
    response goes its own way; most responses still agree, which those of another policy would not.
    """
    sections = {"rule": "letters_of_some", "online": {"every": 3, "kl_coefficient": 0.05}}
    epochs = {"num_train_epochs": 2}
    train_recipe(online_recipe(tiny_model_folder, prompts, tmp_path / "one", training=epochs, **sections))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **epochs}
    recipe = online_recipe(tiny_model_folder, prompts, tmp_path / "two", training=split, **sections)
    accelerate_launch(recipe, tmp_path / "launch", {"distributed_type": "MULTI_GPU"})
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [(line["step"], line.get("refresh")) for line in two] == [
        (line["step"], line.get("refresh")) for line in one
    ]
    before = sum(line.get("refresh", 0) == 0 and line["step"] <= 3 for line in one)
    assert [line["step"] for line in one[:before]] == [0, 1, 2, 3]
    assert any(0 < line.get("groups_without_pairs", 0) < 1 for line in two)
    for name in ("loss", "grad_norm", "rewards/mean", "kl/response", "groups_without_pairs", "pair_accuracy"):
        expected = [line.get(name, 0) for line in one[:before]]
        assert [line.get(name, 0) for line in two[:before]] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert one[before - 1]["loss"] != one[1]["loss"]

    refreshes = zip(sampled(tmp_path / "one").values(), sampled(tmp_path / "two").values(), strict=True)
    first, second = ([(a["responses"], b["responses"]) for a, b in zip(*rows, strict=True)] for rows in refreshes)
    assert all(a == b for a, b in first)
    # Half of these are the second process's answers: its policy has learned what the first one's has.
    same = [response in b for a, b in second for response in a]
    assert sum(same) > 0.8 * len(same)
    unlearned = [response in b for (a, _), (b, _) in zip(first, second, strict=True) for response in a]
    assert sum(unlearned) < 0.2 * len(unlearned)


@pytest.mark.slow
def test_the_penalty_costs_no_memory_of_the_size_of_the_base(tiny_model_folder, tmp_path, capsys):
    """Peak memory of the process, offline against online with KL, on 50 million parameters in float32."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "model")
    del model
    ranked = tmp_path / "ranked.jsonl"
    groups = [
        {"prompt": f"say {i}:", "responses": [f"answer no. {j}" for j in range(4)], "scores": [3, 2, 1, 0]}
        for i in range(12)
    ]
    ranked.write_text("".join(json.dumps(group) + "\n" for group in groups))
    online = {"every": 1, "kl_coefficient": 0.1, "keep_provided": False}
    peaks = {}
    for name in ("offline", "online"):
        short = {"num_train_epochs": 1}
        recipe = online_recipe(tmp_path / "model", ranked, tmp_path / name, online=online, training=short)
        values = recipe.model_dump(mode="json", exclude_unset=True)
        if name == "offline":
            del values["online"]
        (tmp_path / f"{name}.yaml").write_text(recipe_text(make_recipe(values)))
        command = [sys.executable, "-m", "rrhf_peft.train", str(tmp_path / f"{name}.yaml")]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peaks[name] = logged(tmp_path / name)[-1]["peak_memory_gib"]
    with capsys.disabled():
        print(f"\nbase {weights:.3f} GiB, peak offline {peaks['offline']:.3f}, online with KL {peaks['online']:.3f}")
    assert peaks["online"] - peaks["offline"] < 0.5 * weights
