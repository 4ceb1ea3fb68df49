"""Work over a list of items, row by row, by all processes of a launch; continued after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rrhf_peft.evaluate.folder import is_finished
from rrhf_peft.jobs import Processes, ShardedOutput
from rrhf_peft.score.progress import group_progress

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
    processes.wait_for_all()  # nobody merges while another one still looks whether it is merged
    if is_finished(output):
        return
    units = [items[start : start + UNIT] for start in range(0, len(items), UNIT)]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    everyone = [
        ShardedOutput(output, fingerprint=fingerprint, units=len(units), process=index, processes=processes.count)
        for index in range(processes.count)
    ]
    shards = everyone[processes.index]
    processes.wait_for_all()
    if processes.is_main:
        shards.open()
    processes.wait_for_all()
    pending = shards.pending()
    is_work_left = any(own.pending() for own in everyone)
    processes.wait_for_all()  # nobody writes before all have seen the same
    if is_work_left:
        work = begin()
        quiet = console if processes.is_main else Console(quiet=True)
        with group_progress(quiet, title, sum(len(units[unit]) for unit in pending)) as advance:
            for unit in pending:
                shards.write(unit, work(units[unit]))
                advance(len(units[unit]))
    processes.wait_for_all()
    if processes.is_main:
        shards.merge()
    processes.wait_for_all()
