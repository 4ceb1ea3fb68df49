"""Every command and program in the README and the documentation runs, in the order in which a reader meets them.

A comment before each fenced block says what happens to it here:

    <!-- run -->              every line is run, in one folder per page, after a demo of the smallest size
    <!-- run: KEY=VALUE -->   so, with these words behind each: limits that let a machine without a GPU do it
    <!-- run: slow -->        every line is run in a fresh clone, by `pytest -m slow`
    <!-- file: NAME -->       the block is that file, in the same folder
    <!-- install -->          what `test_wheel` does in its way: it builds the wheel and unpacks it
    <!-- output -->           what the block before printed on somebody's machine; not compared

Runs are cut to two optimizer steps by adding `training.max_steps=2` to commands that train. Hub ids are folders with
their names below the working folder, which rrhf-peft takes in the hub's place.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from command_server import CommandServer
from house.recipe_checks import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
DEMO = "from rrhf_peft.demo.run import TINY, run_demo; run_demo('runs/demo', size=TINY)"


class Block(NamedTuple):
    mark: str
    language: str
    text: str

    @property
    def is_run(self) -> bool:
        return re.match(r"run\b(?!: slow)", self.mark) is not None

    @property
    def commands(self) -> list[list[str]]:
        """One per line; a backslash continues a line, and comments are the reader's."""
        joined = self.text.replace("\\\n", " ")
        lines = [line.partition(" #")[0].strip() for line in joined.splitlines() if line and not line.startswith("#")]
        return [shlex.split(line) for line in lines]


def blocks(page: Path) -> list[Block]:
    matches = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(*(match[name] or "" for name in ("mark", "language", "text"))) for match in matches]


@pytest.fixture(scope="module")
def server() -> Iterator[CommandServer]:
    with CommandServer() as running:
        yield running


@pytest.fixture(scope="module")
def prepared(workplace: Path, server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, the models and data that stand for the hub's, and what a demo leaves."""
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("runs"))
    done = server.run(["python", "-c", DEMO], folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_becomes_of_it(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("bash", "python"):
            assert block.mark.startswith(("run", "file", "install")), block.text
        if block.mark:
            assert re.fullmatch(r"run|run: slow|run:( [\w.]+=\S+)+|file: \S+|install|output", block.mark), block.text


def runs_something(page: Path) -> bool:
    return any(block.is_run for block in blocks(page))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", filter(runs_something, PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_runs_runs(page: Path, prepared: Path, server: CommandServer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    ran = 0
    for block in blocks(page):
        kind, _, rest = block.mark.partition(": ")
        if kind == "file":
            (folder / rest).write_text(block.text, encoding="utf-8")
        if not block.is_run:
            continue
        for command in block.commands if block.language == "bash" else [["python", "-c", block.text]]:
            run(server, [*command, *rest.split()], folder)
            ran += 1
    assert ran


def run(server: CommandServer, command: list[str], folder: Path) -> None:
    if command[:2] == ["rrhf-peft", "train"] or "rrhf_peft.train" in command:
        command = [*command, "training.max_steps=2"]
    if "<" in command:
        command, (_, typed) = command[: command.index("<")], command[command.index("<") :]
        typed = (folder / typed).read_text(encoding="utf-8")
    else:
        typed = ""
    if command[0] in ("rrhf-peft", "python"):
        done = server.run(command, folder, typed=typed)
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(program, cwd=folder, env=environment, text=True, check=False, **streams)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"


def test_the_readme_runs_its_commands() -> None:
    assert sum(len(block.commands) for block in blocks(ROOT / "README.md") if block.is_run) >= 8


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "recipes").rglob("*.md")]:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_takes_minutes_runs_in_a_fresh_clone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    slow = [block for page in PAGES for block in blocks(page) if block.mark == "run: slow"]
    commands = [command for block in slow for command in block.commands]
    assert ["make", "demo"] in commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        program = [shutil.which(command[0], path=path) or command[0], *command[1:]]
        done = subprocess.run(program, cwd=tmp_path / "clone", capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
