"""The RRHF paper's tables at small scale: every recipe of `small/`, with several seeds, and the document from them.

    make reproduce
    make reproduce MODEL=path/to/TinyStories-656K STORIES=path/to/stories.json SEEDS="0 1 2"
    python recipes/paper/reproduce.py --help

What is finished is not done again: stop it at any moment, and the same command goes on.

Left to others: the rows (`reproduce_rows`), one row's work (`reproduce_work`), the prompts (`reproduce_stories`),
numbers (`reproduce_results`), verdicts (`reproduce_claims`), plots and document (`reproduce_document`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the workers

from reproduce_results import collect_results, machine, write_results
from reproduce_rows import READERS, ROWS
from reproduce_stories import HUB_STORIES, write_stories
from reproduce_work import Setup, run_row, start_worker

from rrhf_peft.records import UserError

HERE = Path(__file__).resolve().parent
HUB_MODEL = "raincandy-u/TinyStories-656K"
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 300, 200
#: `--brief`: everything runs, nothing is learnt.
BRIEF_PROMPTS, BRIEF_OVERRIDES = (24, 8), ("training.max_steps=4",)

#: (row, seed)
Job = tuple[str, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _as_interrupt)
    train, held_out = BRIEF_PROMPTS if options.brief else (TRAIN_PROMPTS, HELD_OUT_PROMPTS)
    overrides = [*(BRIEF_OVERRIDES if options.brief else ()), *options.set]
    output = options.output or Path("runs/reproduce-brief" if options.brief else "runs/reproduce")
    folder = options.document or (output if options.brief else HERE)
    setup = Setup(options.model, output, tuple(overrides))
    try:
        if options.only_document:
            _write_document(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)
            return 0
        write_stories(options.stories, output / "stories", train=train, held_out=held_out)
        if options.only_stories:
            return 0
        run_all(setup, options.seeds, options.workers, with_needs(options.rows or ROWS))
        if options.rows:
            print(f"the document needs all rows and was not written; the rows named are in {output}")
            return 0
        results = collect_results(setup, options.seeds, {"train": train, "held_out": held_out}, machine())
        _write_document(results, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped. What is finished is kept: the same command goes on from here.", file=sys.stderr)
        return 130
    print(f"written: README.md, results.json and figures in {folder}")
    return 0


def with_needs(names: Iterable[str]) -> list[str]:
    """Rows with all that they read from, in the order of the table."""
    wanted = set(names)
    while more := {need for name in wanted for need in ROWS[name].needs} - wanted:
        wanted |= more
    return [name for name in ROWS if name in wanted]


def run_all(setup: Setup, seeds: Sequence[int], workers: int, rows: Sequence[str]) -> None:
    """Do every row of every seed that is not finished, each after the rows that it needs.

    Raises:
        UserError: of the first row that fails; what others have finished is kept.
    """
    jobs = [(name, seed) for seed in seeds for name in rows]
    done = {job for job in jobs if setup.done(ROWS[job[0]], job[1]) is not None}
    if done:
        print(f"{len(done)} of {len(jobs)} rows are finished already", flush=True)
    progress = _Progress(jobs, done, workers)
    with _pool(workers) as pool:
        running: dict[Future[Any], Job] = {}
        while len(done) < len(jobs):
            for job in _ready(jobs, done, list(running.values()))[: workers - len(running)]:
                running[pool.submit(run_row, setup, *job)] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                try:
                    seconds = future.result()
                except UserError as error:
                    raise UserError(f"row {job[0]}, seed {job[1]}: {error}") from None
                done.add(job)
                progress.tell(job, seconds)


def _ready(jobs: Sequence[Job], done: set[Job], running: Sequence[Job]) -> list[Job]:
    """What may start now: those that others wait for before all, then the longest, so that nobody waits at the end."""
    free = [
        (name, seed)
        for name, seed in jobs
        if (name, seed) not in done
        and (name, seed) not in running
        and all((need, seed) in done for need in ROWS[name].needs)
    ]
    return sorted(free, key=lambda job: (-READERS[job[0]], -ROWS[job[0]].effort))


class _Here:
    """A pool of one that works in this process, so that a test sees everything."""

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    """Worker processes, which end with this one, however it ends."""
    if workers == 1:
        yield _Here()
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        yield pool
    except BaseException:
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Progress:
    """One line for each finished row, with the time that the rest will take about."""

    def __init__(self, jobs: Sequence[Job], done: set[Job], workers: int) -> None:
        self.left, self.count, self.workers = [job for job in jobs if job not in done], len(jobs), workers
        self.effort = self.seconds = 0.0

    def tell(self, job: Job, seconds: dict[str, float]) -> None:
        self.left.remove(job)
        name, seed = job
        took = sum(seconds.values())
        self.effort += ROWS[name].effort
        self.seconds += took
        left = self.seconds / self.effort * sum(ROWS[name].effort for name, _ in self.left) / self.workers
        verbs = ", ".join(f"{verb} {own:.0f} s" for verb, own in seconds.items())
        print(
            f"{time.strftime('%H:%M:%S')}  {self.count - len(self.left):3}/{self.count}  seed {seed}  {name:16} "
            f"{took:5.0f} s ({verbs})   about {left / 60:.0f} min left",
            flush=True,
        )


def _write_document(results: dict[str, Any], folder: Path) -> None:
    from reproduce_document import update_document
    from reproduce_figures import write_figures

    write_results(folder / "results.json", results)
    write_figures(results, folder / "figures")
    template = (HERE / "README.md").read_text(encoding="utf-8")
    numbers = (HERE / "paper_numbers.yaml").read_text(encoding="utf-8")
    update_document(folder / "README.md", template, results, numbers)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=HUB_MODEL, help=f"hub id or folder; default {HUB_MODEL}")
    parser.add_argument(
        "--stories", default=HUB_STORIES, help=f"JSON list of stories, or hub data set; default {HUB_STORIES}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default 0 1 2 3 4")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each; default 2")
    parser.add_argument("--output", type=Path, help="where all runs go; default runs/reproduce, or -brief")
    parser.add_argument("--document", type=Path, help="where README.md, results.json and figures go; default: here")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="only these, and what they read")
    parser.add_argument("--brief", action="store_true", help="few prompts and steps: whether it runs, no more")
    parser.add_argument("--only-stories", action="store_true", help="write the prompts that recipes read, and stop")
    parser.add_argument(
        "--only-document", action="store_true", help="make README.md and figures from results.json again"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an override for all recipes that have the section; may be given several times",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
