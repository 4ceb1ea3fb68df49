"""A folder in which everything is right, for cases to spoil; and the promise that holds whatever they spoil."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rrhf_peft.cli import app

RECIPE = """\
model:
  name: model
data:
  train: ranked.jsonl
  max_tokens: 64
training:
  output_dir: runs/train
  max_steps: 1
  use_cpu: true
sampling:
  prompts: prompts.txt
  output: runs/candidates.jsonl
  keep_provided: false
  candidates:
    - {strategy: top_p, k: 2, max_new_tokens: 4}
scoring:
  input: candidates.jsonl
  output: runs/scored.jsonl
  scorer: {name: rule, function: "hostile.rules:length"}
evaluation:
  prompts: prompts.txt
  output: runs/evaluation
  policies: {base: {}}
  decoding: {k: 1, max_new_tokens: 4}
  scorers:
    length: {name: rule, function: "hostile.rules:length"}
"""
ROUNDS = """\
model: {name: model}
sampling: {prompts: prompts.txt, candidates: [{strategy: top_p, k: 2, max_new_tokens: 4}], keep_provided: false}
scoring: {scorer: {name: rule, function: "hostile.rules:length"}}
training: {max_steps: 1, use_cpu: true}
rounds: {output: runs/rounds, count: 1}
"""
COMPARE = """\
model: {name: model}
data: {train: ranked.jsonl, max_tokens: 64}
training: {max_steps: 1, use_cpu: true}
evaluation: {prompts: prompts.txt, decoding: {k: 1, max_new_tokens: 4}}
compare: {output: runs/compare, objectives: {rrhf: {}, dpo: {beta: 0.1}}}
"""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Model, data, recipes and a trained adapter that work."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_model_folder, folder / "model")
    rows = [
        {"prompt": f"Question {n}?", "responses": ["Yes.", "No, no.", "Maybe so."], "scores": [2, 0, 1]}
        for n in range(4)
    ]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "candidates.jsonl").write_text((folder / "ranked.jsonl").read_text())
    (folder / "prompts.txt").write_text("One?\nTwo?\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "rounds.yaml").write_text(ROUNDS)
    (folder / "compare.yaml").write_text(COMPARE)
    (folder / "letter.txt").write_text("somebody's letter\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in ("train recipe.yaml training.output_dir=run", "evaluate recipe.yaml evaluation.output=measured"):
            result = CliRunner().invoke(app, command.split())
            assert result.exit_code == 0, result.output
    finally:
        os.chdir(before)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


Refused = Callable[..., str]


@pytest.fixture
def refused(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`refused(command, spoil)`: the command fails as promised in a copy of the good folder; returns what it said."""
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(words: list[str], spoil: Callable[[Path], object] | None = None) -> str:
        if spoil is not None:
            spoil(folder)
        before = contents(folder)
        result = CliRunner().invoke(app, words)
        said = result.stderr
        assert result.exit_code in (1, 2), result.output
        assert "Traceback" not in result.output
        after = contents(folder)
        assert {name: after.get(name) for name in before} == before, "a file that was there was touched"
        if result.exit_code == 1:
            last = said.rstrip().splitlines()[-1]
            assert last.startswith("Error: "), said
            assert said.count("Error: ") == 1 or said.count("\nError: ") <= 1
            assert len(last) < 5000
            assert last.endswith((".", "?")), last
            return last
        assert "Usage:" in said
        return said

    return run
