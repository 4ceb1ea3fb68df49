"""Scoring killed with SIGKILL at random moments, resumed, also by two processes: the same file as without."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reward_folders import llama_classifier
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rrhf_peft.recipe import load_recipe
from rrhf_peft.records import UserError
from rrhf_peft.score.run import score_recipe

torch.set_num_threads(1)  # as in the processes of a launch: two threads sum in another order, and last digits differ

TESTS = Path(__file__).resolve().parents[1]


def write_recipe(folder, output, scorer, groups):
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"question {g}",
            "responses": ["ab " * rng.randint(1, 40) for _ in range(rng.randint(2, 5))],
        }
        for g in range(groups)
    ]
    source = folder / "candidates.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / f"{output}.json"  # JSON is YAML
    scoring = {"input": str(source), "output": str(folder / f"{output}.jsonl"), "unit_groups": 4, "scorer": scorer}
    recipe.write_text(json.dumps({"scoring": scoring}))
    return recipe


def score(recipe):
    return score_recipe(load_recipe(recipe, needs=["scoring"]), console=Console(quiet=True))


def killed_in_a_fork(recipe, seconds, *, parts=None):
    """Score in a child process and kill it after a while; whether it was still running.

    With `parts`, the while begins when that file has grown, so that there is work to continue on any machine.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            score(recipe)
            code = 0
        finally:
            os._exit(code)
    before = parts.stat().st_size if parts is not None and parts.exists() else 0
    done = 0
    while parts is not None and not done and (not parts.exists() or parts.stat().st_size <= before):
        time.sleep(0.005)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        time.sleep(seconds)
        done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert status == 0
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def same_files(folder, one, other):
    for suffix in (".jsonl", ".report.json"):
        assert (folder / f"{one}{suffix}").read_bytes() == (folder / f"{other}{suffix}").read_bytes()
    assert not (folder / f"{other}.jsonl.parts").exists()


def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    rule = {"name": "rule", "function": "score_rules:slow_length"}
    score(write_recipe(tmp_path, "whole", rule, groups=150))
    recipe = write_recipe(tmp_path, "killed", rule, groups=150)
    moments = random.Random(7)
    kills, finished = 0, 0
    parts = tmp_path / "killed.jsonl.parts" / "part-0.jsonl"
    for number in range(10):
        if not (tmp_path / "killed.jsonl").exists():
            # One in two at a random moment of the whole run, one in two soon after new work was written.
            seconds = moments.uniform(0.02, 0.5) if number % 2 else moments.uniform(0, 0.05)
            kills += killed_in_a_fork(recipe, seconds, parts=None if number % 2 else parts)
            finished = max(finished, parts.read_bytes().count(b"\n") if parts.exists() else 0)
    assert kills >= 2
    assert finished > 0
    if not (tmp_path / "killed.jsonl").exists():
        score(recipe)
    same_files(tmp_path, "whole", "killed")
    before = (tmp_path / "killed.jsonl").stat().st_mtime_ns
    assert score(recipe).report == score(recipe).report  # the same work, done before
    assert (tmp_path / "killed.jsonl").stat().st_mtime_ns == before


#: What changes files, as the interpreter's audit hooks call it.
FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def killed_before_operation(number, folder, work):
    """Work in a child process that kills itself right before it changes a file that time; whether it came so far."""
    child = os.fork()
    if child == 0:
        done = 0

        def hook(event, arguments):
            nonlocal done
            is_write = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in FILE_OPERATIONS and is_write and str(arguments[0]).startswith(str(folder)):
                done += 1
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_before_any_change_of_a_file_costs_nothing(tmp_path, overwrite):
    """The same command ends the work; until then the old output stays, and what is not ours always does."""
    whole = tmp_path / "whole"
    whole.mkdir()
    score(write_recipe(whole, "out", {"name": "rule", "function": "score_rules:small_letters"}, groups=6))
    old = {"name": "rule", "function": "score_rules:cost"}
    kills = 0
    for number in range(1, 200):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        if overwrite:
            score(write_recipe(folder, "out", old, groups=6))
        before = (folder / "out.jsonl").read_bytes() if overwrite else None
        recipe = load_recipe(
            write_recipe(folder, "out", {"name": "rule", "function": "score_rules:small_letters"}, groups=6),
            needs=["scoring"],
        )

        def work(recipe=recipe):
            score_recipe(recipe, overwrite=overwrite, console=Console(quiet=True))

        killed = killed_before_operation(number, folder, work)
        made = (folder / "out.jsonl").read_bytes() if (folder / "out.jsonl").exists() else None
        assert made in (before, (whole / "out.jsonl").read_bytes())
        if killed:
            kills += 1
            again = overwrite and (made == before or number % 2 == 0)
            score_recipe(recipe, overwrite=again, console=Console(quiet=True))
        for name in ("out.jsonl", "out.report.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), (number, name)
        left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert left == {"candidates.jsonl", "notes.txt", "out.json", "out.jsonl", "out.report.json"}
        if not killed:
            break
    assert 10 < kills < 150


def test_a_kill_between_the_output_and_the_end_leaves_it_to_the_next_run(tmp_path, monkeypatch):
    rule = {"name": "rule", "function": "score_rules:slow_length"}
    score(write_recipe(tmp_path, "whole", rule, groups=10))
    recipe = write_recipe(tmp_path, "killed", rule, groups=10)

    def kill(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("rrhf_peft.jobs.remove_work_folder", kill)
    with pytest.raises(KeyboardInterrupt):
        score(recipe)
    monkeypatch.undo()
    assert (tmp_path / "killed.jsonl.parts").exists()
    score(recipe)
    same_files(tmp_path, "whole", "killed")


def test_other_settings_do_not_continue_what_was_begun(tmp_path):
    recipe = write_recipe(tmp_path, "out", {"name": "rule", "function": "score_rules:slow_length"}, groups=100)
    assert killed_in_a_fork(recipe, 0, parts=tmp_path / "out.jsonl.parts" / "part-0.jsonl")
    with pytest.raises(UserError, match="other work"):
        score_recipe(load_recipe(recipe, ["scoring.scorer.function=score_rules:cost"], needs=["scoring"]))


RULE_FILE = """
import sys
from pathlib import Path

def rule(prompt, responses):
    if prompt == "question 9" and not Path("{go}").exists():
        sys.exit(1)
    return [{factor} * len(response) for response in responses]
"""


def stopped_rule(tmp_path, monkeypatch, factor=1):
    """A rule in a file that stops at the tenth group until there is a file `go`; each call writes the file anew."""
    (tmp_path / "changing_rule.py").write_text(RULE_FILE.format(go=tmp_path / "go", factor=factor))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "changing_rule", raising=False)
    importlib.invalidate_caches()
    return {"name": "rule", "function": "changing_rule:rule"}


def test_changed_code_of_a_rule_does_not_continue_what_was_begun(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, "out", stopped_rule(tmp_path, monkeypatch), groups=12)
    with pytest.raises(UserError, match="What was scored before is kept"):
        score(recipe)
    parts = tmp_path / "out.jsonl.parts" / "part-0.jsonl"
    before = parts.read_bytes()
    assert before.count(b"\n") == 2
    (tmp_path / "go").touch()
    stopped_rule(tmp_path, monkeypatch, factor=-100)
    with pytest.raises(UserError, match=r"a change of the code of the rule changing_rule:rule\. Undo"):
        score(recipe)
    assert parts.read_bytes() == before
    stopped_rule(tmp_path, monkeypatch)
    score(recipe)
    assert all(score > 0 for row in read(tmp_path / "out.jsonl") for score in row["scores"])
    stopped_rule(tmp_path, monkeypatch, factor=-100)
    with pytest.raises(UserError, match="already exists, and was made from other input or with other settings"):
        score(recipe)


def test_other_weights_under_the_same_name_do_not_continue_what_was_begun(tmp_path, tiny_model_folder, monkeypatch):
    """A reward model, a policy and its adapter that were trained further between two runs."""
    llama_classifier(tmp_path / "rm", tiny_model_folder)
    shutil.copytree(tiny_model_folder, tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig()).save_pretrained(
        tmp_path / "adapter"
    )
    policy = {"name": "policy", "model": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")}
    parts = {
        "model": {"scorer": {"name": "reward_model", "model": str(tmp_path / "rm")}},
        "policy": {"scorer": policy},
        "rule": {"scorer": stopped_rule(tmp_path, monkeypatch)},
    }
    recipe = write_recipe(tmp_path, "out", {"name": "composite", "parts": parts}, groups=12)
    with pytest.raises(UserError, match="What was scored before is kept"):
        score(recipe)
    (tmp_path / "go").touch()
    for file, name in (
        ("rm/model.safetensors", "the reward model's files in"),
        ("base/model.safetensors", "the policy's weights in"),
        ("adapter/adapter_model.safetensors", "the adapter in"),
    ):
        path = tmp_path / file
        before, times = path.read_bytes(), path.stat()
        tensors = load_file(path)
        save_file({key: 2 * tensor + 1e-3 for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
        assert len(path.read_bytes()) == len(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(UserError, match=rf"before a change of {name} {re.escape(str(path.parent))}\. Undo"):
            score(recipe)
        path.write_bytes(before)  # with another time, as a copy has it
    score(recipe)
    assert len(read(tmp_path / "out.jsonl")) == 12


def test_the_same_command_again_is_done_and_another_scorer_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, "out", {"name": "rule", "function": "score_rules:small_letters"}, groups=6)
    first = score(recipe)
    before = (tmp_path / "out.jsonl").read_bytes()
    again = score(recipe)
    assert (again.output, again.report) == (first.output, first.report)
    with pytest.raises(UserError, match="was made from other input or with other settings"):
        score_recipe(load_recipe(recipe, ["scoring.scorer.function=score_rules:cost"], needs=["scoring"]))
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "candidates.jsonl", "out.json", "out.jsonl", "out.report.json"
    ]  # fmt: skip


def test_two_runs_on_one_output_are_kept_apart(tmp_path):
    recipe = write_recipe(tmp_path, "out", {"name": "rule", "function": "score_rules:slow_length"}, groups=400)
    process = launch(recipe, 1)
    parts = tmp_path / "out.jsonl.parts" / "part-0.jsonl"
    while not parts.exists() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None
    with pytest.raises(UserError, match=r"out\.jsonl: another run is working on it \(process"):
        score_recipe(load_recipe(recipe, ["scoring.scorer.function=score_rules:cost"], needs=["scoring"]))
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert read(tmp_path / "out.jsonl")[0]["scores"] != []


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def launch(recipe, processes):
    command = [sys.executable, "-m", "rrhf_peft.score", str(recipe)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, "-m", "rrhf_peft.score", str(recipe)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def killed_when_it_works(recipe, processes, after, output):
    """Launch, wait for the first finished units or the end, kill after a while; whether it was still running."""
    process = launch(recipe, processes)
    parts = output.with_name(f"{output.name}.parts")
    before = sum(file.stat().st_size for file in parts.glob("part-*.jsonl"))
    while process.poll() is None and sum(file.stat().st_size for file in parts.glob("part-*.jsonl")) == before:
        time.sleep(0.02)
    time.sleep(after)
    running = process.poll() is None
    if running:
        own = psutil.Process(process.pid)
        for victim in [own, *own.children(recursive=True)]:  # the launcher's workers have sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    text = process.communicate()[0]
    assert running or process.returncode == 0, text
    return running


def reward_scorer(tmp_path, tiny_model_folder):
    """A reward model and a rule, which need the whole data to be combined."""
    llama_classifier(tmp_path / "rm", tiny_model_folder)
    model = {"name": "reward_model", "model": str(tmp_path / "rm"), "batch_tokens": 256}
    rule = {"name": "rule", "function": "score_rules:slow_length"}
    parts = {"model": {"scorer": model, "normalize": "zscore"}, "rule": {"scorer": rule, "normalize": "zscore"}}
    return {"name": "composite", "parts": parts}


def test_two_processes_killed_and_one_that_resumes_make_the_file_of_one(tmp_path, tiny_model_folder):
    scorer = reward_scorer(tmp_path, tiny_model_folder)
    score(write_recipe(tmp_path, "whole", scorer, groups=300))
    recipe = write_recipe(tmp_path, "killed", scorer, groups=300)
    assert killed_when_it_works(recipe, 2, 0.1, tmp_path / "killed.jsonl")
    score(recipe)
    same_files(tmp_path, "whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills_of_the_command_change_nothing(tmp_path, tiny_model_folder, processes):
    scorer = reward_scorer(tmp_path, tiny_model_folder)
    score(write_recipe(tmp_path, "whole", scorer, groups=600))
    recipe = write_recipe(tmp_path, "killed", scorer, groups=600)
    moments = random.Random(processes)
    output = tmp_path / "killed.jsonl"
    kills = 0
    for _ in range(10):
        if not output.exists():
            kills += killed_when_it_works(recipe, processes, moments.uniform(0.0, 0.8), output)
    assert kills >= 5
    while not output.exists() or (tmp_path / "killed.jsonl.parts").exists():
        process = launch(recipe, processes)
        text = process.communicate()[0]
        assert process.returncode == 0, text
    same_files(tmp_path, "whole", "killed")
