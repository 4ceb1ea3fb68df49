"""The data report as a table that reads at 80 columns, with or without colour."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rrhf_peft.data.report import DataReport

#: Sources shown; data sets with hundreds of them name the rest in one line.
_SOURCES_SHOWN = 20

_REASONS = {
    "overlong_prompt": "with a prompt over the limit",
    "no_response": "without a response that is not empty",
    "single_response": "with a single response left, nothing to rank",
    "no_ordered_pair": "with no two scores far enough apart",
}
_HOW = {
    "equal_text": "equal text",
    "equal_tokens": "equal tokens, text differs",
    "equal_after_truncation": "equal after truncation",
}


def report_table(report: DataReport) -> RenderableType:
    """The whole report: a table of facts, and one of sources."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in _facts(report):
        facts.add_row(Text(name), Text(value))
    return Group(Text("Data report", style="bold underline"), facts, Text(), _source_table(report))


def _facts(report: DataReport) -> list[tuple[str, str]]:
    r = report
    dropped = sum(r.groups_dropped.values())
    merged = sum(r.duplicates_merged.values())
    facts = [("groups", f"{r.groups_kept:,} kept of {r.groups_read:,} read, {dropped:,} dropped")]
    facts += [("", f"- {count:,} {_REASONS[reason]}") for reason, count in r.groups_dropped.items()]
    facts += [
        ("responses", f"{r.responses_kept:,} kept of {r.responses_read:,} read"),
        ("", f"- {r.empty_responses:,} empty, rejected"),
        ("", f"- {merged:,} duplicates, merged{_in_brackets(r.duplicates_merged)}"),
        ("", f"- {r.responses_in_dropped_groups:,} in dropped groups"),
    ]
    if r.conflicting_duplicates:
        facts.append(("", f"{r.conflicting_duplicates:,} had duplicates with other scores: the mean was taken"))
    if "equal_after_truncation" in r.duplicates_merged:
        facts.append(("", "truncation made responses equal: raise max_tokens or set max_prompt_tokens lower"))
    if r.repeated_prompts:
        facts.append(("prompts", f"{r.repeated_prompts:,} groups repeat the prompt of an earlier one"))
    if r.empty_prompts:
        facts.append(("", f"{r.empty_prompts:,} empty prompts"))
    correlation = "undefined" if r.score_length_correlation is None else f"{r.score_length_correlation:+.2f}"
    facts += [
        ("k, responses", _histogram(r.k_histogram)),
        ("scores", f"mean {_number(r.score_mean)}, std {_number(r.score_std)}"),
        ("", f"mean of each group's best {_number(r.score_mean_of_max)} (the policy's reward approaches it)"),
        ("", f"rank correlation with length {correlation} (Spearman, mean over groups)"),
        ("pairs", f"{r.pairs:,}, of which {r.ordered_pairs:,} ordered"),
        ("", f"{r.tie_rate:.1%} tied ({r.tie_rate_read:.1%} as read)"),
        ("prompt tokens", _percentiles(r.prompt_tokens)),
        ("", f"{r.prompts_truncated:,} lost their beginning ({_prompt_limit(r.settings['max_prompt_tokens'])})"),
        ("response tokens", _percentiles(r.response_tokens)),
        ("", f"{r.responses_truncated:,} lost their end (prompt + response limit {r.settings['max_tokens']:,})"),
        ("tokens", f"{r.tokens:,} per epoch; {r.tokens_plain:,} with the prompt repeated k times"),
        ("", f"sharing the prompt saves {r.sharing_saves:.1%}"),
        ("template", str(r.settings["template"])),
        ("fingerprint", r.fingerprint[:16]),
    ]
    return facts


def _source_table(report: DataReport) -> Table:
    table = Table("source", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("responses", justify="right")
    table.add_column("mean score", justify="right")
    sources = list(report.sources.items())
    for source, own in sources[:_SOURCES_SHOWN]:
        table.add_row(Text(source), f"{own['count']:,}", _number(own["mean_score"]))
    if len(sources) > _SOURCES_SHOWN:
        table.add_row(f"and {len(sources) - _SOURCES_SHOWN:,} more", "", "")
    return table


def _prompt_limit(limit: int | None) -> str:
    return "the longest response comes first, up to half" if limit is None else f"limit {limit:,}"


def _in_brackets(how: dict[str, int]) -> str:
    return f" ({'; '.join(f'{count:,} {_HOW[name]}' for name, count in how.items())})" if how else ""


def _histogram(counts: dict[int, int]) -> str:
    parts = [f"{k} in {count:,}" for k, count in sorted(counts.items(), reverse=True)]
    return ", ".join([parts[0] + " groups", *parts[1:]])


def _percentiles(values: dict[str, int]) -> str:
    return "  ".join(f"{name} {value:,}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:.4g}"
