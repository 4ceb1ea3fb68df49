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
from typing import TYPE_CHECKING, Any

import numpy as np

from rrhf_peft.data.rank_correlation import mean_rank_correlation
from rrhf_peft.records import TokenizedGroup

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        sources: Source -> {count, mean_score}, most frequent first.
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
        from rrhf_peft.data.report_view import report_table

        return report_table(self)


def make_report(groups: Sequence[TokenizedGroup], counts: Mapping[str, Any], settings: dict[str, Any]) -> DataReport:
    """Describe the groups kept (at least one); `counts` holds what was counted on the way to them."""
    counts = {name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()}
    pairs_read, tied_read = counts.pop("pairs_read"), counts.pop("tied_pairs_read")
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
        sources=_by_source(groups),
        settings=settings,
        fingerprint=_fingerprint(groups),
    )


def _ordered_pairs(scores: Sequence[float], min_score_gap: float) -> int:
    return sum(abs(one - other) > min_score_gap for place, one in enumerate(scores) for other in scores[place + 1 :])


def _percentiles(lengths: list[int]) -> dict[str, int]:
    """Nearest-rank percentiles: lengths that occur, not interpolations between them."""
    values = np.percentile(lengths, [10, 50, 90, 99, 100], method="inverted_cdf")
    return dict(zip(("p10", "p50", "p90", "p99", "max"), map(int, values), strict=True))


def _by_source(groups: Sequence[TokenizedGroup]) -> dict[str, dict[str, float]]:
    scores: dict[str, list[float]] = {}
    for group in groups:
        for source, score in zip(group.sources, group.scores, strict=True):
            scores.setdefault(source, []).append(score)
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
