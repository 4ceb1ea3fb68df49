"""Runs commands of `rrhf-peft` and Python programs as processes of their own, without importing torch for each.

A server imports the package and what it uses, starts no thread, and forks a child per command, with the command's
arguments, folder and streams. A child ends with its exit handlers; that its modules are not taken apart one by one
saves seconds for each.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

#: Imported before the first command; what is not named here, a child imports for itself.
MODULES = (
    "rrhf_peft.cli rrhf_peft.train.run rrhf_peft.evaluate.run rrhf_peft.merge.run rrhf_peft.plan.run "
    "rrhf_peft.sample.run rrhf_peft.score.run rrhf_peft.report.run rrhf_peft.rounds.run rrhf_peft.demo.run "
    "rrhf_peft.compare.run rrhf_peft.push rrhf_peft.chat rrhf_peft.new rrhf_peft.doctor rich.progress "
    "bitsandbytes matplotlib.pyplot peft transformers.models.llama.modeling_llama"
).split()


class CommandServer:
    """`with CommandServer() as server: server.run(["rrhf-peft", "plan", "recipe.yaml"], folder)`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def run(self, command: list[str], folder: Path, *, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Run `rrhf-peft ...` or `python -c PROGRAM` in a folder with `typed` on its stdin; both streams together."""
        assert command[0] == "rrhf-peft" or command[:2] == ["python", "-c"], command
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as scratch:
            output, entered = Path(scratch, "output"), Path(scratch, "typed")
            entered.write_text(typed, encoding="utf-8")
            request = {"command": command, "folder": str(folder), "output": str(output), "typed": str(entered)}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            said = output.read_text(encoding="utf-8", errors="replace")
        return subprocess.CompletedProcess(command, code, stdout=said)


def serve() -> None:
    """Fork a child for every line of stdin; answer with its exit code."""
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # a child's collector need not touch, and copy, what the server imported
    assert threading.active_count() == 1, "a fork would leave threads behind"
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(become(request))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def become(request: dict[str, Any]) -> int:
    """In the child: be the command, to its end; its exit code."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(os.open(request["typed"], os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["folder"])
    name, *arguments = request["command"]
    sys.path.pop(0)  # the folder of this file
    try:
        if name == "python":
            sys.path.insert(0, "")
            sys.argv = ["-c"]
            exec(compile(arguments[1], "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            sys.argv = [name, *arguments]
            importlib.import_module("rrhf_peft.cli").main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
