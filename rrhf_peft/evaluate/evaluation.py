"""What an evaluation came to: its numbers, and how to read them back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions

from rrhf_peft.evaluate.folder import EVALUATION
from rrhf_peft.evaluate.table import markdown_table, terminal_tables
from rrhf_peft.records import UserError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        folder: where it lies.
        figures: the contents of `evaluation.json`.
    """

    folder: Path
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The contents of `evaluation.json`."""
        return self.figures

    def markdown(self) -> str:
        """The table in the paper's form, one row for each policy."""
        return markdown_table(self.figures)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield from terminal_tables(self.figures, options.max_width)


def finished_evaluation(folder: str | Path) -> Evaluation:
    """Read a finished evaluation back.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / EVALUATION
    try:
        return Evaluation(Path(folder), json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no finished evaluation can be read here ({error}). Run `rrhf-peft evaluate`."
        ) from None
