"""How errors are spoken: one paragraph, one process, the right exit code; the traceback behind --debug."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from cli.conftest import Run
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner, Result

from rrhf_peft import console
from rrhf_peft.cli import app
from rrhf_peft.records import UserError


def outcome_of(error: BaseException, *arguments: str) -> Result:
    app = typer.Typer()

    @app.command()
    @console.verb
    def fail() -> None:
        raise error

    return CliRunner().invoke(app, [*arguments])


def test_a_user_error_is_one_red_paragraph_on_stderr() -> None:
    long = "x.yaml: " + "a very long sentence without an end " * 9
    result = outcome_of(UserError(f"{long}\n  and a second line"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.strip() == f"Error: {long.strip()} and a second line"


def test_square_brackets_in_a_message_are_not_markup() -> None:
    assert "[red]list[int] [/]" in outcome_of(UserError("[red]list[int] [/]")).stderr


def test_an_interruption_exits_with_130() -> None:
    result = outcome_of(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    assert outcome_of(KeyboardInterrupt("All is kept.")).stderr == "Interrupted. All is kept.\n"


def test_a_full_gpu_is_answered_with_what_to_lower() -> None:
    result = outcome_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"))
    assert result.exit_code == 1
    for part in ("Tried to allocate 2.00 GiB.", "engine.chunk_tokens", "model.quantization: nf4", "rrhf-peft plan"):
        assert part in result.stderr
    assert "more" not in result.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("ours"), "ValueError: ours (at test_console:"),
        (RuntimeError("of\ntwo lines"), "RuntimeError: of two lines (at "),
        (KeyError(), "KeyError: no reason given"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: something is nested too deeply"),
        (SystemExit(0), "code that ran inside this command ended the program"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), "stdout was closed before everything was written"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_other_error_is_one_paragraph_too(error: BaseException, says: str) -> None:
    result = outcome_of(error)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {says}")
    assert result.stderr.count("\n") == 1


def test_a_defect_says_where_it_is_and_how_to_report_it(rrhf: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf_peft.recipe.json_schema", lambda: 1 / 0)
    stderr = rrhf("schema").stderr
    assert "called at rrhf_peft.cli:" in stderr
    assert "run the same command with --debug, and report what it prints" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("verb", [command.callback.__name__ for command in app.registered_commands if command.callback])
def test_every_verb_shows_a_traceback_when_asked(verb: str, rrhf: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    none: list[str] = []
    needs = {"demo": none, "doctor": none, "schema": none, "recipes": ["list"], "push": ["x", "me/x"]}
    needs |= {"convert": ["x", "-o", "y"], "merge": ["x", "-o", "y"], "new": ["--model", "x", "--data", "y"]}
    arguments = [verb, *needs.get(verb, ["x.yaml"])]
    monkeypatch.setenv("RANK", "nonsense")
    assert "Traceback" not in rrhf(*arguments).stderr
    assert "Traceback" in rrhf(*arguments, "--debug").stderr


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_traceback_is_there_for_whoever_asks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "variable":
        monkeypatch.setenv("RRHF_DEBUG", "1")
    result = outcome_of(ValueError("ours\x1b[2J"), *(["--debug"] if how == "option" else []))
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "\x1b[2J" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ValueError: ours")


CONTROLS = "\x1b]0;title\x07\x1b[31m \x9b2J \u202egnp.exe \r \x00 \ud800"


def test_control_sequences_in_an_error_do_not_reach_the_terminal() -> None:
    stderr = outcome_of(UserError(f"a column {CONTROLS}!")).stderr
    assert "\\x1b]0;title\\x07\\x1b[31m \\x9b2J \\u202egnp.exe" in stderr
    assert not console._UNPRINTABLE.search(stderr.rstrip("\n"))


def test_control_sequences_in_tables_and_lines_do_not_either(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=CONTROLS)
    table.add_column(CONTROLS)
    table.add_row(CONTROLS)
    console.terminal().print(table, CONTROLS)
    console.say(CONTROLS)
    console.print_json({CONTROLS: [CONTROLS]})
    printed = capsys.readouterr().out
    assert "title" in printed
    assert not console._UNPRINTABLE.search(printed)


def test_colours_of_our_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = console.terminal()
    with shown.capture() as captured:
        shown.print(Text("red", style="red"))
    assert "\x1b[" in captured.get()


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"nan": float("nan"), "deep": [{"inf": float("-inf")}, (1.5, 2)], "text": "\u202e\x7f"}
    console.print_json(values)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert read == {"nan": None, "deep": [{"inf": None}, [1.5, 2]], "text": "\u202e\x7f"}


def test_an_error_of_megabytes_is_cut() -> None:
    stderr = outcome_of(UserError("beginning " + "x" * 3_000_000 + " end")).stderr
    assert len(stderr) < 5000
    assert "beginning" in stderr
    assert stderr.rstrip().endswith("x end")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "first"}, "RANK is 'first', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1 of WORLD_SIZE=1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 of WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 processes but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
            "MASTER_PORT is '99999', not a port",
        ),
    ],
)
def test_a_launchers_variables_that_make_no_sense(
    variables: dict[str, str], says: str, rrhf: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = rrhf("schema")
    assert result.exit_code == 1
    assert says in result.stderr
    assert "accelerate launch" in result.stderr
    assert result.stderr.count("\n") == 1


def run(shell: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A shell command in which $RRHF is the command of the verbs."""
    environment = {**os.environ, "RRHF": f"{sys.executable} -m rrhf_peft.cli", **variables}
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk_or_a_closed_pipe_is_one_paragraph() -> None:
    full = run("$RRHF schema > /dev/full")
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in full.stderr
    closed = run("set -o pipefail; $RRHF schema | true")
    assert closed.returncode == 1
    assert "stdout was closed" in closed.stderr
    assert closed.stderr.count("\n") == 1


def test_a_terminal_without_utf_8_gets_escapes(ranked_with_umlauts: Path) -> None:
    done = run(f"$RRHF inspect '{ranked_with_umlauts}'", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert "K\\xf6ln" in done.stdout


@pytest.fixture
def ranked_with_umlauts(tmp_path: Path) -> Path:
    path = tmp_path / "ranked.jsonl"
    row = {"prompt": "?", "responses": ["a", "b"], "scores": [1, 0], "sources": ["Köln", "x"]}
    path.write_text(json.dumps(row))
    return path


def test_a_process_that_fails_alone_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
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
