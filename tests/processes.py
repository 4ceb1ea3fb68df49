"""Functions run by several processes, as a launcher would start them: the variables of a launch, one gloo group."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

#: Children are forked from a server without threads, which has torch.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(index: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_processes(function: Callable[..., None], *arguments: Any, count: int, seconds: float = 240) -> None:
    """Call a function of a test module in `count` processes, and fail unless all of them end well."""
    port = free_port()
    children = [
        SERVER.Process(target=launched, args=(index, count, port, function, arguments)) for index in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * count, codes
