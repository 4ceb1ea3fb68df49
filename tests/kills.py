"""What a verb leaves when it is killed right before any of its acts on files, and what a rerun makes of that.

One process: while the verb runs to its end, its folder is copied right before every act (what has not reached the disk
by then is lost in a kill as well, so a copy is what a kill would leave). Each copy is then put where the folder was,
and the verb is run again to its end. Several processes: the main one is killed at the act, and the others with it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import free_port

#: Children are forked from a server without threads, which has the heavy imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["rrhf_peft.sample.run", "rrhf_peft.score.run", "rrhf_peft.rounds.run", "rrhf_peft.merge.run", "score_rules"]
)
Verb = Callable[[Any], None]
#: Event of `sys.addaudithook` -> which of its arguments is the path that is changed.
ACTS = {
    "open": 0,
    "os.rename": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.mkdir": 0,
    "os.truncate": 0,
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(folder: Path, act: Callable[[str], None]) -> None:
    """Call `act` with what is going to happen, before every act on a file in `folder`, and before every fsync."""
    busy = False

    def tell(name: str) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                act(name)
            finally:
                busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if busy or event not in ACTS:
            return
        path = arguments[ACTS[event]]
        if event == "open" and not (arguments[2] or 0) & WRITING and not set(arguments[1] or "") & set("wxa+"):
            return
        if event == "os.truncate" and isinstance(path, int):
            tell(event)
        elif isinstance(path, (str, bytes, os.PathLike)):
            relative = os.path.relpath(os.fsdecode(path), folder)
            if not relative.startswith(".."):
                tell(f"{event} {relative}")

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        tell("fsync")
        fsync(descriptor)

    os.fsync = synced  # it has no event
    sys.addaudithook(hook)


def run(verb: Verb, values: Any) -> None:
    import torch

    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as where it is not installed: drawing takes long
    verb(values)


def copied(verb: Verb, values: Any, folder: Path, copies: Path) -> None:
    """Run to the end, and copy the folder before every act that finds it changed."""
    before: list[Any] = []

    def act(name: str) -> None:
        state = sorted(
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*")
            if path.exists() and path.name[-5:] != ".lock"
        )
        if state != before:
            before[:] = state
            number = len(list(copies.iterdir()))
            shutil.copytree(folder, copies / f"{number:04} {name.replace('/', ' ')[:120]}")

    watch(folder, act)
    run(verb, values)


def killed(verb: Verb, values: Any, folder: Path, number: int, index: int, count: int, port: int) -> None:
    """Run as one of several processes; the main one kills itself right before its act of this number."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    acts = 0

    def act(name: str) -> None:
        nonlocal acts
        acts += 1
        if acts == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if index == 0 and number:
        watch(folder, act)
    try:
        run(verb, values)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # another process may be waiting for one that was killed


def in_child(function: Callable[..., None], *arguments: Any, seconds: float = 300) -> None:
    """Call a function in a child, and fail unless it ends well."""
    child = SERVER.Process(target=function, args=arguments)
    child.start()
    child.join(seconds)
    code = child.exitcode
    child.kill()
    assert code == 0, f"{function.__name__} ended with {code}"


def launch(verb: Verb, values: Any, folder: Path, *, count: int, number: int = 0, seconds: float = 300) -> bool:
    """Run by several processes; whether the main one was killed before its act of this number, and the others then."""
    port = free_port()
    children = [
        SERVER.Process(target=killed, args=(verb, values, folder, number, index, count, port)) for index in range(count)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + seconds
    while any(child.is_alive() for child in children) and children[0].exitcode in (None, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    was_killed = children[0].exitcode == -signal.SIGKILL
    for child in children:
        if was_killed:
            child.kill()
        child.join()
    assert was_killed or [child.exitcode for child in children] == [0] * count
    return was_killed


def moments(verb: Verb, values: Any, folder: Path, copies: Path) -> list[Path]:
    """A copy of the folder from before every act, in their order; the folder itself is that of a run to the end."""
    copies.mkdir()
    in_child(copied, verb, values, folder, copies)
    return sorted(copies.iterdir())


def sampled(all_of_them: Sequence[Path], count: int) -> list[Path]:
    """The last ones, where a run tidies up, and others from the third on, where the first file is half written."""
    last, rest = list(all_of_them[-count // 2 :]), list(all_of_them[2 : -count // 2])
    step = max(1, len(rest) // max(1, count - len(last)))
    return rest[::step] + last


def rerun(verb: Verb, values: Any, folder: Path, moment: Path) -> None:
    """Put a copy where the folder was, and run to the end."""
    shutil.rmtree(folder)
    shutil.copytree(moment, folder)
    in_child(run, verb, values)


def left_over(folder: Path) -> list[str]:
    """What only a run that is not finished has."""
    endings = (".parts", ".stages", ".partial", ".retired", ".trash", ".lock")
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(endings)]
