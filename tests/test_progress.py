"""The progress display in a log: the first line comes at once where the work is long, with the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rrhf_peft import progress
from rrhf_peft.progress import Advance


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, as the display reads it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_long_work_says_at_once_how_long_it_will_take(clock: list[float]) -> None:
    log = io.StringIO()
    advance = Advance(Console(file=log, width=100), "training", 120, unit="steps", done=20)
    clock[0] += 2
    advance(1)
    assert log.getvalue() == "training: 21/120 steps, 0.5 steps/s, 3:18 left\n"  # 99 more of 2 seconds each
    clock[0] += 2
    advance(1)
    assert log.getvalue().count("\n") == 1  # the next one ten seconds after the last
    clock[0] += 10
    advance(5)
    assert log.getvalue().count("\n") == 2


def test_short_work_says_nothing_until_its_end(clock: list[float]) -> None:
    log = io.StringIO()
    advance = Advance(Console(file=log, width=100), "scoring", 3)
    for _ in range(3):
        clock[0] += 1
        advance(1)
    assert log.getvalue() == "scoring: 3/3 groups, 1.0 groups/s\n"
