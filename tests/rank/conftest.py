"""Candidates to rank, the command in a process of its own, and Debian's Chromium to open its pages with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

expect.set_options(timeout=60_000)  # for slow machines

#: Markup that would have a browser run something, or ask somebody for something.
ATTACK = (
    "<script>document.title='owned'</script> <img src='http://evil.invalid/a'> ![x](http://evil.invalid/b)\n\n"
    "[click](javascript:document.title='owned') <b onclick='document.title=1'>bold</b>"
)


def write_candidates(path: Path, count: int = 20, k: int = 3) -> Path:
    """Groups whose response `number` is worth `number` by its reward model; one has an attack in it."""
    rows = [
        {
            "prompt": f"Question **{n}**?",
            "responses": [f"Answer {n}.{number}\n\n- *good*\n- bad" for number in range(k)],
            "sources": [f"policy-{number}" for number in range(k)],
            "scores": [float(number) for number in range(k)],
            "raw_scores": {"reward_model": [float(number) for number in range(k)]},
        }
        for n in range(count)
    ]
    rows[0]["responses"][0] = ATTACK
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Served:
    """`rrhf-peft rank` in a process; ended, if not before, with the fixture."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rrhf_peft.rank", *arguments, "--json"],
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = []
        while line := self.process.stdout.readline():
            lines.append(line)
            if line.rstrip() == "}":
                break
        else:
            pytest.fail(f"{lines} {self.process.communicate()[1]}")
        values: dict[str, Any] = json.loads("".join(lines))
        self.overview: str = values["overview"]
        self.links: dict[str, str] = values["annotators"]
        self.port = self.overview.split(":")[2].split("/")[0]

    def end(self, with_signal: int = signal.SIGINT) -> tuple[int, str]:
        """Exit code and stderr."""
        self.process.send_signal(with_signal)
        _, stderr = self.process.communicate(timeout=100)
        return self.process.returncode, stderr


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(*arguments, cwd=folder)`."""
    running: list[Served] = []

    def start(*arguments: str, cwd: Path) -> Served:
        running.append(Served(*arguments, cwd=cwd))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=arguments)
