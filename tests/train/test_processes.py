"""Two processes train as one does: DDP and FSDP2 over gloo, through `accelerate launch`."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from train.ranked_files import logged, small_recipe, write_groups

from rrhf_peft.recipe import recipe_text
from rrhf_peft.train.run import train_recipe

TESTS = str(Path(__file__).resolve().parents[1])
CURVE = ("loss", "grad_norm", "rank_loss", "sft_loss", "pair_accuracy", "best_hit_rate", "logps/writer-0")
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
    },
}

DDP = {"distributed_type": "MULTI_GPU"}  # use_cpu makes it gloo; MULTI_CPU would want MPI
RAM_EFFICIENT = {"fsdp_cpu_ram_efficient_loading": True}


def accelerate_launch(recipe, folder, config, *arguments):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"num_processes": 2, "use_cpu": True, "mixed_precision": "no", "main_process_port": port, **config}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **settings}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["-m", "train.launched", str(folder / "recipe.yaml"), *arguments]
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(settings["num_processes"])]
    assert_mechanism(config["distributed_type"], seen)
    return done.stdout + done.stderr, seen


def assert_mechanism(distributed_type, seen):
    """Every process trained inside what the launcher was asked for: left alone, accelerate takes DDP on a CPU."""
    for process in seen:
        sharding = distributed_type == "FSDP"
        assert ("FSDPModule" in process["wrapper"]) == sharding, process
        assert ("DistributedDataParallel" in process["wrapper"]) == (not sharding), process
        assert process["sharded"] == (process["parameters"] if sharding else 0), process
        assert process["same_chunks_everywhere"] == sharding, process
        assert process["sums"] == process["loss"] == "torch.float32", process


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 24)


@pytest.mark.parametrize(
    ("name", "config", "adapter"),
    [
        ("ddp", DDP, {"r": 4}),
        ("fsdp2", FSDP2, {"r": 4}),
        ("fsdp2-one-reads-for-all", {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], **RAM_EFFICIENT}}, None),
    ],
)
def test_two_processes_equal_one(tiny_model_folder, ranked, tmp_path, name, config, adapter):
    # chunks of 150 tokens: the processes need different numbers of them
    sections = {"adapter": adapter, "engine": {"chunk_tokens": 150}}
    together = small_recipe(tiny_model_folder, ranked, tmp_path / "one", **sections)
    train_recipe(together)
    split = small_recipe(
        tiny_model_folder, ranked, tmp_path / "two", training={"per_device_train_batch_size": 2}, **sections
    )
    accelerate_launch(split, tmp_path / "launch", config)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 6
    for metric in CURVE:  # differences of p_i near 4, of which float32 holds the next 5e-7 away: absolute, not relative
        expected = [line[metric] for line in one]
        assert [line[metric] for line in two] == pytest.approx(expected, rel=1e-5, abs=4e-6), metric
    weights = "model.safetensors" if adapter is None else "adapter_model.safetensors"
    expected, got = (load_file(tmp_path / run / weights) for run in ("one", "two"))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert got[key].shape == value.shape
        assert (got[key] - value).abs().max() < 1e-4, key  # six steps of Adam move a weight by up to 6e-3


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        pytest.param(DDP, "adapter_off", marks=pytest.mark.slow, id="ddp-adapter_off"),
        pytest.param(DDP, "cached", marks=pytest.mark.slow, id="ddp-cached"),
        pytest.param(FSDP2, "adapter_off", marks=pytest.mark.slow, id="fsdp2-adapter_off"),
        pytest.param(FSDP2, "cached", id="fsdp2-cached"),
    ],
)
def test_bfloat16_stays_inside_the_model(tiny_model_folder, ranked, tmp_path, config, reference):
    """A policy that is still its own reference loses ln 2 a pair, which no bfloat16 on the way to the loss can say."""
    sections = {"objective": {"name": "dpo", "reference": reference}}
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_nan_inf_filter": False}
    alone = {**training, "per_device_train_batch_size": 4, "bf16": True}
    train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "one", training=alone, **sections))
    recipe = small_recipe(tiny_model_folder, ranked, tmp_path / "two", training=training, **sections)
    _, seen = accelerate_launch(recipe, tmp_path / "launch", {**config, "mixed_precision": "bf16"})
    for process in seen:
        assert process["compute"] == "torch.bfloat16"
        assert (process["layout"], process["rejected"]) == ("shared", [])
        assert process["difference"] < 4e-2  # on some CPUs both layouts round alike, and it is 0
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    # The cache was computed in batches of another shape, which rounds otherwise; a cast of the sums would say 0.72.
    nearly = {"adapter_off": 1e-6, "cached": 1e-4}[reference]
    assert two[0]["loss"] == pytest.approx(math.log(2), abs=nearly)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-2)
    assert two[-1]["loss"] != two[0]["loss"]
