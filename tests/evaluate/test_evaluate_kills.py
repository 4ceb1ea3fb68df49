"""Evaluations killed with SIGKILL after chosen acts of writing, and run by two processes: the same numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
from evaluate.evaluate_recipes import evaluation_values, write_json, write_rows

from rrhf_peft.recipe import make_recipe

#: Children are forked from a server that has the heavy imports and no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rrhf_peft.evaluate.run"])


def work(values, rank, count, port, writes, reached):
    """Evaluate; after the given number of writes to disk, say so and hang until killed."""
    import torch

    from rrhf_peft.evaluate.run import evaluate_recipe

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    fsync, done = os.fsync, 0

    def counting(descriptor):
        nonlocal done
        fsync(descriptor)
        done += 1
        if done == writes:
            reached.touch()
            time.sleep(3600)

    os.fsync = counting
    evaluate_recipe(make_recipe(values, needs=["evaluation"]))


def run(values, folder, *, count=1, writes=None):
    """Run to the end, or kill all processes once the main one has written `writes` times; whether it was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reached = folder / "reached"
    children = [
        PROCESSES.Process(target=work, args=(values, rank, count, port, writes if rank == 0 else None, reached))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children) and not reached.exists():
        time.sleep(0.01)
    was_reached = reached.exists()
    for child in children:
        if was_reached:
            child.kill()
        child.join(120)
    reached.unlink(missing_ok=True)
    assert was_reached or [child.exitcode for child in children] == [0] * count
    return was_reached


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_folder, tmp_path_factory):
    """The values of a recipe with every kind of file, and its evaluation.json."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rows = [{"prompt": f"{i}?", "responses": ["yes", "no, never"], "scores": [i % 2, 0.5]} for i in range(3)]
    write_json(folder / "prompts.json", [f"Question {number}: {'why ' * (number % 5)}" for number in range(20)])
    values = evaluation_values(
        tiny_model_folder,
        folder,
        policies={"base": {}, "same": {}},
        decoding={"k": 2, "max_new_tokens": 5},
        perplexity={},
        pairs=write_rows(folder / "pairs.jsonl", rows),
        references=write_rows(folder / "references.jsonl", [{"prompt": "a", "responses": ["b"]}]),
        max_tokens=64,
        wins={"against": "base", "by": "letters"},
    )
    assert not run(values, folder)
    return values, (folder / "out" / "evaluation.json").read_bytes()


def kill_and_resume(uninterrupted, folder, writes, counts=(1,)):
    values, expected = uninterrupted
    values = {**values, "evaluation": {**values["evaluation"], "output": str(folder / "out")}}
    for number, after in enumerate(writes):
        assert run(values, folder, count=counts[number % len(counts)], writes=after), "ended before it was killed"
        assert not (folder / "out" / "table.md").exists()
    assert not run(values, folder, count=counts[len(writes) % len(counts)])
    assert (folder / "out" / "evaluation.json").read_bytes() == expected
    left = [path.name for path in folder.rglob("*") if path.suffix in (".parts", ".stages", ".partial")]
    assert left == []


def test_killed_and_resumed(uninterrupted, tmp_path):
    kill_and_resume(uninterrupted, tmp_path, writes=(4, 8, 11))


def test_two_processes_make_the_same_numbers(uninterrupted, tmp_path):
    kill_and_resume(uninterrupted, tmp_path, writes=(6,), counts=(2,))


@pytest.mark.slow
@pytest.mark.parametrize("after", range(6, 12))
def test_killed_again_and_again(uninterrupted, tmp_path, after):
    """Every resumption does as many acts of writing; fewer than six would begin again and again and get nowhere."""
    values, expected = uninterrupted
    values = {**values, "evaluation": {**values["evaluation"], "output": str(tmp_path / "out")}}
    kills = 0
    while run(values, tmp_path, writes=after):
        kills += 1
        assert kills < 100
    assert kills
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == expected


@pytest.mark.slow
def test_accelerate_launch_prints_the_json_once(uninterrupted, tmp_path):
    values, expected = uninterrupted
    values = {**values, "evaluation": {**values["evaluation"], "output": str(tmp_path / "out")}}
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(values))
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    config = tmp_path / "accelerate.yaml"  # use_cpu makes it gloo; MULTI_CPU would want MPI
    config.write_text(json.dumps({**settings, "use_cpu": True, "mixed_precision": "no", "main_process_port": 0}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "rrhf_peft.evaluate", str(recipe), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == json.loads(expected)
