"""How the commands speak: results on stdout, errors as one red paragraph on stderr, exit codes that mean something.

    0 done    1 an error    2 wrong usage    130 interrupted

`verb` decorates every command: whatever goes wrong inside becomes one paragraph, with the traceback behind `--debug`.
Text that comes from data, models and libraries reaches the terminal without control sequences.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from rrhf_peft.records import UserError

#: By then a launcher has ended this process, if the main process failed too and told the user why.
SECONDS_FOR_THE_MAIN_PROCESS_TO_SPEAK = 15.0
#: Longer errors are cut in the middle.
MOST_CHARACTERS = 4000
#: An environment variable that does what --debug does.
DEBUG_VARIABLE = "RRHF_DEBUG"

#: The option of every verb that can answer a script.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]

_Debug = Annotated[bool, typer.Option("--debug", help=f"Show an error's traceback; so does {DEBUG_VARIABLE}=1.")]

#: What a terminal obeys or reorders text by: C0 without tab and line feed, DEL, C1, marks of direction, line and
#: paragraph separators; and lone surrogates, which no stream can encode.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


Answer = TypeVar("Answer")


def verb(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Decorate a command of `rrhf-peft`: it takes `--debug`, and all of its errors are one paragraph."""

    @functools.wraps(function)
    def command(*args: Any, debug: bool = False, **options: Any) -> Answer:
        for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 gets escapes in place of an error
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        if not sys.stderr.isatty():  # the bars of transformers would fill a log; it reads this when it is imported
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with plain_errors(debug=debug):
            process_index()  # a launcher's variables are checked before anything waits for other processes
            answer = function(*args, **options)
            sys.stdout.flush()
        return answer

    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
    parameters = [*inspect.signature(function, eval_str=True).parameters.values(), debug]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@contextlib.contextmanager
def plain_errors(*, debug: bool = False) -> Iterator[None]:
    """Turn every error into one paragraph on stderr and exit code 1.

    Of several processes that fail alike, only the main one is heard; one that fails alone says which it is.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        print_error(" ".join(["Interrupted.", *map(str, error.args)]), title=None)
        raise typer.Exit(130) from None
    except (Exception, SystemExit) as error:
        try:
            process = process_index()
        except UserError:
            process = 0
        if process:
            time.sleep(SECONDS_FOR_THE_MAIN_PROCESS_TO_SPEAK)
        if debug or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
            sys.stderr.write(cleaned("".join(traceback.format_exception(error))))
        print_error(f"process {process}: {_paragraph(error)}" if process else _paragraph(error))
        _close_a_broken_stdout()
        raise typer.Exit(1) from None


def process_index() -> int:
    """This process's number under torchrun or accelerate launch; 0 is the main one, and a single one.

    Raises:
        UserError: the variables that a launcher sets are no numbers, or do not fit together.
    """
    numbers = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        if not re.fullmatch(r"-?[0-9]{1,9}", text):
            raise UserError(f"the environment variable {name} is {text!r}, not a number. {_UNSET}")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise UserError(f"the environment variables say process RANK={rank} of WORLD_SIZE={size}. {_UNSET}")
    if not -1 <= numbers["LOCAL_RANK"] <= rank:
        raise UserError(
            f"the environment variables say LOCAL_RANK={numbers['LOCAL_RANK']} of RANK={rank} in all. {_UNSET}"
        )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(f"the environment says WORLD_SIZE={size} processes but not {', '.join(missing)}. {_UNSET}")
    port = os.environ.get("MASTER_PORT", "1")
    if size > 1 and not (port.isascii() and port.isdigit() and 0 < int(port[:9]) < 65536):
        raise UserError(f"the environment variable MASTER_PORT is {port!r}, not a port. {_UNSET}")
    return rank


_UNSET = "Start several processes with `accelerate launch` or torchrun, which set it; for a single one, unset it."


def cleaned(text: str) -> str:
    """`text` with every character that a terminal would obey, and every lone surrogate, as an escape such as \\x1b."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A rich console that shows characters which a terminal would obey as a replacement character."""
    console = Console(stderr=stderr, quiet=quiet)
    console.push_render_hook(_CleaningHook())
    return console


def say(text: str) -> None:
    """Print one line of text on stdout, without control sequences."""
    typer.echo(cleaned(text))


def print_json(values: Any) -> None:
    """Print plain values as JSON on stdout; NaN and infinities, which JSON does not have, become null."""
    text = json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False)
    typer.echo(_UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_error(message: str, title: str | None = "Error") -> None:
    """Print one paragraph in red on stderr, unbroken, so that a path in it can be copied and searched for."""
    paragraph = " ".join(cleaned(line).strip() for line in message.splitlines())
    if len(paragraph) > MOST_CHARACTERS:
        paragraph = f"{paragraph[: MOST_CHARACTERS - 500]} [...] {paragraph[-500:]}"
    shown = f"{title}: {paragraph}" if title else paragraph
    with contextlib.suppress(OSError):
        Console(stderr=True).print(Text(shown, style="red"), soft_wrap=True)


class _CleaningHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(renderable) for renderable in renderables]


class _Cleaned:
    """A renderable without control characters in its text; its own styles and cursor movements stay."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(_UNPRINTABLE.sub("\ufffd", segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.renderable)


def _paragraph(error: BaseException) -> str:
    """What went wrong, where, and what to do."""
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if _is_out_of_memory(error):
        return (
            f"The accelerator ran out of memory ({str(error).splitlines()[0]}) Lower engine.chunk_tokens or "
            "data.max_tokens, set engine.gradient_checkpointing: true, or quantise the base "
            "(model.quantization: nf4); `rrhf-peft plan RECIPE` shows where the memory goes."
        )
    if isinstance(error, BrokenPipeError):
        return "stdout was closed before everything was written. Give it to a program that reads it to the end."
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename is not None else ""
        return f"{path}{error.strerror} (at {_origin(error)}). Make room, or check the path and its permissions."
    if isinstance(error, SystemExit):
        return f"code that ran inside this command ended the program (sys.exit at {_origin(error)}). Remove that call."
    if isinstance(error, RecursionError):
        said = "something is nested too deeply"
    return (
        f"{type(error).__name__}: {_cut(said) or 'no reason given'} (at {_origin(error)}). If what you gave is right, "
        "this is a defect of rrhf-peft: run the same command with --debug, and report what it prints."
    )


def _cut(text: str, limit: int = 1000) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [...]"


def _origin(error: BaseException) -> str:
    """`module:line` where the error was raised, and the line of this package that led there."""
    frames = [
        (str(frame.f_globals.get("__name__", "?")), line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    frames = [(module, line) for module, line in frames if module not in (__name__, "contextlib")]
    if not frames:
        return "an unknown place"
    raised = frames[-1]
    ours = next((frame for frame in reversed(frames) if frame[0].split(".")[0] == "rrhf_peft"), raised)
    told = "{}:{}".format(*ours)
    return told if ours == raised else "{}:{}".format(*raised) + f", called at {told}"


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported: what never loaded torch cannot fill a GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _close_a_broken_stdout() -> None:
    """Drop what stdout could not take, so that the interpreter does not try again at its end, with a traceback."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
