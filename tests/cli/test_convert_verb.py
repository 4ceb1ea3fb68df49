"""`rrhf-peft convert`, from arguments to the file it leaves."""

from __future__ import annotations

import json
from pathlib import Path

from cli.conftest import Run

ROW = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "answers": [
    {"answer": "a", "model": "m", "rank": 2.0}, {"answer": "b", "model": "n", "rank": 1.0}
]}  # fmt: skip


def test_convert_writes_a_file_that_inspect_and_training_read(rrhf: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "nectar.jsonl", tmp_path / "ranked.jsonl"
    source.write_text(json.dumps(ROW) + "\n")
    result = rrhf("convert", source, "--format", "nectar", "-o", output)
    assert result.exit_code == 0
    assert "1 of 1 read" in result.output
    assert json.loads(output.read_text())["scores"] == [-2, -1]

    again = rrhf("convert", source, "--output", output)
    assert again.exit_code == 1
    assert "already exists" in " ".join(again.stderr.split())
    assert json.loads(rrhf("convert", source, "-o", output, "--overwrite", "--json").output)["groups_written"] == 1


def test_convert_answers_a_misspelt_format(rrhf: Run, tmp_path: Path) -> None:
    result = rrhf("convert", "x.jsonl", "--format", "nektar", "-o", tmp_path / "x.jsonl")
    assert result.exit_code == 1
    assert "did you mean 'nectar'" in result.stderr
