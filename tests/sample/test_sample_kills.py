"""Sampling killed with SIGKILL at random moments, also as two processes: in the end the uninterrupted run's file."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time

import pytest
from sample.sample_recipes import read_rows, sample_recipe_of, sample_values, write_prompts

from rrhf_peft.recipe import make_recipe
from rrhf_peft.sample.run import sample_recipe

#: Two policies, so that a kill can fall between stages.
#: An output and its mark.
MADE = {"out.jsonl", ".out.jsonl.rrhf-peft.json"}
ENTRIES = (
    {"strategy": "top_p", "k": 3, "temperature": 1.5, "max_new_tokens": 12},
    {"strategy": "diverse_beam", "k": 4, "temperature": 0.8, "max_new_tokens": 12},
)
#: Children are forked from a server that has the heavy imports and no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rrhf_peft.sample.run"])


def work(values, rank, count, port):
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sample_recipe(make_recipe(values, needs=["sampling"]))


def start(values, count):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [PROCESSES.Process(target=work, args=(values, rank, count, port)) for rank in range(count)]
    for child in children:
        child.start()
    return children


def finish(values, count):
    children = start(values, count)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * count


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_folder, tmp_path_factory):
    """The values of a recipe, its prompts, the file that it makes, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = write_prompts(folder / "prompts.json", 30)
    other = {**ENTRIES[0], "model": str(other_model(tiny_model_folder, folder)), "source": "other"}
    values = sample_values(tiny_model_folder, prompts, folder / "whole.jsonl", [*ENTRIES, other], batch_tokens=250)
    finish(values, 1)  # the server starts here
    (folder / "whole.jsonl").unlink()
    began = time.monotonic()
    finish(values, 1)
    return values, (folder / "whole.jsonl").read_bytes(), time.monotonic() - began


def other_model(folder, place):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(place / "other")
    AutoTokenizer.from_pretrained(folder).save_pretrained(place / "other")
    return place / "other"


def written_rows(folder):
    """Lines in all parts there are; a part may be moved away while it is looked at."""
    lines = 0
    for part in folder.rglob("part-*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            lines += part.read_bytes().count(b"\n")
    return lines


def wait_for_rows(children, folder, more):
    """Until the run has written that many lines beyond what was there, or ended; no clock decides it."""
    before = written_rows(folder)
    while any(child.is_alive() for child in children) and written_rows(folder) < before + more:
        time.sleep(0.002)


def kill_and_resume(uninterrupted, tmp_path, counts, kills, seed):
    """Kill `kills` runs of one output, each with the next number of processes, and let the last one finish.

    Every second kill falls at a random moment of the whole run, start included; the others fall after a random
    small number of new lines, so that however fast or busy the machine is, some find work to continue.
    """
    values, expected, seconds = uninterrupted
    output = tmp_path / "out.jsonl"
    values = {**values, "sampling": {**values["sampling"], "output": str(output)}}
    moments, killed, left = random.Random(seed), 0, []
    for number in range(kills):
        if output.exists():
            break
        children = start(values, counts[number % len(counts)])
        if number % 2:
            time.sleep(moments.uniform(0.05, 1.0) * seconds / 2)
        else:
            wait_for_rows(children, tmp_path, more=moments.randint(1, 3))
        for child in children:
            killed += child.is_alive()
            child.kill()  # SIGKILL
        for child in children:
            child.join()
        left.append(sorted(path.name for path in tmp_path.rglob("*") if path.is_file()))
    if {path.name for path in tmp_path.iterdir()} != MADE:
        finish(values, counts[kills % len(counts)])
    assert killed, "every run ended before it was killed"
    assert output.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == MADE
    return left


def test_killed_at_random_moments(uninterrupted, tmp_path):
    left = kill_and_resume(uninterrupted, tmp_path, counts=[1], kills=4, seed=0)
    assert any(name.startswith("part-") for names in left for name in names), left  # work to be continued


def test_killed_as_two_processes_and_resumed_as_one_or_two(uninterrupted, tmp_path):
    left = kill_and_resume(uninterrupted, tmp_path, counts=[2, 1, 2], kills=4, seed=1)
    assert any(name.startswith("part-") for names in left for name in names), left


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", [[1], [2], [3, 1]], ids=str)
def test_killed_ten_times(uninterrupted, tmp_path, counts, seed):
    kill_and_resume(uninterrupted, tmp_path, counts=counts, kills=10, seed=seed)


def test_killed_after_the_rows_were_written_and_before_the_parts_were_removed(uninterrupted, tmp_path, monkeypatch):
    values, expected, _ = uninterrupted
    output = tmp_path / "out.jsonl"
    values = {**values, "sampling": {**values["sampling"], "output": str(output)}}

    def kill(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr("rrhf_peft.sample.run.remove_work_folder", kill)
        with pytest.raises(KeyboardInterrupt):
            sample_recipe(make_recipe(values, needs=["sampling"]))
    assert (tmp_path / "out.jsonl.stages").exists()
    sample_recipe(make_recipe(values, needs=["sampling"]))
    assert output.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == MADE


def test_what_was_changed_between_two_runs_is_done_again(tiny_model_folder, tmp_path):
    """A half-finished stage of other settings must not leak into the rows."""
    prompts = write_prompts(tmp_path / "prompts.json", 6)
    output = tmp_path / "out.jsonl"
    hot = [{**ENTRIES[0], "temperature": 2.0}]
    values = sample_values(tiny_model_folder, prompts, output, ENTRIES[:1])
    (child,) = start(values, 1)
    stages = tmp_path / "out.jsonl.stages"
    while child.is_alive() and not list(stages.glob("*/part-0.jsonl")):
        time.sleep(0.005)
    child.kill()
    child.join()
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, hot), overwrite=output.exists())
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "clean.jsonl", hot))
    assert read_rows(output) == read_rows(tmp_path / "clean.jsonl")


def test_accelerate_launch_on_two_processes_makes_the_same_file(uninterrupted, tmp_path):
    values, expected, _ = uninterrupted
    output = tmp_path / "out.jsonl"
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(values))
    config = tmp_path / "accelerate.yaml"  # use_cpu makes it gloo; MULTI_CPU would want MPI
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    config.write_text(json.dumps({**settings, "use_cpu": True, "mixed_precision": "no", "main_process_port": 0}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "rrhf_peft.sample", str(recipe), f"sampling.output={output}", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.read_bytes() == expected
    report = json.loads(done.stdout)
    assert report["prompts"] == 30
    assert report["output"] == str(output)
