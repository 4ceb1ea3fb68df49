"""The driver with a tiny model: a few rows, and what a second call does; all rows and the document when slow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce
import reproduce_work
from reproduce_document import PARTS
from reproduce_figures import FIGURES
from reproduce_results import best_of_4
from reproduce_rows import ROWS
from reproduce_work import Setup

from rrhf_peft.records import UserError

RULES = [
    f"{section}.function=story_rules:letters"
    for section in ("scoring.scorer", "online.scorer", "evaluation.scorers.vader")
]
SHORTER = [
    *RULES,
    "sampling.max_prompts=12",
    "evaluation.max_prompts=4",
    "evaluation.decoding={strategy: top_p, k: 4, max_new_tokens: 8}",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> list[str]:
    """One seed in this process, without the document's folder."""
    folder = tmp_path_factory.mktemp("reproduce")
    words = "one day a small dog found nice red ball and ran home so very fast to his happy mum".split()
    texts = [" ".join(words[(number * step) % len(words)] for step in range(1, 40)) for number in range(1, 60)]
    stories = folder / "stories.json"
    stories.write_text(json.dumps([f"Number {number} {text}" for number, text in enumerate(texts)]))
    given = {"model": tiny_model_folder, "stories": stories, "output": folder / "runs", "seeds": 3, "workers": 1}
    return [*(f"--{option}={value}" for option, value in given.items()), "--brief"]


@pytest.fixture(scope="module")
def few(command: list[str]) -> list[str]:
    """The command for two rows, which need two more."""
    return [*command, *(f"--set={override}" for override in SHORTER), "--rows", "best_of_4", "p"]


@pytest.fixture(scope="module")
def seed_folder(few: list[str]) -> Path:
    """Where the rows lie after a whole run."""
    assert reproduce.main(few) == 0
    return output_of(few) / "seed-3"


def output_of(command: list[str]) -> Path:
    return next(Path(text.removeprefix("--output=")) for text in command if text.startswith("--output="))


def setup_of(command: list[str], *overrides: str) -> Setup:
    model = next(text.removeprefix("--model=") for text in command if text.startswith("--model="))
    return Setup(model, output_of(command), (*reproduce.BRIEF_OVERRIDES, *SHORTER, *overrides))


def test_rows_named_bring_what_they_need(seed_folder: Path) -> None:
    assert {path.name for path in seed_folder.iterdir()} == {"provided", "pairs", "best_of_4", "p"}
    assert (seed_folder / "p" / "run" / "adapter_model.safetensors").is_file()
    done = json.loads((seed_folder / "p" / "done.json").read_text())
    assert set(done["seconds"]) == {"train", "evaluate"}
    assert done["processor_seconds"] > 0


def test_the_best_of_four_is_the_evaluations(seed_folder: Path) -> None:
    folder = seed_folder / "best_of_4" / "evaluation"
    own = json.loads((folder / "evaluation.json").read_text())["policies"]["best_of_4"]
    assert best_of_4(folder)["reward"] == pytest.approx(own["best_of_n"]["vader"]["4"]["mean"])
    assert best_of_4(folder)["perplexity"] > 1


def test_seeds_reach_every_stage(few: list[str]) -> None:
    setup = setup_of(few)
    recipe = setup.recipe(ROWS["op_8"], 3)
    assert recipe.online is not None
    assert recipe.evaluation is not None
    assert (recipe.online.seed, recipe.evaluation.seed, recipe.training.seed) == (3, 3, 3)  # type: ignore[attr-defined]
    assert "seed-3/op_8/run" in recipe.training.output_dir  # type: ignore[attr-defined]
    assert setup.recipe(ROWS["ip"], 3).sampling.seed == 3  # type: ignore[union-attr]


def test_what_is_finished_is_not_done_again_and_the_rest_continues(
    seed_folder: Path, few: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    work = reproduce_work.run_row

    def recorded(setup: Setup, name: str, seed: int) -> dict[str, float]:
        done.append(name)
        return work(setup, name, seed)

    monkeypatch.setattr(reproduce, "run_row", recorded)
    assert reproduce.main(few) == 0
    assert done == []
    assert "4 of 4 rows are finished already" in capsys.readouterr().out

    adapter = seed_folder / "p" / "run" / "adapter_model.safetensors"
    trained, evaluation = adapter.read_bytes(), seed_folder / "p" / "evaluation" / "evaluation.json"
    before = evaluation.read_text()
    for path in (seed_folder / "p" / "done.json", adapter, evaluation, evaluation.with_name("table.md")):
        path.unlink()  # as a kill leaves it
    assert reproduce.main(few) == 0
    assert done == ["p"]
    assert adapter.read_bytes() == trained
    now = json.loads(evaluation.read_text())["policies"]["p"]
    assert now["rewards"] == json.loads(before)["policies"]["p"]["rewards"]


def test_a_changed_recipe_is_another_row_and_so_are_its_readers(seed_folder: Path, few: list[str]) -> None:
    assert setup_of(few).done(ROWS["p"], 3) is not None
    longer = setup_of(few, "training.learning_rate=1e-3")
    assert longer.done(ROWS["provided"], 3) is not None  # trains nothing
    assert longer.done(ROWS["p"], 3) is None
    other = setup_of(few, "scoring.seed=5")
    assert other.done(ROWS["provided"], 3) is None
    assert other.done(ROWS["p"], 3) is None  # reads what it writes
    assert setup_of(few).done(ROWS["p"], 4) is None


def test_an_error_names_the_row_and_keeps_the_rest(
    seed_folder: Path, few: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(setup: Setup, name: str, seed: int) -> dict[str, float]:
        raise UserError("the disk is full. Make room.")

    monkeypatch.setattr(reproduce, "run_row", failing)
    record = seed_folder / "p" / "done.json"
    text = record.read_text()
    record.unlink()
    assert reproduce.main(few) == 1
    assert "error: row p, seed 3: the disk is full. Make room." in capsys.readouterr().err
    assert (seed_folder / "pairs" / "done.json").is_file()
    record.write_text(text)


def test_stopping_it_says_how_to_go_on(
    few: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_all", stopped)
    assert reproduce.main(few) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_rows_stopped_once_and_run_on_fill_every_table(command: list[str], tmp_path: Path) -> None:
    """As a user runs it: in a process of its own, with two workers."""
    options = {"--output": tmp_path / "runs", "--document": tmp_path / "document", "--workers": 2}
    whole = [sys.executable, reproduce.__file__, *command, *(f"--set={override}" for override in RULES)]
    whole += [f"{option}={value}" for option, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    seed = tmp_path / "runs" / "seed-3"

    with subprocess.Popen(whole, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        while not (seed / "dp" / "begun.json").exists():
            assert running.poll() is None
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)  # what a terminal sends at Ctrl-C
        assert running.stderr is not None
        said = running.stderr.read()  # until the last worker has closed it
        assert running.wait() == 130, said
    assert "the same command goes on" in said
    assert (seed / "pairs" / "done.json").is_file()
    assert not (tmp_path / "document").exists()
    pairs = (seed / "pairs" / "done.json").stat().st_mtime_ns

    done = subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 21 rows are finished already" in done.stdout
    assert (seed / "pairs" / "done.json").stat().st_mtime_ns == pairs
    text = (tmp_path / "document" / "README.md").read_text(encoding="utf-8")
    for name in PARTS:
        part = re.search(rf"<!-- begin: {name} -->\n(.*?)\n<!-- end: {name} -->", text, flags=re.DOTALL)
        assert part is not None, name
        assert len(part.group(1)) > 100, name
    assert "Measured with 1 seed (3), 24 training prompts and 8 held-out prompts" in text
    assert "**holds**" not in text  # one seed decides nothing
    for name in FIGURES:
        assert (tmp_path / "document" / "figures" / f"{name}.png").stat().st_size > 5000

    results = json.loads((tmp_path / "document" / "results.json").read_text(encoding="utf-8"))
    for name in ("dp", "op_8_kl", "base"):
        own = json.loads((seed / name / "evaluation" / "evaluation.json").read_text())["policies"][name]
        assert results["rows"][name]["reward"] == [round(own["rewards"]["vader"]["mean"], 4)]
        assert results["rows"][name]["pair_accuracy"] == [round(own["preference"]["pair_accuracy"]["mean"], 4)]
    report = json.loads((seed / "dp" / "scored.report.json").read_text())
    assert results["candidates"]["dp"]["mean_of_max"] == [round(report["mean_of_max"], 4)]
    rounds = json.loads((seed / "ip" / "rounds" / "rounds.json").read_text())["rounds"]
    for number in (1, 2, 3):
        assert results["rows"][f"ip_{number}"]["reward"] == [round(rounds[number]["reward"], 4)]
    assert results["online"]["op_8"][0]["step"][0] == 0
