"""A killed run continues as if nothing had happened; a changed one does not continue at all."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import free_port
from rich.console import Console
from safetensors.torch import load_file, save_file
from train.ranked_files import logged, small_recipe, write_groups

from rrhf_peft.recipe import recipe_text
from rrhf_peft.records import UserError
from rrhf_peft.train.run import train_recipe
from rrhf_peft.train.run_folder import checkpoint_to_resume, last_checkpoint, read_metrics
from rrhf_peft.train.trainer import RRHFTrainer

STEPS = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine"}
SEEN = ("loss", "grad_norm", "learning_rate", "rank_loss", "sft_loss", "pair_accuracy", "tokens_saved")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 24)


def launch(recipe_file, *arguments):
    command = [sys.executable, "-m", "rrhf_peft.train", str(recipe_file), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_users_file_inside_a_run_folder_keeps_it_from_being_overwritten(tiny_model_folder, ranked, tmp_path):
    recipe = small_recipe(tiny_model_folder, ranked, tmp_path / "run", training={**STEPS, "max_steps": 4})
    train_recipe(recipe)
    assert (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").is_file()
    for name in ("checkpoint-4/notes.txt", "checkpoint-4/my.safetensors", "runs/notes.txt", "online/step-mine.jsonl"):
        notes = tmp_path / "run" / name
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("years of work")
        with pytest.raises(UserError, match=f"holds {name}, which rrhf-peft train did not write"):
            train_recipe(recipe, overwrite=True)
        assert notes.read_text() == "years of work"
        notes.unlink()
    train_recipe(recipe, overwrite=True)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_kill_minus_nine_and_resume(tiny_model_folder, ranked, tmp_path, dropout):
    adapter = {"r": 4, "lora_dropout": dropout}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(small_recipe(tiny_model_folder, ranked, whole, adapter=adapter, training=STEPS))

    recipe = small_recipe(tiny_model_folder, ranked, cut, adapter=adapter, training=STEPS)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    run = launch(tmp_path / "recipe.yaml")
    wait_for_lines(cut, 6, run)
    run.send_signal(signal.SIGKILL)
    output, _ = run.communicate()
    assert run.returncode == -signal.SIGKILL, output
    assert last_checkpoint(cut) is not None

    train_recipe(recipe, resume=True)
    expected, got = logged(whole), logged(cut)
    assert [line["step"] for line in got] == [line["step"] for line in expected] == list(range(1, 19))
    for name in SEEN:
        assert [line[name] for line in got] == pytest.approx([line[name] for line in expected], rel=1e-6), name
    assert weights(cut) == weights(whole)
    assert closing(cut)["train_loss"] == pytest.approx(closing(whole)["train_loss"], rel=1e-6)


def test_ctrl_c_names_the_step_and_how_to_go_on(tiny_model_folder, ranked, tmp_path):
    run = tmp_path / "run"
    recipe = small_recipe(tiny_model_folder, ranked, run, training={**STEPS, "num_train_epochs": 50})
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    process = launch(tmp_path / "recipe.yaml")
    wait_for_lines(run, 6, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    text = " ".join(output.split())
    assert f"of 300. {last_checkpoint(run)} is kept: the same command with --resume continues from it." in text
    assert "Traceback" not in output
    assert "Loading weights" not in output  # a bar of transformers', in a log


def wait_for_lines(run, count, process):
    """Until a run has logged so many lines, which is when it has taken so many steps."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def weights(run):
    return (run / "adapter_model.safetensors").read_bytes()


def closing(run):
    """The summary at the end, of which there is one."""
    (entry,) = (entry for entry in read_metrics(run / "metrics.jsonl") if "train_runtime" in entry)
    return entry


def stopped(method, monkeypatch, when=lambda *args: True):
    """Ctrl-C reaches a run in this method of the trainer, once."""
    original = getattr(RRHFTrainer, method)

    def interrupted(trainer, *args, **rest):
        if when(trainer, *args):
            monkeypatch.setattr(RRHFTrainer, method, original)
            raise KeyboardInterrupt
        return original(trainer, *args, **rest)

    monkeypatch.setattr(RRHFTrainer, method, interrupted)


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"max_steps": 8, "save_steps": 4, "save_strategy": "steps", "lr_scheduler_type": "constant"}, 8),
        ({"num_train_epochs": 1.5, "save_steps": 3, "save_strategy": "steps"}, 9),
    ],
)
def test_no_step_too_many(tiny_model_folder, ranked, tmp_path, monkeypatch, training, steps):
    """A run stopped after its last checkpoint and before its end is ended, and one that has ended is left alone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(small_recipe(tiny_model_folder, ranked, whole, training=training))
    recipe = small_recipe(tiny_model_folder, ranked, cut, training=training)
    stopped("save_state", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe)
    assert not (cut / "adapter_model.safetensors").exists()

    assert not train_recipe(recipe, resume=True).was_finished
    assert [line["step"] for line in logged(cut)] == list(range(1, steps + 1))
    assert weights(cut) == weights(whole)
    assert closing(cut)["train_loss"] == pytest.approx(closing(whole)["train_loss"], rel=1e-6)
    before = content(cut)
    for resume in (True, False):
        outcome = train_recipe(recipe, resume=resume)
        assert outcome.was_finished
        assert outcome.metrics["train_loss"] == closing(cut)["train_loss"]
    assert content(cut) == before


def content(folder):
    """Every file's bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_run_says_where_it_goes_on_and_logs_as_if_nothing_had_happened(
    tiny_model_folder, ranked, tmp_path, monkeypatch
):
    """Also between two logs, and past a damaged checkpoint and what a kill left in the middle of writing."""
    training = {**STEPS, "logging_steps": 5}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(small_recipe(tiny_model_folder, ranked, whole, training=training))
    recipe = small_recipe(tiny_model_folder, ranked, cut, training=training)
    stopped("_rates", monkeypatch, when=lambda trainer: trainer.state.global_step == 10)
    said = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe, console=said)
    assert f"Interrupted after step 10 of 18. {cut / 'checkpoint-8'} is kept: the same command with --resume" in (
        said.file.getvalue()
    )
    optimizer = cut / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    (cut / ".tmpQ7x2").write_bytes(b"half of the weights")
    (cut / "checkpoint-12").mkdir()
    (cut / "checkpoint-12" / "adapter_model.safetensors").write_bytes(b"a part")

    train_recipe(recipe, resume=True, console=said)
    assert "checkpoint-8 is not whole (optimizer.pt is damaged)" in said.file.getvalue()
    assert f"continuing from {cut / 'checkpoint-4'}" in said.file.getvalue()
    assert not (cut / ".tmpQ7x2").exists()
    expected, got = logged(whole), logged(cut)
    assert [line["step"] for line in got] == [line["step"] for line in expected] == [5, 10, 15]
    for name in SEEN:
        assert [line[name] for line in got] == pytest.approx([line[name] for line in expected], rel=1e-6), name
    assert weights(cut) == weights(whole)
    assert closing(cut)["train_loss"] == pytest.approx(closing(whole)["train_loss"], rel=1e-6)
    assert closing(cut)["train_runtime"] > 0
    assert {path.name for path in cut.glob("checkpoint-*")} == {path.name for path in whole.glob("checkpoint-*")}


@pytest.fixture(scope="module")
def finished(tiny_model_folder, ranked, tmp_path_factory):
    """A run with the checkpoints 4 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train_recipe(small_recipe(tiny_model_folder, ranked, run, training={**STEPS, "num_train_epochs": 1}))
    return run


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "totals.json",
    ],
)
@pytest.mark.parametrize("harm", ["missing", "cut short", "empty", "other bytes"])
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, name, harm):
    run = shutil.copytree(finished, tmp_path / "run")
    assert last_checkpoint(run).name == "checkpoint-6"
    path = run / "checkpoint-6" / name
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "other bytes": bytes(len(whole))}[harm])
    expected = "checkpoint-6" if (name, harm) == ("totals.json", "missing") else "checkpoint-4"
    assert last_checkpoint(run).name == expected  # older versions wrote no totals.json
    assert checkpoint_to_resume(run)[0].name == expected


def test_without_a_whole_checkpoint_nothing_is_thrown_away(tiny_model_folder, ranked, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    set_mark(run, "working")
    recipe = small_recipe(tiny_model_folder, ranked, run, training={**STEPS, "num_train_epochs": 1})
    for step in (4, 6):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    before = content(run)
    with pytest.raises(UserError, match=r"no checkpoint is left .*optimizer\.pt is missing.*--ignore-changes"):
        train_recipe(recipe, resume=True)
    assert content(run) == before
    train_recipe(recipe, resume=True, ignore_changes=True)
    assert logged(run)[-1]["step"] == 6


def set_mark(run, state):
    mark = json.loads((run / ".rrhf-peft.json").read_text())
    (run / ".rrhf-peft.json").write_text(json.dumps({**mark, "state": state}))


def test_what_a_run_depends_on_beside_its_recipe(tiny_model_folder, ranked, tmp_path):
    """Other base weights and another number of processes are told, each in one paragraph."""
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    run = tmp_path / "run"
    recipe = small_recipe(base, ranked, run, training={**STEPS, "num_train_epochs": 1})
    train_recipe(recipe)
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**described, "processes": 2, "groups_per_step": 8}))
    assert train_recipe(recipe).was_finished  # by two processes or one: there is nothing left to do
    set_mark(run, "working")
    with pytest.raises(
        UserError, match=r"on 2 process.* with 8 groups per step and is on 1 with 4\. .*--ignore-changes"
    ):
        train_recipe(recipe, resume=True)
    (run / "run.json").write_text(json.dumps(described))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the base model has other weights.*--ignore-changes"):
        train_recipe(recipe, resume=True)
    set_mark(run, "whole")
    with pytest.raises(UserError, match=r"the base model has other weights.*--overwrite"):
        train_recipe(recipe)


def test_one_run_at_a_time(tiny_model_folder, ranked, finished, tmp_path):
    """Another run is refused while one holds the folder, and no longer when that one is killed."""
    run = shutil.copytree(finished, tmp_path / "run")
    program = f"from rrhf_peft.files import lock\nwith lock({str(run)!r}): print('held', flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        before = content(run)
        recipe = small_recipe(tiny_model_folder, ranked, run, training={**STEPS, "num_train_epochs": 1})
        for choice in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"another run is working on it \(process {holder.pid} "):
                train_recipe(recipe, **choice)
        assert content(run) == before
        holder.kill()
    assert train_recipe(recipe, resume=True).was_finished


#: 4 ** 26 values, once they are written out.
BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{1: *{old}, 2: *{old}, 3: *{old}, 4: *{old}}}\n"
    for old, new in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("recipe.yaml", "model: [", "cannot be read as a recipe"),
        ("recipe.yaml", "- a list", "this is not a recipe"),
        ("recipe.yaml", BOMB, "this is not a recipe"),
        ("data_report.json", "{", "this is not JSON"),
        ("run.json", "[]", "this is not a JSON object"),
        ("metrics.jsonl", '{"step": 1}\n{"loss"\n{"step": 2}\n', "line 2: this is not the log of a step"),
    ],
)
def test_damaged_files_of_a_run_are_one_paragraph(tiny_model_folder, ranked, finished, tmp_path, name, text, said):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / name).write_text(text)
    recipe = small_recipe(tiny_model_folder, ranked, run, training={**STEPS, "num_train_epochs": 1})
    with pytest.raises(UserError, match=said) as error:
        train_recipe(recipe, resume=True)
    assert str(run / name) in str(error.value)


def test_a_full_disk_is_told_with_what_was_kept(tiny_model_folder, ranked, tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipe = small_recipe(tiny_model_folder, ranked, run, training=STEPS)
    rates = RRHFTrainer._rates

    def fills_the_disk(trainer):
        if trainer.state.global_step == 10:
            (run / "metrics.jsonl").rename(run / "metrics.tmp")
            (run / "metrics.jsonl").symlink_to("/dev/full")
        return rates(trainer)

    monkeypatch.setattr(RRHFTrainer, "_rates", fills_the_disk)
    with pytest.raises(UserError, match="the disk is full") as error:
        train_recipe(recipe)
    assert "after step 10 of 18" in str(error.value)
    assert f"{run / 'checkpoint-8'} is kept: the same command with --resume continues from it" in str(error.value)
    monkeypatch.undo()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.tmp").rename(run / "metrics.jsonl")
    train_recipe(recipe, resume=True)
    assert [line["step"] for line in logged(run)] == list(range(1, 19))


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
    with pytest.raises(UserError, match="so --overwrite leaves it"):
        train_recipe(recipe, overwrite=True)
    with pytest.raises(UserError, match="no run that could be continued"):
        train_recipe(recipe, resume=True)
    assert (run / "thesis.txt").read_text() == "years of work"

    again = tmp_path / "again"
    train_recipe(small_recipe(tiny_model_folder, ranked, again))
    with pytest.raises(UserError, match=r"already holds files of another recipe \(training\.learning_rate was"):
        train_recipe(small_recipe(tiny_model_folder, ranked, again, training={"learning_rate": 0.1}))
    (again / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt, which rrhf-peft train did not write"):
        train_recipe(small_recipe(tiny_model_folder, ranked, again), overwrite=True)
    (again / "notes.txt").unlink()

    first = tmp_path / "first"
    first.mkdir()
    (first / "..rrhf-peft.json.rrhf-peft.partial").write_text('{"made')  # killed while it wrote its very first file
    train_recipe(small_recipe(tiny_model_folder, ranked, first), resume=True)
    assert [path.name for path in first.glob("*.partial")] == []

    (again / "checkpoint-99").mkdir()
    (again / "checkpoint-99" / "stale").touch()
    (again / "report.html").touch()  # what `rrhf-peft report` leaves there
    train_recipe(small_recipe(tiny_model_folder, ranked, again), overwrite=True)
    assert not (again / "checkpoint-99").exists()


def test_a_run_comes_back_when_the_one_in_its_place_fails(tiny_model_folder, ranked, finished, tmp_path):
    """Settings that cannot work are refused first; a base that cannot be trained shows in the first step."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = content(run)
    broken = shutil.copytree(tiny_model_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1e38  # finite, and the logits are not
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    inside = write_groups(run / "ranked.jsonl", 8)
    attempts = [
        (small_recipe(tiny_model_folder, ranked, run, training={"optim": "galore_adamw"}), r"training\.optim: "),
        (small_recipe(tiny_model_folder, ranked, run, training={"lr_scheduler_type": "cosine_with_min_lr"}), "min_lr"),
        (small_recipe(tiny_model_folder, inside, run), "which this run reads"),
        (small_recipe(broken, ranked, run), "not finite"),
    ]
    for recipe, reason in attempts:
        if recipe.data.train != str(inside):
            inside.unlink(missing_ok=True)
        with pytest.raises(UserError, match=reason):
            train_recipe(recipe, overwrite=True)
        inside.unlink(missing_ok=True)
        assert content(run) == before, reason
        write_groups(inside, 8)
    inside.unlink()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".run")] == []


@pytest.mark.slow
def test_a_killed_launcher_ends_its_workers_and_one_process_does_not_take_over(tiny_model_folder, ranked, tmp_path):
    """The step would be of half as many groups; two processes that go on give what they would have given."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training = {**STEPS, "per_device_train_batch_size": 2}
    recipe = small_recipe(tiny_model_folder, ranked, whole, training=training)
    (tmp_path / "whole.yaml").write_text(recipe_text(recipe))
    output, _ = (process := launch_two(tmp_path / "whole.yaml")).communicate(timeout=240)
    assert process.returncode == 0, output
    recipe = small_recipe(tiny_model_folder, ranked, cut, training=training)
    (tmp_path / "cut.yaml").write_text(recipe_text(recipe))
    launcher = launch_two(tmp_path / "cut.yaml")
    wait_for_lines(cut, 6, launcher)
    workers = children(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    deadline = time.monotonic() + 60
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)
    launcher.communicate()
    with pytest.raises(UserError, match=r"on 2 process.* with 4 groups per step and is on 1 with 2\."):
        train_recipe(recipe, resume=True)
    output, _ = (process := launch_two(tmp_path / "cut.yaml", "--resume")).communicate(timeout=240)
    assert process.returncode == 0, output
    assert "continuing from" in output
    expected, got = logged(whole), logged(cut)
    for name in ("step", *SEEN):
        assert [line[name] for line in got] == pytest.approx([line[name] for line in expected], rel=1e-6), name
    assert closing(cut)["train_loss"] == pytest.approx(closing(whole)["train_loss"], rel=1e-6)
    assert weights(cut) == weights(whole)


def launch_two(recipe_file, *arguments):
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    config = recipe_file.with_suffix(".accelerate.yaml")
    config.write_text(yaml.safe_dump({**settings, "use_cpu": True, "main_process_port": free_port()}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "rrhf_peft.train", str(recipe_file), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Whether a process runs: one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
