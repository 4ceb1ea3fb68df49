"""The command in this process, and small material for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rrhf_peft.cli import app

Run = Callable[..., Result]


@pytest.fixture
def rrhf() -> Run:
    """`rrhf(*arguments)` runs the command as `rrhf-peft *arguments` would."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def ranked_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ranked.jsonl"
    groups = [
        {"prompt": f"Question {i}?", "responses": ["Yes.", "No, not at all.", "Maybe."], "scores": [2, 0, 1]}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model_folder: Path, ranked_file: Path) -> Path:
    """A recipe that trains the tiny model for one step, into runs/tiny beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
model:
  name: {tiny_model_folder}
adapter:
  r: 4
data:
  train: {ranked_file}
  max_tokens: 64
training:
  output_dir: {tmp_path / "runs" / "tiny"}
  max_steps: 1
  per_device_train_batch_size: 4
  use_cpu: true
"""
    )
    return path
