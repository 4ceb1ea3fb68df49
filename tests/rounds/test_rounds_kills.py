"""Rounds killed with SIGKILL at chosen acts of writing, in every stage, and resumed: the uninterrupted run's tables.

The child kills itself when it is about to touch a file, which an audit hook tells it; no clock has a part in that.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import random
import signal
import sys

import pytest
from rounds.round_recipes import NEEDS, evaluated, round_values, run_quietly, tables

from rrhf_peft.recipe import make_recipe
from rrhf_peft.rounds.stages import RoundFolder

#: Children are forked from a server that has the heavy imports and no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rrhf_peft.rounds.run", "score_rules"])
ACTS = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}


def changed_path(folder, event, arguments):
    """The path inside `folder` that this event is about to change, or None."""
    if event not in ACTS or not isinstance(arguments[ACTS[event]], (str, os.PathLike)):
        return None
    if event == "open" and not set(arguments[1] or "") & set("wxa+"):
        return None
    path = os.path.relpath(arguments[ACTS[event]], folder)
    return None if path.startswith("..") else path


def work(values, act, number):
    """Run the rounds, and die before the `number`-th act that the pattern `act` matches."""
    import torch

    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # as where it is not installed: drawing takes longer than all the rest
    folder, seen = values["rounds"]["output"], 0

    def watch(event, arguments):
        nonlocal seen
        path = changed_path(folder, event, arguments)
        if path is not None and fnmatch.fnmatchcase(f"{event} {path}", act):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run_quietly(make_recipe(values, needs=NEEDS))


def run_in_child(values, act="*", number=0):
    """Whether the child was killed; else it has finished."""
    child = PROCESSES.Process(target=work, args=(values, act, number))
    child.start()
    child.join(240)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_folder, tmp_path_factory):
    """The tables of a run that nobody disturbed, and the weights of its last policy."""
    folder = tmp_path_factory.mktemp("whole")
    assert not run_in_child(values_in(tiny_model_folder, folder))
    weights = folder / "rounds" / "round-2" / "run" / "adapter_model.safetensors"
    return tables(folder / "rounds"), weights.read_bytes()


def values_in(model, folder):
    return evaluated(round_values(model, folder, rounds={"prompts_per_round": 8}), folder)


#: (act, which one of that kind is not lived through): in every stage and between them, in the order in which one
#: run after the other meets them.
MOMENTS = (
    ("open .recipe.yaml.partial", 1),
    ("open base/evaluation/samples/*/part-0.jsonl", 1),
    ("os.rename base/evaluation/table.md", 1),
    ("open round-1/candidates*/part-0.jsonl", 2),
    ("os.rmdir round-1/candidates.jsonl.stages", 1),
    ("open round-1/scored*/part-0.jsonl", 2),
    ("os.rename round-1/stages.json", 1),
    ("open round-1/run/checkpoint-4/trainer_state.json", 1),
    ("open round-1/run/metrics.jsonl", 7),
    ("open round-1/run/adapter_config.json", 1),
    ("os.rename round-1/stages.json", 1),
    ("open round-1/evaluation/perplexity/*/part-0.jsonl", 1),
    ("os.rename round-1/stages.json", 1),
    ("open .rounds.json.partial", 1),
    ("os.rename table.md", 1),
    ("open round-2/run/checkpoint-8/adapter_config.json", 1),
    ("os.rename round-2/evaluation/evaluation.json", 1),
    ("os.rename table.md", 2),
)


def test_kills_in_every_stage_change_no_byte(tiny_model_folder, tmp_path, uninterrupted):
    values = values_in(tiny_model_folder, tmp_path)
    for act, number in MOMENTS:
        assert run_in_child(values, act, number), f"finished before number {number} of {act}"
    assert not run_in_child(values)
    assert tables(tmp_path / "rounds") == uninterrupted[0]
    assert (tmp_path / "rounds/round-2/run/adapter_model.safetensors").read_bytes() == uninterrupted[1]
    rows = json.loads(uninterrupted[0]["rounds.json"])["rounds"]
    assert [row["policy"] for row in rows] == ["base", "round-1", "round-2"]
    assert None not in [value for row in rows[1:] for value in row.values()]
    assert RoundFolder(tmp_path / "rounds", 1).finished()["train"]["resumed"]
    left = [path.name for path in (tmp_path / "rounds").rglob("*") if path.name.endswith((".stages", ".parts"))]
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_kills_anywhere_change_no_byte(tiny_model_folder, tmp_path, uninterrupted, seed):
    values = values_in(tiny_model_folder, tmp_path)
    acts = random.Random(seed)
    kills = 0
    while run_in_child(values, "*", acts.randint(1, 60)) and kills < 60:
        kills += 1
    assert 5 <= kills < 60
    assert tables(tmp_path / "rounds") == uninterrupted[0]
    assert (tmp_path / "rounds/round-2/run/adapter_model.safetensors").read_bytes() == uninterrupted[1]
