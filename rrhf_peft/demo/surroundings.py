"""What surrounds the demo's steps: their times, one thread for small models, libraries that keep quiet."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging


class Timer:
    """Wall time by step: `with timer("base"): ...`, then `timer.seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small keep several waiting, the more so on a busy machine.

    The order of additions, and so the result, is then the same for any number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back, for a while, transformers' own progress bars and what PEFT says about transformers' names."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
