"""Work over a list of items, row by row, by all processes of a launch; continued after a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rrhf_peft.jobs import Processes, ShardedOutput, fingerprint_of
from rrhf_peft.progress import progress

Item = TypeVar("Item")

#: Items finished and saved at a time: what a kill can lose.
UNIT = 16


def rows_of_all(
    output: Path,
    items: Sequence[Item],
    begin: Callable[[], Callable[[Sequence[Item]], list[dict[str, Any]]]],
    *,
    settings: Any,
    processes: Processes,
    console: Console,
    title: str,
) -> None:
    """Write one row for each item to `output`, unless it is there.

    Args:
        output: the .jsonl file.
        items: what there is to do, the same list on all processes.
        begin: loads what the work needs and returns the work: items -> rows. Called by every process or by none,
            because what it loads may agree with the other processes on something.
        settings: JSON values that the rows depend on.
        processes: of this launch; all of them call this.
        console: where the main process shows progress.
        title: what the progress calls it.
    """
    units = [items[start : start + UNIT] for start in range(0, len(items), UNIT)]
    shards = ShardedOutput(
        output, verb="evaluate", fingerprint=fingerprint_of(settings), units=len(units), processes=processes
    )
    if shards.open():
        return
    if shards.is_work_left:
        work = begin()
        pending = shards.pending()
        shown = console if processes.is_main else None
        with progress(shown, title, sum(len(units[unit]) for unit in pending)) as advance:
            for unit in pending:
                shards.write(unit, work(units[unit]))
                advance(len(units[unit]))
    shards.merge()
