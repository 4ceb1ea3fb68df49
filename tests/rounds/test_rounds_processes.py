"""All stages on two processes of one launch, DDP and FSDP2: the rounds of one process; also after a kill of both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from rounds.round_recipes import evaluated, read_rows, round_values

TESTS = Path(__file__).resolve().parents[1]
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
    },
}
LAUNCHES = {"ddp": {"distributed_type": "MULTI_GPU"}, "fsdp2": FSDP2}  # use_cpu makes them gloo


def launch(folder, values, config):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"num_processes": 2, "use_cpu": True, "mixed_precision": "no", "main_process_port": port, **config}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **settings}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["-m", "rrhf_peft.rounds", str(folder / "recipe.yaml")]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def values_in(model, folder, per_process):
    folder.mkdir(exist_ok=True)
    training = {"per_device_train_batch_size": per_process, "num_train_epochs": 2, "save_steps": 2}
    return evaluated(round_values(model, folder, training=training), folder)


def numbers(folder):
    return json.loads((folder / "rounds" / "rounds.json").read_text())["rounds"]


def same_rounds(one, two):
    scored = [read_rows(folder / "round-1" / "scored.jsonl") for folder in (one, two)]
    for name in ("prompt", "responses", "scores", "sources"):
        assert [row[name] for row in scored[1]] == [row[name] for row in scored[0]]
    for expected, got in zip(numbers(one.parent), numbers(two.parent), strict=True):
        for name, value in expected.items():
            assert got[name] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-4)), name


@pytest.fixture(scope="module")
def alone(tiny_model_folder, tmp_path_factory):
    """The folder of the same rounds by one process."""
    folder = tmp_path_factory.mktemp("alone")
    values = values_in(tiny_model_folder, folder, 4)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "rrhf_peft.rounds", str(folder / "recipe.yaml")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_do_what_one_does(tiny_model_folder, tmp_path, alone, name):
    run = launch(tmp_path / "two", values_in(tiny_model_folder, tmp_path / "two", 2), LAUNCHES[name])
    text = run.communicate(timeout=400)[0]
    assert run.returncode == 0, text
    same_rounds(alone / "rounds", tmp_path / "two" / "rounds")


@pytest.mark.slow
def test_two_processes_killed_in_training_continue(tiny_model_folder, tmp_path, alone):
    folder = tmp_path / "two"
    values = values_in(tiny_model_folder, folder, 2)
    run = launch(folder, values, LAUNCHES["ddp"])
    whole = folder / "rounds" / "round-1" / "run" / "checkpoint-2" / "trainer_state.json"
    while run.poll() is None and not whole.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(0.01)
    own = psutil.Process(run.pid)
    for victim in [own, *own.children(recursive=True)]:  # the launcher's workers have sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    text = run.communicate()[0]
    assert whole.exists(), text
    assert not (folder / "rounds" / "round-2" / "run").exists()
    run = launch(folder, values, LAUNCHES["ddp"])
    text = run.communicate(timeout=400)[0]
    assert run.returncode == 0, text
    assert "continuing from" in text
    same_rounds(alone / "rounds", folder / "rounds")
