"""One display of progress for every verb: how much of how many, at which rate, and the time left.

A bar where somebody looks on; in logs a line at most every ten seconds, the first of them at once if the work will take
longer; nothing on a quiet console. Of several processes the main one shows its share.

    with progress(console, "scoring", len(groups), unit="groups") as advance:
        for unit in units:
            advance(len(unit), tokens=tokens_of(unit))
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

#: Without a terminal, a line at most this often.
SECONDS_BETWEEN_LINES = 10.0
_BYTES = "bytes"


class Advance:
    """Tells the display how far the work is; call it with how much more is done.

    Args:
        console: where it is shown; None for nowhere.
        title: of the work.
        total: how much there is to do; None where nobody knows.
        unit: of what is counted; of `bytes`, the numbers are shown in KiB, MiB or GiB.
        done: how much of the total was done before, which the rate leaves out.
    """

    def __init__(
        self, console: Console | None, title: str, total: int | None, *, unit: str = "groups", done: int = 0
    ) -> None:
        self.console = None if console is None or console.quiet else console
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._before, self._also, self._text = done, dict[str, int](), ""
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self.console is not None and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=done, numbers="")
            self._bar.start()

    def __call__(self, count: int = 1, *, text: str | None = None, **also: int) -> None:
        """Go on.

        Args:
            count: how much more is done, in units; may be 0.
            text: what else there is to tell, a loss for example; stays until there is another.
            also: how much more of what else has a rate, `tokens=120`.
        """
        self.done += count
        self._text = self._text if text is None else text
        for name, more in also.items():
            self._also[name] = self._also.get(name, 0) + more
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, numbers=self.numbers())
        elif self.console is not None:
            now, is_first = time.monotonic(), count > 0 and self.done == self._before + count
            is_end = count > 0 and self.done == self.total and not is_first
            is_long = is_first and (self._seconds_left() or 0.0) >= SECONDS_BETWEEN_LINES
            if is_end or is_long or now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                self.note(f"{self.title}: {self.numbers()}")

    def begin(self, title: str, total: int | None = None) -> None:
        """Another part of the work, with a count of its own."""
        self.title, self.total, self.done, self._before = title, total, 0, 0
        self._started = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, description=title, total=total, numbers="")
        else:
            self.note(title)

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def numbers(self) -> str:
        """All that is shown, without the title: ``12/40 groups, 3.1 groups/s, 240 tokens/s, 0:09 left``."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._before) / seconds
        parts = [f"{self._amount(self.done)}{'' if self.total is None else f'/{self._amount(self.total)}'} {self.unit}"]
        if self.unit == _BYTES:
            parts = [parts[0].removesuffix(f" {_BYTES}"), f"{self._amount(int(rate))}/s"]
        else:
            parts.append(f"{_rate(rate)} {self.unit}/s")
        parts += [f"{_rate(count / seconds)} {name}/s" for name, count in self._also.items()]
        if left := self._seconds_left():
            parts.append(f"{duration(left)} left")
        return ", ".join([*parts, self._text] if self._text else parts)

    def _seconds_left(self) -> float | None:
        """At the rate until now; None where it or the total is not known."""
        done = self.done - self._before
        if self.total is None or done <= 0 or self.done >= self.total:
            return None
        return (self.total - self.done) * (time.monotonic() - self._started) / done

    def stop(self) -> None:
        """Put the terminal right."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _amount(self, count: int) -> str:
        return size_text(count) if self.unit == _BYTES else f"{count:,}"


@contextlib.contextmanager
def progress(
    console: Console | None, title: str, total: int | None, *, unit: str = "groups", done: int = 0
) -> Iterator[Advance]:
    """Yield what the block calls to move the display (`Advance`), which is gone when the block ends."""
    advance = Advance(console, title, total, unit=unit, done=done)
    try:
        yield advance
    finally:
        advance.stop()


def duration(seconds: float) -> str:
    """``0:09``, ``2:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size_text(count: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
