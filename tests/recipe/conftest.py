"""A smallest recipe, as a file and as values."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALLEST = """\
model:
  name: some/model
data:
  train: ranked.jsonl
training:
  output_dir: runs/x
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST)
    return path
