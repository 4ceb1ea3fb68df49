"""Progress of sampling: groups/s, tokens/s and remaining time, as a bar or as plain lines without a terminal.

Of several processes the main one shows its own share of the work.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Without a terminal, a line at most this often.
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def sample_progress(console: Console | None, description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told how many groups and tokens are added; None for a console keeps silent."""
    started = last = time.monotonic()
    groups = tokens = 0

    def rates() -> str:
        seconds = max(time.monotonic() - started, 1e-9)
        return f"{groups / seconds:.1f} groups/s, {tokens / seconds:.0f} tokens/s"

    if console is None:
        yield lambda more_groups, more_tokens: None
        return
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total, rates="")

            def show(more_groups: int, more_tokens: int) -> None:
                nonlocal groups, tokens
                groups, tokens = groups + more_groups, tokens + more_tokens
                bar.update(task, completed=groups, rates=rates())

            yield show
        return

    def say(more_groups: int, more_tokens: int) -> None:
        nonlocal groups, tokens, last
        groups, tokens = groups + more_groups, tokens + more_tokens
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or (more_groups and groups >= total):
            last = now
            left = (total - groups) * (now - started) / max(groups, 1)
            console.print(f"{description}: {groups}/{total} groups, {rates()}, {left:.0f} s left", highlight=False)

    yield say
