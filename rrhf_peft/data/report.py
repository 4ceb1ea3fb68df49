"""The data report: what was read, what was dropped or merged and why, and what training will see."""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rrhf_peft.data.statistics import mean_rank_correlation
from rrhf_peft.records import TokenizedGroup


@dataclass(frozen=True)
class DataReport:
    """What became of the data. Numbers are about the groups and responses kept, except where they say otherwise.

    ``responses_read = responses_kept + empty_responses + sum(duplicates_merged) + responses_in_dropped_groups``.

    Attributes:
        groups_read: Groups given to the tokenizer.
        groups_kept: Groups to train on.
        groups_dropped: Reason -> groups: overlong_prompt, no_response, single_response, no_ordered_pair.
        responses_read: Responses of all groups read.
        responses_kept: Responses to train on.
        responses_in_dropped_groups: Neither empty nor merged, but lost with their group.
        empty_responses: Rejected as empty or white space. This and the next counts up to the histogram leave
            out groups dropped for an overlong prompt, which are not looked into.
        duplicates_merged: How they were the same -> responses merged into an earlier one of their group:
            equal_text, equal_tokens (texts differ), equal_after_truncation (whole ids differ).
        conflicting_duplicates: Responses whose duplicates had different scores; their mean was taken.
        prompts_truncated: Prompts that lost their beginning, in groups dropped later as well.
        responses_truncated: Responses that lost their end and EOS, those merged or dropped later as well.
        empty_prompts: Prompts without a token besides the BOS or EOS that starts them.
        repeated_prompts: Groups whose prompt ids an earlier group has too.
        responses_as_sampled: Responses that are the very tokens that were sampled. This and the next four count before
            duplicates are merged and groups dropped.
        responses_without_end: Responses that sampling had cut at its length; they get no end token.
        lengths_unlike_sampled: Responses whose text has another number of tokens than were sampled for it.
        seams_merged: Responses whose first characters the tokenizer would merge with the prompt's last ones.
        lost_characters: Character that the tokenizer cannot give back -> responses that have it.
        end_of_response: What ends a response, as text.
        chat_template_ignored: The template is ``raw``, and the tokenizer has a chat template.
        k_histogram: Responses per group -> groups.
        score_mean: Over all responses.
        score_std: Population standard deviation over all responses.
        score_mean_of_max: Mean over groups of the best score: what the trained policy's reward approaches
            (arXiv 2304.05302).
        pairs: Pairs of responses within groups.
        ordered_pairs: Those whose scores differ by more than the gap: what ranking learns from.
        tie_rate: Share of pairs with equal scores.
        tie_rate_read: The same over everything read, before any clean-up.
        score_length_correlation: Mean over groups of Spearman's rank correlation between score and
            response tokens; None where no group has both different scores and different lengths.
        prompt_tokens: p10, p50, p90, p99 and max of prompt lengths in tokens, BOS included.
        response_tokens: The same of responses, EOS included.
        tokens: Tokens per epoch with each prompt computed once for its k responses.
        tokens_plain: Tokens per epoch with the prompt repeated for each response.
        sharing_saves: Share of the plain tokens that sharing the prompt saves.
        sources: Source -> {count, mean_score}, most frequent first; a response that several wrote counts for each.
        settings: The arguments that the groups were tokenised with.
        fingerprint: SHA-256 over the resulting token ids, scores and sources, in order.
    """

    groups_read: int
    groups_kept: int
    groups_dropped: dict[str, int]
    responses_read: int
    responses_kept: int
    responses_in_dropped_groups: int
    empty_responses: int
    duplicates_merged: dict[str, int]
    conflicting_duplicates: int
    prompts_truncated: int
    responses_truncated: int
    empty_prompts: int
    repeated_prompts: int
    responses_as_sampled: int
    responses_without_end: int
    lengths_unlike_sampled: int
    seams_merged: int
    lost_characters: dict[str, int]
    end_of_response: str
    chat_template_ignored: bool
    k_histogram: dict[int, int]
    score_mean: float
    score_std: float
    score_mean_of_max: float
    pairs: int
    ordered_pairs: int
    tie_rate: float
    tie_rate_read: float
    score_length_correlation: float | None
    prompt_tokens: dict[str, int]
    response_tokens: dict[str, int]
    tokens: int
    tokens_plain: int
    sharing_saves: float
    sources: dict[str, dict[str, float]]
    settings: dict[str, Any]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the histogram's keys are strings, as JSON has no others."""
        values = asdict(self)
        values["k_histogram"] = {str(k): count for k, count in self.k_histogram.items()}
        return values

    def __rich__(self) -> RenderableType:
        return report_table(self)


def make_report(groups: Sequence[TokenizedGroup], counts: Mapping[str, Any], settings: dict[str, Any]) -> DataReport:
    """Describe the groups kept (at least one); `counts` holds what was counted on the way to them."""
    counts = {name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()}
    pairs_read, tied_read = counts.pop("pairs_read"), counts.pop("tied_pairs_read")
    scores_by_source = counts.pop("scores_by_source")
    scores = np.array([score for group in groups for score in group.scores])
    prompts = [len(group.prompt_ids) for group in groups]
    responses = [len(ids) for group in groups for ids in group.response_ids]
    tokens = sum(prompts) + sum(responses)
    plain = sum(len(group.prompt_ids) * len(group.response_ids) for group in groups) + sum(responses)
    pairs = sum(math.comb(len(group.scores), 2) for group in groups)
    tied = sum(math.comb(count, 2) for group in groups for count in Counter(group.scores).values())
    return DataReport(
        **counts,
        groups_kept=len(groups),
        responses_kept=len(responses),
        repeated_prompts=len(groups) - len({array("i", group.prompt_ids).tobytes() for group in groups}),
        k_histogram=dict(sorted(Counter(len(group.scores) for group in groups).items())),
        score_mean=float(scores.mean()),
        score_std=float(scores.std()),
        score_mean_of_max=float(np.mean([max(group.scores) for group in groups])),
        pairs=pairs,
        ordered_pairs=sum(_ordered_pairs(group.scores, settings["min_score_gap"]) for group in groups),
        tie_rate=tied / pairs if pairs else 0.0,
        tie_rate_read=tied_read / pairs_read if pairs_read else 0.0,
        score_length_correlation=mean_rank_correlation(
            (group.scores, [len(ids) for ids in group.response_ids]) for group in groups
        ),
        prompt_tokens=_percentiles(prompts),
        response_tokens=_percentiles(responses),
        tokens=tokens,
        tokens_plain=plain,
        sharing_saves=1 - tokens / plain,
        sources=_by_source(scores_by_source),
        settings=settings,
        fingerprint=_fingerprint(groups),
    )


def _ordered_pairs(scores: Sequence[float], min_score_gap: float) -> int:
    return sum(abs(one - other) > min_score_gap for place, one in enumerate(scores) for other in scores[place + 1 :])


def _percentiles(lengths: list[int]) -> dict[str, int]:
    """Nearest-rank percentiles: lengths that occur, not interpolations between them."""
    values = np.percentile(lengths, [10, 50, 90, 99, 100], method="inverted_cdf")
    return dict(zip(("p10", "p50", "p90", "p99", "max"), map(int, values), strict=True))


def _by_source(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    ordered = sorted(scores.items(), key=lambda item: (-len(item[1]), item[0]))
    return {source: {"count": len(own), "mean_score": float(np.mean(own))} for source, own in ordered}


def _fingerprint(groups: Sequence[TokenizedGroup]) -> str:
    """Every list goes in with its length in front, so that no two different data sets read the same."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(struct.pack("<q", len(group.scores)))
        for ids in (group.prompt_ids, *group.response_ids):
            packed = array("i", ids)
            if sys.byteorder == "big":
                packed.byteswap()
            digest.update(struct.pack("<q", len(packed)) + packed.tobytes())
        digest.update(struct.pack(f"<{len(group.scores)}d", *group.scores))
        for source in group.sources:
            name = source.encode("utf-8")
            digest.update(struct.pack("<q", len(name)) + name)
    return digest.hexdigest()


# ---- As a table that reads at 80 columns, with or without colour ----

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
        ("prompt tokens", _in_percentiles(r.prompt_tokens)),
        ("", f"{r.prompts_truncated:,} lost their beginning ({_prompt_limit(r.settings['max_prompt_tokens'])})"),
        ("response tokens", _in_percentiles(r.response_tokens)),
        ("", f"{r.responses_truncated:,} lost their end (prompt + response limit {r.settings['max_tokens']:,})"),
        ("tokens", f"{r.tokens:,} per epoch; {r.tokens_plain:,} with the prompt repeated k times"),
        ("", f"sharing the prompt saves {r.sharing_saves:.1%}"),
        ("template", f"{r.settings['template']}; responses end with {r.end_of_response}"),
    ]
    if r.responses_as_sampled:
        facts.append(("", f"{r.responses_as_sampled:,} responses are the tokens that were sampled"))
    if r.responses_without_end:
        facts.append(("", f"{r.responses_without_end:,} were cut when sampled: they get no end"))
    if r.lengths_unlike_sampled:
        facts.append(("", f"{r.lengths_unlike_sampled:,} have another number of tokens than were sampled"))
    if r.seams_merged:
        facts.append(("", f"{r.seams_merged:,} would share a token with their prompt, and were set apart"))
    if r.lost_characters:
        facts.append(("warning", f"the tokenizer loses characters: {_lost(r.lost_characters)}"))
    if r.chat_template_ignored:
        facts.append(("warning", "template raw ignores the tokenizer's chat template; for a chat model set chat"))
    return [*facts, ("fingerprint", r.fingerprint[:16])]


def _lost(characters: dict[str, int]) -> str:
    most = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{one!r} in {count:,} responses" for one, count in most[:5])
    return shown + (f", and {len(most) - 5:,} more" if len(most) > 5 else "")


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


def _in_percentiles(values: dict[str, int]) -> str:
    return "  ".join(f"{name} {value:,}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:.4g}"
