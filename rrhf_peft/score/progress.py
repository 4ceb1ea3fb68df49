"""Progress of scoring: a bar with groups per second and remaining time, or plain lines when no terminal looks on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Without a terminal, a line at most this often.
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def group_progress(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more groups are done."""
    started, done, last = time.monotonic(), 0, time.monotonic()

    def rate() -> float:
        return done / max(time.monotonic() - started, 1e-9)

    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total, rate="")

            def show(count: int) -> None:
                nonlocal done
                done += count
                bar.update(task, completed=done, rate=f"{rate():.1f} groups/s")

            yield show
        return

    def say(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or (done >= total and done > count):
            last = now
            left = (total - done) / max(rate(), 1e-9)
            console.print(
                f"{description} {done}/{total} groups, {rate():.1f} groups/s, {left:.0f} s left", highlight=False
            )

    yield say
