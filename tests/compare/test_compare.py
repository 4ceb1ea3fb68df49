"""`rrhf-peft compare`: one recipe, several objectives, one table; killed, it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rrhf_peft.cli import app
from rrhf_peft.compare import run as compare_run
from rrhf_peft.recipe import load_recipe, recipe_text
from rrhf_peft.records import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recipes" / "compare" / "compare.yaml"


@pytest.fixture
def command(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    """A comparison of two objectives that takes seconds."""
    ranked = tmp_path / "ranked.jsonl"
    groups = [{"prompt": f"{n}?", "responses": ["Good.", "Bad.", "Well."], "scores": [2, 0, 1]} for n in range(4)]
    ranked.write_text("".join(json.dumps(group) + "\n" for group in groups))
    changes = [f"model.name={tiny_model_folder}", f"data.train={ranked}", "training.max_steps=2"]
    changes += ["training.use_cpu=true", f"evaluation.prompts={ranked}", f"evaluation.pairs={ranked}"]
    changes += [
        "evaluation.decoding.max_new_tokens=4",
        f"compare.output={tmp_path / 'runs'}",
        "compare.only=[kto, rrhf]",
    ]
    return ["compare", str(SHIPPED), *changes]


def run(command: list[str]) -> Result:
    return CliRunner().invoke(app, command)


def test_it_trains_what_is_not_trained_and_compares(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run([*command, "--json"])
    assert first.exit_code == 0, first.output
    assert list(json.loads(first.stdout)["policies"]) == ["base", "rrhf", "kto"]
    trained = (tmp_path / "runs" / "kto" / "adapter_model.safetensors").stat()

    calls = []
    train = compare_run.train_recipe
    monkeypatch.setattr(
        compare_run, "train_recipe", lambda recipe, **how: (calls.append(recipe.objective.name), train(recipe, **how))
    )
    more = run([*command, "compare.only=[rrhf, sft, kto]"])
    assert more.exit_code == 0, more.output
    assert calls == ["sft"]
    assert (tmp_path / "runs" / "kto" / "adapter_model.safetensors").stat().st_mtime_ns == trained.st_mtime_ns
    figures = json.loads((tmp_path / "runs" / "evaluation" / "evaluation.json").read_text())
    assert list(figures["policies"]) == ["base", "rrhf", "sft", "kto"]

    changed = run([*command, "compare.objectives.kto.beta=0.7"])
    assert changed.exit_code == 1
    assert "kto was trained with other settings (objective.beta)" in changed.stderr
    assert calls == ["sft"]


def test_overwriting_starts_again_and_leaves_what_is_not_of_the_comparison(command: list[str], tmp_path: Path) -> None:
    assert run(command).exit_code == 0
    weights = tmp_path / "runs" / "kto" / "adapter_model.safetensors"
    before = weights.read_bytes()
    for name in ("notes.txt", "kto/notes.txt", "evaluation/samples/notes.txt"):
        notes = tmp_path / "runs" / name
        notes.write_text("years of work")
        refused = run([*command, "--overwrite"])
        assert refused.exit_code == 1
        assert f"holds {name}, which rrhf-peft compare did not write" in " ".join(refused.stderr.split())
        assert notes.read_text() == "years of work"
        assert weights.read_bytes() == before
        notes.unlink()
    changed = [*command, "compare.objectives.kto.beta=0.7"]
    assert run(changed).exit_code == 1
    again = run([*changed, "--overwrite"])
    assert again.exit_code == 0, again.output
    assert weights.read_bytes() != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".runs")]


def test_interrupted_it_goes_on(command: list[str], tmp_path: Path) -> None:
    """Ctrl-C in the second training, as soon as it has written its first checkpoint."""
    words = [*command, "training.save_strategy=steps", "training.save_steps=1", "training.max_steps=12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rrhf_peft.compare", *words[1:]],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    second = tmp_path / "runs" / "kto"
    while process.poll() is None and not list(second.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert not (second / "adapter_model.safetensors").exists()
    before = (tmp_path / "runs" / "rrhf" / "adapter_model.safetensors").stat().st_mtime_ns
    again = run(words)
    assert again.exit_code == 0, again.output
    assert "continuing from" in again.stderr
    assert (tmp_path / "runs" / "rrhf" / "adapter_model.safetensors").stat().st_mtime_ns == before
    steps = [json.loads(line).get("step") for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_the_snapshot_is_the_same_and_single_verbs_understand_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(SHIPPED, ["compare.only=[kto, dpo]"])
    assert (recipe.objective.name, recipe.training.output_dir) == ("dpo", "runs/compare/dpo")
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("compare.only=[dop]", "there is no objective 'dop'; there are rrhf, sft"),
        ("compare.only=[]", "compare.only"),
        ("training.output_dir=x", "training.output_dir: is set by compare"),
        ("evaluation.output=x", "evaluation.output: is set by compare"),
        ("evaluation.policies={base: {}}", "evaluation.policies: is set by compare"),
        ("objective.name=dpo", "objective: is set by compare.objectives"),
        ("compare.objectives.dpo.betta=1", "compare.objectives.dpo.betta (override): unknown key; did you mean 'beta'"),
        ("compare.objectives={}", "compare.objectives"),
        ("compare.objectives={../x: {name: dpo}}", "names a file as well"),
        ("compare.output=.", "compare.output (override): is no path to write to"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(SHIPPED, [change], needs=["compare"])
    assert says in str(caught.value)
