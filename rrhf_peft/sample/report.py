"""What sampling came to, for each source: how many, how long, how different, what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


@dataclass
class SourceReport:
    """Numbers of one source.

    Attributes:
        responses: In the output.
        num_tokens: Mean tokens of a response; None for provided ones.
        words: Mean words of a response.
        distinct_2: Share of different word pairs among all word pairs of the source's responses to a prompt,
            mean over prompts with a pair.
        duplicates: Left out because the prompt has that text already.
        empty: Left out because there was no text.
        missing: Fewer candidates than k: no answer from a server, prompts that were too long, beams that ended early.
        stopped: Share of responses that ended by themselves or at a stop string; None for provided ones.
    """

    responses: int
    num_tokens: float | None
    words: float
    distinct_2: float | None
    duplicates: int
    empty: int
    missing: int
    stopped: float | None


@dataclass
class SampleReport:
    """All of a run: prompts, responses, and each source's numbers.

    Attributes:
        prompts: Those in the output.
        responses: In the output.
        sources: Numbers by source.
        without: Prompts that got no response, which stand in a file of their own.
        reasons: Why candidates are missing -> how many.
    """

    prompts: int
    responses: int
    sources: dict[str, SourceReport]
    without: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """As a table for the terminal; `same` are duplicates, `dist-2` is distinct-2, what is not `stopped` was cut."""
        lines = [f"{self.without} more prompts have no response"] if self.without else []
        lines += [f"{count} missing: {reason}" for reason, count in Counter(self.reasons).most_common(5)]
        table = Table(
            title=f"{self.responses} responses to {self.prompts} prompts",
            caption=escape("\n".join(lines)) or None,
            caption_justify="left",
            box=box.SIMPLE,
            padding=(0, 1),
        )
        table.add_column("source", overflow="fold", min_width=12)
        for name in ("kept", "tokens", "dist-2", "same", "empty", "missing", "stopped"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, source in self.sources.items():
            table.add_row(
                name,
                str(source.responses),
                _number(source.num_tokens, ".1f"),
                _number(source.distinct_2, ".3f"),
                str(source.duplicates),
                str(source.empty),
                str(source.missing),
                _number(source.stopped, ".0%"),
            )
        return table


def make_report(rows: Iterable[dict[str, Any]], failed: Iterable[dict[str, Any]] = ()) -> SampleReport:
    """Count the rows of a candidates file, and those of the prompts that got no response."""
    counts: dict[str, _Counts] = {}
    prompts = responses = without = 0
    reasons: Counter[str] = Counter()
    for row, is_failed in chain(((row, False) for row in rows), ((row, True) for row in failed)):
        prompts += not is_failed
        without += is_failed
        responses += len(row["responses"])
        texts: dict[str, list[str]] = {}
        for text, source, detail in zip(row["responses"], row["sources"], row["meta"]["candidates"], strict=True):
            counts.setdefault(source, _Counts()).add(text, detail)
            texts.setdefault(source, []).append(text)
        for source, group in texts.items():
            counts[source].add_prompt(group)
        for item in row["meta"]["removed"]:
            removed = counts.setdefault(item["source"], _Counts()).removed
            removed[item["reason"]] = removed.get(item["reason"], 0) + 1
            reasons.update([item["why"]] if "why" in item else [])
    sources = {name: count.report() for name, count in counts.items()}
    return SampleReport(prompts, responses, sources, without, dict(reasons))


class _Counts:
    def __init__(self) -> None:
        self.responses = self.tokens = self.counted = self.sampled = self.words = self.stopped = 0
        self.distinct: list[float] = []
        self.removed: dict[str, int] = {}

    def add(self, text: str, detail: dict[str, Any]) -> None:
        self.responses += 1
        self.words += len(text.split())
        if detail["finish_reason"] is not None:
            self.sampled += 1
            self.stopped += detail["finish_reason"] != "length"
        if detail["num_tokens"] is not None:
            self.counted += 1
            self.tokens += detail["num_tokens"]

    def add_prompt(self, texts: list[str]) -> None:
        pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
        if pairs:
            self.distinct.append(len(set(pairs)) / len(pairs))

    def report(self) -> SourceReport:
        return SourceReport(
            responses=self.responses,
            num_tokens=self.tokens / self.counted if self.counted else None,
            words=self.words / max(self.responses, 1),
            distinct_2=sum(self.distinct) / len(self.distinct) if self.distinct else None,
            duplicates=self.removed.get("duplicate", 0),
            empty=self.removed.get("empty", 0),
            missing=self.removed.get("missing", 0),
            stopped=self.stopped / self.sampled if self.sampled else None,
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
