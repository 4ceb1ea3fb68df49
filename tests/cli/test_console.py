"""How errors are spoken: one paragraph, one process, the right exit code; defects keep their traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from cli.conftest import Run
from typer.testing import CliRunner, Result

from rrhf_peft import console
from rrhf_peft.records import UserError


def outcome_of(error: BaseException) -> Result:
    app = typer.Typer()

    @app.command()
    @console.plain_errors()
    def verb() -> None:
        raise error

    return CliRunner().invoke(app, [])


def test_a_user_error_is_one_red_paragraph_on_stderr() -> None:
    long = "x.yaml: " + "a very long sentence without an end " * 9
    result = outcome_of(UserError(f"{long}\n  and a second line"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.strip() == f"Error: {long.strip()} and a second line"


def test_square_brackets_in_a_message_are_not_markup() -> None:
    assert "[red]list[int] [/]" in outcome_of(UserError("[red]list[int] [/]")).stderr


def test_an_interruption_exits_with_130() -> None:
    assert outcome_of(KeyboardInterrupt()).exit_code == 130


def test_a_full_gpu_is_answered_with_what_to_lower() -> None:
    result = outcome_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"))
    assert result.exit_code == 1
    for part in ("Tried to allocate 2.00 GiB.", "engine.chunk_tokens", "model.quantization: nf4", "rrhf-peft plan"):
        assert part in result.stderr
    assert "more" not in result.stderr


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    assert outcome_of(error).exception is error


def test_a_process_that_fails_alone_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(console, "SECONDS_FOR_THE_MAIN_PROCESS_TO_SPEAK", 0.0)
    result = outcome_of(UserError("its own trouble"))
    assert result.stderr == "Error: process 3: its own trouble\n"


def test_the_module_and_the_verb_say_the_same(rrhf: Run, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    verb = rrhf("train", missing)
    module = subprocess.run(
        [sys.executable, "-m", "rrhf_peft.train", str(missing)], capture_output=True, text=True, check=False
    )
    assert module.returncode == verb.exit_code == 1
    assert module.stderr == verb.stderr
    usage = subprocess.run(
        [sys.executable, "-m", "rrhf_peft.train", str(missing), "--resume", "--overwrite"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert usage.returncode == 2


def test_of_several_processes_only_the_main_one_speaks(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launch, "-m", "rrhf_peft.train", str(missing)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1
    assert len(re.findall("there is no such recipe", result.stderr)) == 1
    assert "process 1:" not in result.stderr
