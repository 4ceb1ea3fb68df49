"""The processes of one launch: who is who, and waiting for each other.

Sampling and scoring exchange nothing but files, so the processes only need to wait: through gloo, on any
device, and for as long as the slowest takes.

Left to others: starting the processes (`accelerate launch`, torchrun) and sharing the work (`rrhf_peft.shards`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

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
