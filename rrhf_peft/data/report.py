"""What became of the data: what a ranked file holds as it is read, and what training will see of it.

`ranked_statistics` is about groups as read, before any tokenizer: scores, sources, length bias, repetition.
`make_report` is about token ids: what was dropped, merged and cut on the way, and what is left. Both go through the
groups once, and keep of each a few numbers, so that a million of them take no more memory than their scores.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata

from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError

#: Two responses of a group are near-identical from this share of common words on.
NEAR_IDENTICAL = 0.9


# ---- Groups as they are read ----


@dataclass(frozen=True)
class SourceReport:
    """One source's responses. Rates are None where nothing was there to count.

    Attributes:
        responses: How many there are.
        groups: Groups that have at least one.
        mean: Mean score.
        std: Population standard deviation of the scores.
        mean_of_max: Mean over its groups of its best score there.
        best_share: Share of its groups in which it has the best score, alone or tied.
        win_rate: Share won of its ordered pairs with other sources' responses; ties do not count.
        ties: Its pairs with other sources' responses that are tied.
        mean_characters: Mean length of its responses.
    """

    responses: int
    groups: int
    mean: float
    std: float
    mean_of_max: float
    best_share: float
    win_rate: float | None
    ties: int
    mean_characters: float


@dataclass(frozen=True)
class RankedStatistics:
    """Statistics of ranked groups as read.

    Attributes:
        groups: How many there are.
        responses: Responses of all groups.
        k_histogram: Responses per group -> groups.
        score_mean: Over all responses.
        score_std: Population standard deviation over all responses.
        score_mean_of_max: Mean over groups of the best score (arXiv 2304.05302).
        pairs: Pairs of responses within groups.
        tied_pairs: Those with equal scores.
        groups_without_order: Groups without two different scores.
        repeated_prompts: Groups whose prompt an earlier group has too.
        length_correlation: Mean over groups of Spearman's rank correlation between score and characters;
            None where no group has both different scores and different lengths.
        longer_wins: Share of the ordered pairs of different lengths in which the longer response is better.
        empty_responses: Responses of white space only.
        duplicates: Responses whose text an earlier response of their group has too.
        conflicting_duplicates: Texts that a group holds with different scores.
        near_identical_pairs: Pairs of different texts of a group whose words, without case and counted once
            each, are the same to at least `NEAR_IDENTICAL` (Jaccard: common words / words of either).
        groups_with_near_identical: Groups with such a pair.
        sources: Source -> its report, the best mean of max first.
    """

    groups: int
    responses: int
    k_histogram: dict[int, int]
    score_mean: float
    score_std: float
    score_mean_of_max: float
    pairs: int
    tied_pairs: int
    groups_without_order: int
    repeated_prompts: int
    length_correlation: float | None
    longer_wins: float | None
    empty_responses: int
    duplicates: int
    conflicting_duplicates: int
    near_identical_pairs: int
    groups_with_near_identical: int
    sources: dict[str, SourceReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the histogram's keys are strings, as JSON has no others."""
        return {**asdict(self), "k_histogram": {str(k): count for k, count in self.k_histogram.items()}}

    def __rich__(self) -> RenderableType:
        return statistics_table(self)


def ranked_statistics(groups: Iterable[RankedGroup]) -> RankedStatistics:
    """Describe ranked groups; those without any response only count as groups.

    Raises:
        UserError: there is no response at all.
    """
    collected = _Collected()
    counts: Counter[str] = Counter()
    prompts: set[int] = set()
    for group in groups:
        collected.add(group.known_scores, map(len, group.responses), group.sources)
        prompts.add(hash(repr(group.prompt)))
        texts: dict[str, set[float]] = {}
        for response, score in zip(group.responses, group.known_scores, strict=True):
            texts.setdefault(response, set()).add(score)
        near = _near_identical_pairs(texts)
        counts["without_order"] += len(set(group.known_scores)) < 2
        counts["empty"] += sum(not response.strip() for response in group.responses)
        counts["duplicates"] += len(group.responses) - len(texts)
        counts["conflicts"] += sum(len(scores) > 1 for scores in texts.values())
        counts["near"] += near
        counts["groups_near"] += near > 0
    numbers = collected.numbers()
    if not len(numbers.scores):
        raise UserError(f"none of the {len(numbers.sizes)} groups has a response, so there is nothing to describe.")
    longer = shorter = tied = 0
    for one, other in numbers.pairs():
        gap = numbers.scores[one] - numbers.scores[other]
        agreement = np.sign(gap) * np.sign(numbers.lengths[one] - numbers.lengths[other])
        longer, shorter = longer + int(np.sum(agreement > 0)), shorter + int(np.sum(agreement < 0))
        tied += int(np.sum(gap == 0))
    return RankedStatistics(
        groups=len(numbers.sizes),
        responses=len(numbers.scores),
        **numbers.of_scores(),
        pairs=numbers.num_pairs,
        tied_pairs=tied,
        groups_without_order=counts["without_order"],
        repeated_prompts=len(numbers.sizes) - len(prompts),
        length_correlation=numbers.rank_correlation(),
        longer_wins=longer / (longer + shorter) if longer + shorter else None,
        empty_responses=counts["empty"],
        duplicates=counts["duplicates"],
        conflicting_duplicates=counts["conflicts"],
        near_identical_pairs=counts["near"],
        groups_with_near_identical=counts["groups_near"],
        sources=_source_reports(numbers),
    )


def _near_identical_pairs(texts: Iterable[str]) -> int:
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    return sum(
        len(one & other) >= NEAR_IDENTICAL * len(one | other)
        for one, other in itertools.combinations(words, 2)
        if one and other
    )


def _source_reports(numbers: _Numbers) -> dict[str, SourceReport]:
    """Counted by source number; `best` is each source's best score in each group that it has a part in."""
    count = len(numbers.names)
    source, scores = numbers.sources, numbers.scores
    wins, losses, ties = (np.zeros(count, dtype=np.int64) for _ in range(3))
    for one, other in numbers.pairs():
        gap, others = scores[one] - scores[other], source[one] != source[other]
        for better, worse, ordered in ((one, other, others & (gap > 0)), (other, one, others & (gap < 0))):
            wins += np.bincount(source[better[ordered]], minlength=count)
            losses += np.bincount(source[worse[ordered]], minlength=count)
        for side in (one, other):
            ties += np.bincount(source[side[others & (gap == 0)]], minlength=count)
    group = np.repeat(np.arange(len(numbers.sizes)), numbers.sizes)
    both, index = np.unique(group * count + source, return_inverse=True)
    best = np.full(len(both), -math.inf)
    np.maximum.at(best, index, scores)
    of_source = both % count
    is_best = best == numbers.best[both // count]
    responses, groups = np.bincount(source, minlength=count), np.bincount(of_source, minlength=count)
    mean = np.bincount(source, scores, count) / responses
    std = np.sqrt(np.bincount(source, (scores - mean[source]) ** 2, count) / responses)
    mean_of_max, best_share = (
        np.bincount(of_source, best, count) / groups,
        np.bincount(of_source, is_best, count) / groups,
    )
    characters = np.bincount(source, numbers.lengths, count) / responses
    reports = {
        name: SourceReport(
            responses=int(responses[number]),
            groups=int(groups[number]),
            mean=float(mean[number]),
            std=float(std[number]),
            mean_of_max=float(mean_of_max[number]),
            best_share=float(best_share[number]),
            win_rate=float(wins[number] / ordered) if (ordered := wins[number] + losses[number]) else None,
            ties=int(ties[number]),
            mean_characters=float(characters[number]),
        )
        for number, name in enumerate(numbers.names)
    }
    return dict(sorted(reports.items(), key=lambda item: (-item[1].mean_of_max, -item[1].mean, item[0])))


# ---- Groups as token ids ----


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


def make_report(groups: Iterable[TokenizedGroup], counts: Mapping[str, Any], settings: dict[str, Any]) -> DataReport:
    """Describe the groups kept (at least one); `counts` holds what was counted on the way to them."""
    counts = {name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()}
    pairs_read, tied_read = counts.pop("pairs_read"), counts.pop("tied_pairs_read")
    count_of, score_of = counts.pop("responses_of"), counts.pop("score_of")
    collected, lengths, prompts = _Collected(), array("q"), set[int]()
    digest = hashlib.sha256()
    for group in groups:
        prompt = array("i", group.prompt_ids)
        lengths.append(len(prompt))
        prompts.add(hash(prompt.tobytes()))
        collected.add(group.scores, map(len, group.response_ids), group.sources)
        _add_to(digest, prompt, group)
    numbers, prompt_lengths = collected.numbers(), np.frombuffer(lengths, dtype=np.int64)
    responses = int(numbers.lengths.sum())
    tokens, plain = int(prompt_lengths.sum()) + responses, int(prompt_lengths @ numbers.sizes) + responses
    tied = ordered = 0
    for one, other in numbers.pairs():
        gap = np.abs(numbers.scores[one] - numbers.scores[other])
        tied, ordered = tied + int(np.sum(gap == 0)), ordered + int(np.sum(gap > settings["min_score_gap"]))
    by_count = sorted(count_of, key=lambda source: (-count_of[source], source))
    return DataReport(
        **counts,
        groups_kept=len(numbers.sizes),
        responses_kept=len(numbers.scores),
        repeated_prompts=len(numbers.sizes) - len(prompts),
        **numbers.of_scores(),
        pairs=numbers.num_pairs,
        ordered_pairs=ordered,
        tie_rate=tied / numbers.num_pairs if numbers.num_pairs else 0.0,
        tie_rate_read=tied_read / pairs_read if pairs_read else 0.0,
        score_length_correlation=numbers.rank_correlation(),
        prompt_tokens=percentiles(prompt_lengths),
        response_tokens=percentiles(numbers.lengths),
        tokens=tokens,
        tokens_plain=plain,
        sharing_saves=1 - tokens / plain,
        sources={one: {"count": count_of[one], "mean_score": score_of[one] / count_of[one]} for one in by_count},
        settings=settings,
        fingerprint=digest.hexdigest(),
    )


def percentiles(lengths: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Nearest-rank percentiles p10, p50, p90, p99 and max: lengths that occur, not interpolations between them."""
    values = np.percentile(lengths, [10, 50, 90, 99, 100], method="inverted_cdf")
    return dict(zip(("p10", "p50", "p90", "p99", "max"), map(int, values), strict=True))


def _add_to(digest: Any, prompt: array[int], group: TokenizedGroup) -> None:
    """Every list goes in with its length in front, so that no two different data sets read the same."""
    digest.update(struct.pack("<q", len(group.scores)))
    for packed in (prompt, *(array("i", ids) for ids in group.response_ids)):
        if sys.byteorder == "big":
            packed.byteswap()
        digest.update(struct.pack("<q", len(packed)) + packed.tobytes())
    digest.update(struct.pack(f"<{len(group.scores)}d", *group.scores))
    for source in group.sources:
        name = source.encode("utf-8")
        digest.update(struct.pack("<q", len(name)) + name)


# ---- The numbers of many groups ----


class _Collected:
    """What the statistics need of every group, as it goes by."""

    def __init__(self) -> None:
        self._sizes, self._scores, self._lengths, self._sources = array("q"), array("d"), array("q"), array("q")
        self._names: dict[str, int] = {}

    def add(self, scores: Sequence[float], lengths: Iterable[int], sources: Iterable[str]) -> None:
        self._sizes.append(len(scores))
        self._scores.extend(scores)
        self._lengths.extend(lengths)
        self._sources.extend(self._names.setdefault(source, len(self._names)) for source in sources)

    def numbers(self) -> _Numbers:
        return _Numbers(
            np.frombuffer(self._sizes, dtype=np.int64),
            np.frombuffer(self._scores, dtype=np.float64),
            np.frombuffer(self._lengths, dtype=np.int64),
            np.frombuffer(self._sources, dtype=np.int64),
            list(self._names),
        )


@dataclass(frozen=True)
class _Numbers:
    """Groups as flat arrays: `sizes` [G] is each group's k, the others [N] have an entry for each response.

    `sources` points into `names`.
    """

    sizes: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    names: list[str]

    @property
    def starts(self) -> np.ndarray:
        """int64 [G], where each group begins in the flat arrays."""
        return np.cumsum(self.sizes) - self.sizes

    @property
    def best(self) -> np.ndarray:
        """float64 [G], the best score of each group; -inf where it has none."""
        best = np.full(len(self.sizes), -math.inf)
        best[self.sizes > 0] = np.maximum.reduceat(self.scores, self.starts[self.sizes > 0])
        return best

    @property
    def num_pairs(self) -> int:
        return int(np.sum(self.sizes * (self.sizes - 1) // 2))

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where both responses of every pair stand: for all groups of a size at once, one pair of positions a time."""
        for k in np.unique(self.sizes):
            first = self.starts[self.sizes == k]
            for one, other in itertools.combinations(range(int(k)), 2):
                yield first + one, first + other

    def of_scores(self) -> dict[str, Any]:
        """The histogram of k and the scores' moments, as both reports name them."""
        return {
            "k_histogram": dict(sorted(Counter(self.sizes.tolist()).items())),
            "score_mean": float(self.scores.mean()),
            "score_std": float(self.scores.std()),
            "score_mean_of_max": float(self.best[self.sizes > 0].mean()),
        }

    def rank_correlation(self) -> float | None:
        """Mean over groups of Spearman's correlation of scores and lengths; ties share their mean rank.

        Groups in which either has a single value do not count; None where no group counts.
        """
        total, groups = 0.0, 0
        for k in np.unique(self.sizes):
            first = self.starts[self.sizes == k]
            for part in np.array_split(first, len(first) // 50_000 + 1):
                rows = part[:, None] + np.arange(k)  # [some groups of this size, k]
                one, other = (rankdata(values[rows], axis=1) - (k + 1) / 2 for values in (self.scores, self.lengths))
                spread = np.sqrt(np.sum(one * one, axis=1) * np.sum(other * other, axis=1))
                counts = spread > 0
                total += float(np.sum(np.sum(one * other, axis=1)[counts] / spread[counts]))
                groups += int(np.sum(counts))
        return total / groups if groups else None


# ---- As tables that read at 80 columns, with or without colour ----

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
    rows = ((name, f"{of['count']:,}", _number(of["mean_score"])) for name, of in report.sources.items())
    return Group(*facts_table("Data report", _facts(report)), _source_table(("responses", "mean score"), rows))


def statistics_table(statistics: RankedStatistics) -> RenderableType:
    """A table of facts, and one of sources."""
    rows = (
        (
            name,
            f"{of.responses:,}",
            *map(_number, (of.mean, of.std, of.mean_of_max)),
            *map(_percent, (of.best_share, of.win_rate)),
            f"{of.mean_characters:,.0f}",
        )
        for name, of in statistics.sources.items()
    )
    legend = Text(
        "max: mean of its best score in a group. best: share of its groups in which it has the best score, alone or "
        "tied. wins: share of its untied pairs with other sources.",
        style="dim",
    )
    names = ("responses", "mean", "std", "max", "best", "wins", "characters")
    return Group(*facts_table("Ranked data", _facts_as_read(statistics)), _source_table(names, rows), Text(), legend)


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> list[RenderableType]:
    """Name and fact in two columns, under a title; the other reports of data have this shape too."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    return [Text(title, style="bold underline"), table, Text()]


def _source_table(names: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table("source", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(rows)
    for source, *numbers in rows[:_SOURCES_SHOWN]:
        table.add_row(Text(source), *numbers)
    if len(rows) > _SOURCES_SHOWN:
        table.add_row(f"and {len(rows) - _SOURCES_SHOWN:,} more")
    return table


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
    facts += [
        ("k, responses", _histogram(r.k_histogram)),
        ("scores", f"mean {_number(r.score_mean)}, std {_number(r.score_std)}"),
        ("", f"mean of each group's best {_number(r.score_mean_of_max)} (the policy's reward approaches it)"),
        ("", f"rank correlation with length {_signed(r.score_length_correlation)} (Spearman, mean over groups)"),
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


def _facts_as_read(statistics: RankedStatistics) -> list[tuple[str, str]]:
    s = statistics
    tied = _percent(s.tied_pairs / s.pairs if s.pairs else None)
    groups_near = f"{s.groups_with_near_identical:,} group{'' if s.groups_with_near_identical == 1 else 's'}"
    facts = [
        ("groups", f"{s.groups:,}, with {s.responses:,} responses"),
        ("k, responses", _histogram(s.k_histogram)),
        ("scores", f"mean {_number(s.score_mean)}, std {_number(s.score_std)}"),
        ("", f"mean of each group's best {_number(s.score_mean_of_max)}"),
        ("pairs", f"{s.pairs:,}, of which {s.tied_pairs:,} tied ({tied})"),
        ("", f"{s.groups_without_order:,} groups have no two different scores"),
        ("length bias", f"rank correlation of score and characters {_signed(s.length_correlation)}"),
        ("", f"the longer response wins {_percent(s.longer_wins)} of the untied pairs"),
        ("repetition", f"{s.duplicates:,} responses repeat another of their group"),
        ("", f"{s.near_identical_pairs:,} pairs share {NEAR_IDENTICAL:.0%} of their words, in {groups_near}"),
    ]
    if s.conflicting_duplicates:
        facts.append(("", f"{s.conflicting_duplicates:,} equal texts have different scores in one group"))
    if s.empty_responses:
        facts.append(("empty", f"{s.empty_responses:,} responses are white space only"))
    if s.repeated_prompts:
        facts.append(("prompts", f"{s.repeated_prompts:,} groups repeat the prompt of an earlier one"))
    return facts


def _prompt_limit(limit: int | None) -> str:
    return "the longest response comes first, up to half" if limit is None else f"limit {limit:,}"


def _in_brackets(how: dict[str, int]) -> str:
    return f" ({'; '.join(f'{count:,} {_HOW[name]}' for name, count in how.items())})" if how else ""


def _histogram(counts: dict[int, int]) -> str:
    parts = [f"{k} in {count:,}" for k, count in sorted(counts.items(), reverse=True)]
    return ", ".join([parts[0] + " groups", *parts[1:8]]) + (" ..." if len(parts) > 8 else "")


def _in_percentiles(values: dict[str, int]) -> str:
    return "  ".join(f"{name} {value:,}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"
