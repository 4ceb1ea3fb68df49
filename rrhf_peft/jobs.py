"""Long work in units, by the processes of one launch, that survives being killed at any moment.

Work is cut into units beforehand, in a way that depends on the input alone: not on how many
processes there are or where the last run stopped. Each process appends every finished unit as one
line to its own part file. A new run, with any number of processes, does what is missing; the end
merges all units in order into one file and removes the parts.

    OUTPUT.parts/manifest.json     what is being made: fingerprint and number of units
    OUTPUT.parts/part-3.jsonl      one line per unit that process 3 finished
    OUTPUT                         all rows in order, only when all are there

Processes exchange nothing but files, so they only need to wait for each other: through gloo, on any
device, and for as long as the slowest takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

#: Longer than any run: a process that dies takes the others with it through the launcher.
_PATIENCE = timedelta(days=30)


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


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that RANK and WORLD_SIZE tell of; a single one without them.

    Where a process group is open already, as a trainer leaves it, it stays open and is not waited in: it may be
    one for GPUs, and lose its patience after minutes. The waiting has a gloo group of its own beside it.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1)
        return
    import torch.distributed as dist  # here: what only reads and writes files starts without torch

    beside = dist.is_initialized()
    if not beside:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE) if beside else dist.group.WORLD
    try:
        yield Processes(dist.get_rank(), count, group)
    finally:
        dist.destroy_process_group(group)


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


class ShardedOutput:
    """The rows of a JSONL file, made unit by unit by one or more processes.

    Args:
        output: the file to make.
        fingerprint: of everything the rows depend on (input, settings, seed); another one is other work.
        units: how many units there are.
        process: this process's number.
        processes: how many work on it.
    """

    def __init__(
        self, output: str | os.PathLike[str], *, fingerprint: str, units: int, process: int = 0, processes: int = 1
    ) -> None:
        self.output = Path(output)
        self.parts = self.output.with_name(f"{self.output.name}.parts")
        self.units, self.process, self.processes = units, process, processes
        self._manifest = {"fingerprint": fingerprint, "units": units}

    def open(self, *, overwrite: bool = False) -> int:
        """Start or continue; the main process calls it before any other touches the parts.

        Returns:
            How many units earlier runs have finished.

        Raises:
            UserError: the output is already there, parts of other work are in the way, or the place
                cannot be written to.
        """
        manifest = self.parts / "manifest.json"
        if overwrite:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.output.unlink(missing_ok=True)
        if self.output.exists() and not self._only_merged_in_part(manifest):
            raise UserError(f"{self.output}: already exists. Choose another output, remove it, or pass --overwrite.")
        is_other = manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")) != self._manifest
        if is_other and self._finished():
            raise UserError(
                f"{self.parts}: holds the unfinished parts of other work (the input or the settings changed). "
                "Undo the change to continue it, or pass --overwrite to start again."
            )
        replace_text(manifest, json.dumps(self._manifest) + "\n")
        return len(self._finished())

    def pending(self) -> list[int]:
        """The units this process has to do: those of its residue that no process has finished.

        By residue and not by place among the missing, because others may be writing meanwhile.
        """
        finished = self._finished()
        return [unit for unit in range(self.process, self.units, self.processes) if unit not in finished]

    def write(self, unit: int, rows: list[dict[str, Any]]) -> None:
        """Append a finished unit; once this returns, a kill or a power cut does not lose it."""
        path = self.parts / f"part-{self.process}.jsonl"
        line = json.dumps({"unit": unit, "rows": rows}, ensure_ascii=False) + "\n"
        with path.open("a+b") as file:
            _cut_torn_line(file)
            file.write(line.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())

    def merge(self, finish: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None) -> Path:
        """Write all rows, in the order of their units, to the output and remove the parts; main process only.

        Args:
            finish: turns all rows into those of the output, where that needs all of them. What else it writes
                it must be able to write again, because a kill may come after it.
        """
        rows: dict[int, list[dict[str, Any]]] = dict(self._lines())
        missing = self.units - len(rows)
        assert missing == 0, f"{missing} of {self.units} units are missing"
        whole = [row for unit in range(self.units) for row in rows[unit]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (finish(whole) if finish else whole))
        replace_text(self.output, text)
        shutil.rmtree(self.parts)
        return self.output

    def _only_merged_in_part(self, manifest: Path) -> bool:
        """Whether a kill came between writing the output and removing the parts: merging again ends it."""
        return (
            manifest.exists()
            and json.loads(manifest.read_text(encoding="utf-8")) == self._manifest
            and len(self._finished()) == self.units
        )

    def _finished(self) -> set[int]:
        return {unit for unit, _ in self._lines()}

    def _lines(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for path in sorted(self.parts.glob("part-*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # a kill may have cut the last one short
                        entry = json.loads(line)
                        yield entry["unit"], entry["rows"]


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
