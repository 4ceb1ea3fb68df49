"""Every command and program in the README runs, in the order in which a reader meets them.

A comment before each fenced block says what happens to it here:

    <!-- run -->          every line is run, in one folder, after a demo of the smallest size
    <!-- run: slow -->    every line is run in a fresh clone, by `pytest -m slow`
    <!-- file: NAME -->   the block is that file, in the same folder
    <!-- output -->       what the block before printed on somebody's machine; not compared

Runs are cut to two optimizer steps by adding `training.max_steps=2` to commands that train.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rrhf_peft.demo.run import TINY, run_demo

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


class Block(NamedTuple):
    mark: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """One per line; a backslash continues a line, and comments are the reader's."""
        joined = self.text.replace("\\\n", " ")
        return [line.partition(" #")[0].strip() for line in joined.splitlines() if line and not line.startswith("#")]


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [Block(*(found[name] or "" for name in ("mark", "language", "text"))) for found in FENCE.finditer(text)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, the README's own files, and what a demo leaves."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for block in blocks():
        kind, _, name = block.mark.partition(": ")
        if kind == "file":
            (folder / name).write_text(block.text, encoding="utf-8")
    run_demo(folder / "runs" / "demo", size=TINY)
    for path in (folder / "runs" / "demo").rglob("*"):
        if path.name in ("recipe.yaml", "adapter_config.json"):  # made with this folder's name, read with the README's
            path.write_text(path.read_text().replace(str(folder) + os.sep, ""))
    return folder


def test_every_block_says_what_becomes_of_it() -> None:
    found = blocks()
    assert found
    for block in found:
        assert re.fullmatch(r"run|run: slow|file: \S+|output", block.mark), block.text
        if block.language in ("bash", "python"):
            assert block.mark.startswith(("run", "file")), block.text


@pytest.mark.timeout(900)
def test_what_runs_runs(workspace: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = 0
    for block in blocks():
        if block.mark != "run":
            continue
        commands = [shlex.split(command) for command in block.commands]
        for command in commands if block.language == "bash" else [["python", "-c", block.text]]:
            if command[:2] == ["rrhf-peft", "train"] or command[0] == "accelerate":
                command = [*command, "training.max_steps=2"]
            command[0] = str(binaries / command[0])
            done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
            ran += 1
    assert ran >= 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_takes_minutes_runs_in_a_fresh_clone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    commands = [command for block in blocks() if block.mark == "run: slow" for command in block.commands]
    assert "make demo" in commands
    for command in commands:
        done = subprocess.run(shlex.split(command), cwd=tmp_path / "clone", capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
