"""What a page is made of: sections of paragraphs, tables, pictures, examples and folded text.

Everything here is plain text; the template escapes it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rrhf_peft.plotting import figure_bytes


@dataclass(frozen=True)
class Paragraph:
    """A few sentences; `small` for remarks."""

    kind: ClassVar[str] = "paragraph"
    text: str
    small: bool = False


@dataclass(frozen=True)
class TableRow:
    """Cells, the first one the row's name; a colour where the row is drawn in it elsewhere."""

    cells: list[str]
    color: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns, rows, and what the columns mean, where their titles do not say it."""

    kind: ClassVar[str] = "table"
    columns: list[str]
    rows: list[TableRow]
    legend: list[tuple[str, str]] = field(default_factory=list)
    title: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values, one below the other."""

    kind: ClassVar[str] = "facts"
    facts: list[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawn figure as a data URI, with the same in words."""

    source: str
    description: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where the screen is wide enough."""

    kind: ClassVar[str] = "pictures"
    pictures: list[Picture]


@dataclass(frozen=True)
class Answer:
    """One policy's response to a prompt."""

    policy: str
    color: str
    reward: str
    text: str


@dataclass(frozen=True)
class Example:
    """A prompt, as (role, text) of each message, and every policy's response."""

    prompt: list[tuple[str, str]]
    answers: list[Answer]


@dataclass(frozen=True)
class Examples:
    """Prompts with the responses side by side."""

    kind: ClassVar[str] = "examples"
    examples: list[Example]


@dataclass(frozen=True)
class Folded:
    """Text that is shown when asked for."""

    kind: ClassVar[str] = "folded"
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; `anchor` is its name in links."""

    title: str
    anchor: str
    blocks: Sequence[Any]


def picture(figure: Any, description: str, caption: str = "", *, wide: bool = False) -> Picture:
    """Draw a figure; it is kept as an SVG in a data URI, in which nothing can be run."""
    source = "data:image/svg+xml;base64," + base64.b64encode(figure_bytes(figure, "svg")).decode("ascii")
    return Picture(source, description, caption, wide)
