"""Any importer's format into a ranked file, and the count of what could not come along.

Nothing is cleaned: duplicates, empty texts and ties stay, for `inspect` to show and `tokenizing` to judge.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf_peft.data.rated_groups import UNRATED
from rrhf_peft.data.reading import read_groups, write_ranked
from rrhf_peft.records import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ConversionReport:
    """What was read and written.

    Attributes:
        output: The file written.
        groups_read: Groups that the importer found.
        groups_written: Those with at least one rated response.
        groups_without_response: The rest: nothing in them was rated.
        responses_written: Responses of the groups written.
        unrated_responses: Responses without a rating, which are not written.
        single_response_groups: Groups written with one response: nothing to rank, but fine-tuning can use them.
        groups_without_order: Groups written with several responses that are all tied.
        sources: How many different sources wrote the responses.
        meta_left_out: What the groups knew besides (`RankedGroup.meta`), by name; a ranked file has no column for it.
    """

    output: str
    groups_read: int
    groups_written: int
    groups_without_response: int
    responses_written: int
    unrated_responses: int
    single_response_groups: int
    groups_without_order: int
    sources: int
    meta_left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, fact in self._facts():
            table.add_row(Text(name), Text(fact))
        return table

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("written", self.output),
            ("groups", f"{self.groups_written:,} of {self.groups_read:,} read"),
        ]
        if self.groups_without_response:
            facts.append(("", f"- {self.groups_without_response:,} without a rated response, left out"))
        if self.single_response_groups:
            facts.append(("", f"{self.single_response_groups:,} have a single response, nothing to rank"))
        if self.groups_without_order:
            facts.append(("", f"{self.groups_without_order:,} have only ties"))
        facts.append(("responses", f"{self.responses_written:,}, by {self.sources:,} sources"))
        if self.unrated_responses:
            facts.append(("", f"- {self.unrated_responses:,} without a rating, left out"))
        if self.meta_left_out:
            facts.append(("not kept", f"{', '.join(self.meta_left_out)} (a ranked file has four columns)"))
        return facts


def convert(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    format: str = "auto",
    split: str = "train",
    revision: str | None = None,
    max_groups: int | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Read data in any format and write it as a ranked file, whole or not at all.

    A ranked file has the columns prompt, responses, scores and sources, and no others; what the source
    knew besides is named in the report and not kept. The other arguments are those of `read_groups`.

    Args:
        output: The file to write; its name ends in ``.jsonl``.
        overwrite: Replace an existing `output`.

    Raises:
        UserError: the data cannot be read, nothing in it is rated, or `output` exists, is misnamed or
            cannot be written.
    """
    output = Path(output)
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: a ranked file is JSON Lines. Choose a name that ends in .jsonl.")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: already exists. Choose another name, remove it, or pass --overwrite.")
    groups = read_groups(where, format=format, split=split, revision=revision, max_groups=max_groups)
    written = [group for group in groups if group.responses]
    if not written:
        raise UserError(f"{output}: nothing to write, because none of the {len(groups)} groups has a rated response.")
    write_ranked(output, written)
    origin = {"file", "line", "row", "instance", UNRATED}
    return ConversionReport(
        output=str(output),
        groups_read=len(groups),
        groups_written=len(written),
        groups_without_response=len(groups) - len(written),
        responses_written=sum(len(group.responses) for group in written),
        unrated_responses=sum(len(group.meta.get(UNRATED, ())) for group in groups),
        single_response_groups=sum(len(group.responses) == 1 for group in written),
        groups_without_order=sum(len(group.responses) > 1 and len(set(group.scores)) == 1 for group in written),
        sources=len({source for group in written for source in group.sources}),
        meta_left_out=sorted({name for group in groups for name in group.meta} - origin),
    )
