"""How the demo looks in a terminal: headings, bars, the before/after table, texts side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.box import HORIZONTALS, SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rrhf_peft.demo.comparison import Measured

#: Without a terminal, one line of progress at most this often, in seconds.
SECONDS_BETWEEN_LINES = 10.0


class Heading:
    """Numbers the demo's steps as it prints them, each with a sentence or two on what happens and why."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps, self._step = console, steps, 0

    def __call__(self, title: str, explanation: str) -> None:
        """Print the next step's heading."""
        self._step += 1
        self._console.print()
        self._console.print(Text.assemble((f"{self._step}/{self._steps} ", "cyan"), (title, "bold")))
        self._console.print(Padding(Text(explanation, style="dim"), (0, 0, 0, 4), expand=False))


@contextlib.contextmanager
def bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`; a bar with a rate and the time left, or plain lines without a terminal."""
    started = last = time.monotonic()
    done = 0
    if console.is_terminal:
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(
            TextColumn(f"    {what}"),
            *columns,
            TextColumn("{task.fields[rate]}"),
            console=console,
            expand=True,
            transient=True,
        ) as progress:
            task = progress.add_task("", total=total, rate="")

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress.update(task, completed=done, rate=f"{done / (time.monotonic() - started):.0f}/s")

            yield advance
    else:

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if (now := time.monotonic()) - last >= SECONDS_BETWEEN_LINES:
                last = now
                left = (now - started) / done * (total - done)
                note(console, f"{what}: {done} of {total}, {left:.0f} s left")

        yield advance
    note(console, f"{what}: {done} in {time.monotonic() - started:.0f} s")


def note(console: Console, text: str) -> None:
    """A line under a heading."""
    console.print(Padding(Text(text), (0, 0, 0, 4), expand=False), highlight=False)


def closing(
    console: Console, output: Path, prompts: Sequence[str], before: Measured, after: Measured, mean_of_max: float
) -> None:
    """The result: numbers, texts, and where to go next."""
    console.print(comparison_table(before, after, mean_of_max))
    note(
        console,
        "More reward is worth something only while the texts stay language: collapsed ones would show as a "
        "perplexity many times the base's, or as few different word pairs.",
    )
    console.print()
    for part in side_by_side(prompts, before, after, count=3):
        console.print(part)
    console.print()
    console.print(next_steps(output), soft_wrap=True)  # commands stay whole for copying
    console.print()


def comparison_table(before: Measured, after: Measured, mean_of_max: float) -> Table:
    """The table that says whether it worked."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("after RRHF", justify="right", style="green")
    table.add_row("mean reward [95 % interval]", str(before.reward), str(after.reward))
    table.add_row("perplexity under the base", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
    table.add_row("pairs ordered right", f"{before.pair_accuracy:.1%}", f"{after.pair_accuracy:.1%}")
    table.add_row("different word pairs", f"{before.distinct_2:.1%}", f"{after.distinct_2:.1%}")
    table.add_row("words per text", f"{before.words:.0f}", f"{after.words:.0f}")
    table.add_section()
    table.add_row("mean of training groups' best", f"{mean_of_max:.2f}", "")
    return table


def side_by_side(prompts: Sequence[str], before: Measured, after: Measured, count: int) -> Iterator[Text | Table]:
    """The first samples to the first held-out prompts, not chosen ones."""
    for index, prompt in enumerate(prompts[:count]):
        yield Text(prompt, style="bold")
        table = Table(box=HORIZONTALS, pad_edge=False, show_header=True, header_style="dim")
        table.add_column(f"base, reward {before.rewards[index][0]:+.2f}", ratio=1)
        table.add_column(f"after RRHF, reward {after.rewards[index][0]:+.2f}", ratio=1)
        table.add_row(*(Text(_printable(policy.responses[index][0].strip())) for policy in (before, after)))
        yield table


def _printable(text: str) -> str:
    """What a model writes may hold control characters; terminals obey them."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def next_steps(output: Path) -> Text:
    """What to type next."""
    recipe = output / "recipe.yaml"
    lines = (
        ("what training saw", f"rrhf-peft inspect {recipe}"),
        (
            "the paper's own weighting",
            f"rrhf-peft train {recipe} objective.variant=paper training.output_dir={output}-paper",
        ),
        ("the merged model", f"AutoModelForCausalLM.from_pretrained('{output}/merged')"),
        ("the loss, step by step", "notebooks/01_rrhf_in_ten_minutes.ipynb"),
        ("your own data, with the columns of ranked.jsonl", "recipes/qlora_7b.yaml"),
    )
    text = Text("Where to go next", style="bold")
    for what, how in lines:
        text.append(f"\n  {what}\n", style="not bold dim")
        text.append(f"    {how}", style="not bold")
    return text
