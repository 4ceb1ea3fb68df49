"""The README.md of every folder with weights that this package writes, adapters and merged models alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml


def model_card(
    title: str, intro: str, sections: Mapping[str, str], *, base: str, library: str, tags: Iterable[str]
) -> str:
    """Markdown with the hub's metadata block.

    Args:
        title: Of the card; the folder's name.
        intro: What this is, in a paragraph.
        sections: Heading -> Markdown.
        base: Hub id or folder of the base model. A folder on somebody's disk is no metadata: the hub refuses it.
        library: That loads the folder, ``peft`` or ``transformers``.
        tags: On the hub.
    """
    metadata = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    if not Path(base).is_dir():
        metadata = {"base_model": base, **metadata}
    parts = [f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---", f"# {title}", intro]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
