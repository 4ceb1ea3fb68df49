"""Long work by the processes of one launch, that survives being killed at any moment. Once, for every verb.

A verb opens its output with `exclusive`: the main process holds the output's lock, and all processes see the same
files. What is long is cut into units beforehand, in a way that depends on the input alone: not on how many processes
there are or where the last run stopped. Each process appends every finished unit as one line to its own part file. A
new run, with any number of processes, does what is missing; the end merges all units in order and removes the parts.

    OUTPUT.parts/.rrhf-peft.json   what is being made: its fingerprint
    OUTPUT.parts/part-3.jsonl      one line per unit that process 3 finished
    OUTPUT                         all rows in order, only when all are there; with its mark (`rrhf_peft.files`)

    shards = ShardedOutput(output, verb="score", fingerprint=..., units=len(units), processes=processes)
    if not shards.open(overwrite=overwrite, console=console):  # True: the same work was finished before
        if shards.is_work_left:
            scorer = load()                                     # on every process, or on none
            for unit in shards.pending():
                shards.write(unit, scorer(units[unit]))
        shards.merge()

`open` and `merge` are called by all processes, and wait for all: no barrier stands in a verb. Processes wait through
gloo, on any device, and for as long as the slowest takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rrhf_peft.files import (
    AnyPath,
    Content,
    check_output,
    is_finished,
    lock,
    read_mark,
    refuse_finished,
    remove_work_folder,
    work_folder,
    write_files,
    writing,
)
from rrhf_peft.records import UserError

T = TypeVar("T")
Row = dict[str, Any]

#: What a verb may note in the folder of parts, beside the fingerprint of what they are made from.
MADE_FROM = "made_from.json"
#: Longer than any run: a process that dies takes the others with it through the launcher.
_PATIENCE = timedelta(days=30)
#: How long the processes of a launch may take to find one another.
_TIME_TO_JOIN = timedelta(minutes=10)
#: How long a shared file system may take to show one host what another one wrote.
_SECONDS_TO_SEE = 60.0


# -------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Processes:
    """This process's number among how many."""

    index: int
    count: int
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this one writes, merges and speaks."""
        return self.index == 0

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do something that the others wait for; all get its result, or its `UserError`.

        To look at files that the launch itself changes, too: so all see the same.
        """
        if self.count == 1:
            return work()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def from_all(self, value: T) -> list[T]:
        """Every process's value, in the order of the processes."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that RANK and WORLD_SIZE tell of; a single one without them.

    Where a process group is open already, as a trainer leaves it, it stays open and is not waited in: it may be
    one for GPUs, and lose its patience after minutes. The waiting has a gloo group of its own beside it.

    Raises:
        UserError: not all processes that the variables tell of have come.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1)
        return
    import torch.distributed as dist  # here: what only reads and writes files starts without torch

    end_with_launcher()
    beside = dist.is_initialized()
    if not beside:
        try:  # to find one another takes minutes at most; the work has no limit
            store, rank, _ = next(dist.rendezvous("env://", timeout=_TIME_TO_JOIN))
        except dist.DistError as error:
            raise not_all_came(error) from None
        store.set_timeout(_PATIENCE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE) if beside else dist.group.WORLD
    try:
        yield Processes(dist.get_rank(), count, group)
    finally:
        dist.destroy_process_group(group)


def not_all_came(error: Exception) -> UserError:
    """What to say where processes that WORLD_SIZE tells of have not found one another."""
    reason = str(error).splitlines()[0].rstrip(".")
    count, address, port = (os.environ.get(name) for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return UserError(
        f"not all {count} processes that the variable WORLD_SIZE tells of have met at MASTER_ADDR={address}, "
        f"MASTER_PORT={port} ({reason}). Start all of them with `accelerate launch` or torchrun; for a single one, "
        "unset these variables."
    )


def end_with_launcher() -> None:
    """End this process when its launcher is killed, which cannot tell it any more; on Linux."""
    if sys.platform == "linux" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Models are loaded whole on every process, although the launcher shards (FSDP) the one that is trained.

    transformers reads this variable, and leaves the weights out on all processes but one where it is set.
    """
    sharding = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if sharding is not None:
            os.environ["ACCELERATE_USE_FSDP"] = sharding


@contextlib.contextmanager
def exclusive(output: AnyPath, processes: Processes, *, goes_on: bool = True) -> Iterator[None]:
    """Work on an output (a file or a folder) as the only run that does; every process of the launch calls it.

    Args:
        output: what is made.
        processes: of this launch.
        goes_on: whether the same command continues an interrupted run, so that Ctrl-C can say so.

    Raises:
        UserError: on all processes: another run holds it, it cannot be written there, or the processes do not see the
            same files.
    """
    output = Path(os.path.abspath(output))
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(lock(output))

        processes.on_main(enter)
        if processes.count > 1:
            _refuse_unshared(output, processes)
        try:
            yield
        except KeyboardInterrupt as error:
            if goes_on:  # of nested ones the outermost, which is what the user has called
                error.args = (f"What was finished of {output} is kept: the same command continues there.",)
            raise
        processes.wait_for_all()


def _refuse_unshared(output: Path, processes: Processes) -> None:
    """The main process writes a file that nobody can have seen before, and every process has to see it."""
    name = processes.on_main(lambda: f".{output.name}.rrhf-peft.{secrets.token_hex(8)}")
    token = output.parent / name

    def write() -> None:
        with writing(token):
            token.touch()

    processes.on_main(write)
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while not (seen := token.exists()) and output.parent.is_dir() and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [index for index, sees in enumerate(processes.from_all(seen)) if not sees]
    if processes.is_main:
        token.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{output.parent}: process {', '.join(map(str, blind))} of this launch does not see what the main process "
            "writes there. All hosts need the same files: name an output on a file system that they share."
        )


# ------------------------------------------------------------------------------------------------------------- units


def fingerprint_of(*values: Any) -> str:
    """A digest of JSON values, in the order in which dictionaries hold their keys."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


class ShardedOutput:
    """The rows of a JSONL file, made unit by unit by one or more processes.

    Args:
        output: the file to make.
        fingerprint: of everything the rows depend on (input, settings, seed), and of nothing else: with another one
            it is other work, and what was finished is not continued.
        units: how many units there are.
        processes: of this launch.
        verb: which one makes it.
        beside: files that `merge` writes beside the output.
    """

    def __init__(
        self,
        output: AnyPath,
        *,
        fingerprint: str,
        units: int,
        processes: Processes | None = None,
        verb: str = "",
        beside: Iterable[AnyPath] = (),
    ) -> None:
        self.output = Path(output)
        self.parts = self.output.with_name(f"{self.output.name}.parts")
        self.units, self.processes, self.verb = units, processes or Processes(0, 1), verb
        self.beside = [Path(path) for path in beside]
        self.fingerprint = fingerprint_of(fingerprint, units)
        self._finished: frozenset[int] = frozenset()

    def open(self, *, overwrite: bool = False, console: Console | None = None, title: str = "") -> bool:
        """Start or continue; all processes call it, inside of `exclusive`.

        Args:
            overwrite: start again from nothing. An output that this program made stays until the new one is whole.
            console: where the main process says that it continues.
            title: of the work, in front of that.

        Returns:
            Whether the same work was finished before, and the output is as it was written then: there is nothing to do.

        Raises:
            UserError: on all processes: the output is another one's or was made with other settings, unfinished parts
                of other work are in the way, or nothing can be written there.
        """
        is_done, finished = self.processes.on_main(lambda: self._open(overwrite))
        self._finished = frozenset(finished)
        if finished and console is not None and self.processes.is_main:
            start = f"{title}: " if title else ""
            console.print(f"{start}continuing after {len(finished)} of {self.units} units", highlight=False)
        return is_done

    def _open(self, overwrite: bool) -> tuple[bool, list[int]]:
        if not overwrite and is_finished(self.output, self.fingerprint, self.beside):
            remove_work_folder(self.parts)
            return True, []
        held = read_mark(self.parts)
        is_other = held is not None and held.fingerprint != self.fingerprint
        may_replace = overwrite or (held is not None and held.may_replace and not is_other)
        check_output(self.output, overwrite=may_replace, continues=True, beside=self.beside)
        if not may_replace:
            refuse_finished(self.output, self.fingerprint)
        if is_other and not overwrite and self._lines():
            raise UserError(
                f"{self.parts}: holds the unfinished parts of other work (the input or the settings changed). "
                "Undo the change to continue it, or pass --overwrite to start again."
            )
        if is_other:
            remove_work_folder(self.parts)
        writes = ["part-[0-9]*.jsonl", MADE_FROM]
        work_folder(self.parts, verb=self.verb, writes=writes, fingerprint=self.fingerprint, overwrite=overwrite)
        return False, sorted(unit for unit in self._lines() if unit < self.units)

    @property
    def is_work_left(self) -> bool:
        """Whether any process has something to do: the same on all."""
        return len(self._finished) < self.units

    def pending(self) -> list[int]:
        """The units this process has to do: those of its residue that no earlier run has finished."""
        count = self.processes.count
        return [unit for unit in range(self.processes.index, self.units, count) if unit not in self._finished]

    def write(self, unit: int, rows: list[Row]) -> None:
        """Append a finished unit; once this returns, a kill or a power cut does not lose it.

        Raises:
            UserError: the disk takes no more; everything before this unit is kept.
        """
        path = self.parts / f"part-{self.processes.index}.jsonl"
        line = json.dumps({"unit": unit, "rows": rows}, ensure_ascii=False) + "\n"
        kept = f"What was finished is kept in {self.parts}, and the same command continues there."
        with writing(path, kept=kept), path.open("a+b") as file:
            _cut_torn_line(file)
            file.write(line.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())

    def merge(
        self,
        finish: Callable[[Iterator[Row]], Iterable[Row]] | None = None,
        *,
        beside: Callable[[], Mapping[Path, Content | None]] | None = None,
    ) -> Path:
        """Write all rows, in the order of their units, to the output and remove the parts; all processes call it.

        Args:
            finish: turns all rows, which come one by one, into those of the output; called by the main process.
            beside: called after the rows are written: the contents of the files beside the output, None for none.

        Raises:
            UserError: on all processes: what `finish` raises, or the disk is full. The parts are kept then.
        """
        self.processes.wait_for_all()
        self.processes.on_main(lambda: self._merge(finish, beside))
        return self.output

    def _merge(
        self,
        finish: Callable[[Iterator[Row]], Iterable[Row]] | None,
        beside: Callable[[], Mapping[Path, Content | None]] | None,
    ) -> None:
        lines = self._lines()
        missing = self.units - len(lines)
        assert missing == 0, f"{missing} of {self.units} units are missing"

        def rows() -> Iterator[Row]:
            with contextlib.ExitStack() as stack:
                files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in lines.values()}}
                for unit in range(self.units):
                    path, offset = lines[unit]
                    files[path].seek(offset)
                    yield from json.loads(files[path].readline())["rows"]

        finished = finish(rows()) if finish is not None else rows()
        contents: dict[Path, Content | None] = {
            self.output: (json.dumps(row, ensure_ascii=False) + "\n" for row in finished)
        }
        write_files(self.output, contents, verb=self.verb, fingerprint=self.fingerprint, beside=beside)
        remove_work_folder(self.parts)

    def _lines(self) -> dict[int, tuple[Path, int]]:
        """Unit -> the part file and the offset where its line begins; of whole lines only."""
        found: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.parts.glob("part-*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # a kill may have cut the last one short
                        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: done again
                            entry = json.loads(line)
                            if isinstance(entry["rows"], list):
                                found[int(entry["unit"])] = (path, offset)
                    offset += len(line)
        return found


def _cut_torn_line(file: Any) -> None:
    """Remove what a kill left of an unfinished last line."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
