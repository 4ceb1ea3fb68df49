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

import torch.distributed as dist

#: Longer than any run: a process that dies takes the others with it through the launcher.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process's number among how many."""

    index: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this one writes, merges and speaks."""
        return self.index == 0

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that RANK and WORLD_SIZE tell of; a single one without them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():  # the caller's own group, if any, stays the caller's
        yield Processes(int(os.environ.get("RANK", "0")) if count > 1 else 0, count)
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
