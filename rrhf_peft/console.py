"""How the commands speak: results on stdout, errors as one red paragraph on stderr, exit codes that mean something.

    0 done    1 an error the user can mend    2 wrong usage    130 interrupted

Anything else that goes wrong is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rrhf_peft.records import UserError

#: By then a launcher has ended this process, if the main process failed too and told the user why.
SECONDS_FOR_THE_MAIN_PROCESS_TO_SPEAK = 5.0


#: The option of every verb that can answer a script.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn `UserError` and running out of accelerator memory into one paragraph and exit code 1.

    Decorates a command. Of several processes that fail alike, only the main one is heard; one that
    fails alone says which it is.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        message = (
            f"The accelerator ran out of memory ({str(error).splitlines()[0]}) Lower engine.chunk_tokens or "
            "data.max_tokens, set engine.gradient_checkpointing: true, or quantise the base "
            "(model.quantization: nf4); `rrhf-peft plan RECIPE` shows where the memory goes."
        )
    else:
        return
    process = process_index()
    if process:
        time.sleep(SECONDS_FOR_THE_MAIN_PROCESS_TO_SPEAK)
    print_error(message if not process else f"process {process}: {message}")
    raise typer.Exit(1)


def print_json(values: Any) -> None:
    """Print plain values as JSON on stdout."""
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False))


def print_error(message: str) -> None:
    """Print one paragraph in red on stderr, unbroken, so that a path in it can be copied and searched for."""
    paragraph = " ".join(line.strip() for line in message.splitlines())
    Console(stderr=True).print(Text(f"Error: {paragraph}", style="red"), soft_wrap=True)


def process_index() -> int:
    """This process's number under torchrun or accelerate launch; 0 is the main one, and a single one."""
    return int(os.environ.get("RANK", "0"))


def _is_out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # not imported: what never loaded torch cannot fill a GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
