"""Progress of a merge: a bar with rate and remaining time, or plain lines when the output is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rrhf_peft.console import terminal
from rrhf_peft.merge.report import size_text

#: Called with what is being done, bytes done, and bytes in all (0 when that is not known).
OnProgress = Callable[[str, int, int], None]


@contextlib.contextmanager
def merge_progress(console: Console | None = None) -> Iterator[OnProgress]:
    """Yield a callback for `merge_adapter(on_progress=...)` that shows how far it is."""
    console = console or terminal(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        task = progress.add_task("merging", total=None)

        def show(stage: str, done: int, total: int) -> None:
            if total:
                progress.update(task, description=stage, completed=done, total=total)
            else:
                progress.update(task, visible=False)
                progress.console.print(stage, highlight=False)

        yield show


def _plain_lines(console: Console) -> OnProgress:
    started = time.monotonic()
    last: tuple[str, int] = ("", -1)

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // total if total else 0
        if (stage, tenth) == last:
            return
        last = (stage, tenth)
        share = f" {10 * tenth}% of {size_text(total)}" if total else ""
        console.print(f"{stage}{share} ({time.monotonic() - started:.0f} s)", highlight=False)

    return show
