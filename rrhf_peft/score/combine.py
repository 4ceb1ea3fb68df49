"""Candidates in; raw scores into the scored groups: each part normalised, all combined, failures set apart, a report.

None stands for a response that could not be scored; whatever is made from it is None too.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rrhf_peft.data import read_groups
from rrhf_peft.records import LARGEST_SCORE, RankedGroup, UserError

if TYPE_CHECKING:  # the ranking page, which computes shares too, need not wait for the recipe's imports
    from rrhf_peft.recipe.stages import CompositeScorer

#: Fewer scored responses than this compare nothing, and are nothing to train on.
LEAST_RESPONSES = 2


@dataclass
class GroupScores:
    """What one scorer says of one group.

    Attributes:
        scores: one per response, higher is better; None where there is none.
        failures: response index -> why there is none.
        aspects: further scores to keep with the raw ones, by name.
        counts: for the report: requests, tokens, truncated texts ...
    """

    scores: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    aspects: dict[str, list[float | None]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def read_candidates(
    where: str | Sequence[str], *, format: str = "auto", split: str = "train", max_groups: int | None = None
) -> list[RankedGroup]:
    """Read all groups of all sources, in order.

    A file whose first row has responses and no scores holds candidates; all others are ranked data.

    Returns:
        Groups, some perhaps without responses, whose `columns` are `raw_scores`, the scores that the input brought
        along by name, its own column being ``input``; and `meta`, whatever else the input said.

    Raises:
        UserError: names file, line and field; or there is nothing to score.
    """
    groups = read_groups(where, format=format, split=split, max_groups=max_groups, needs="responses")
    if not any(group.responses for group in groups):
        raise UserError(
            f"none of the {len(groups)} groups has a response to score or rank. Name a file with prompts and responses."
        )
    return [replace(group, columns=_columns(group)) for group in groups]


def columns_of(group: RankedGroup) -> dict[str, Any]:
    """What else the group's row said; candidates that were read to be scored hold it under `meta`."""
    meta = group.columns.get("meta")
    rest = {name: value for name, value in group.columns.items() if name not in ("meta", "raw_scores")}
    return {**(meta if isinstance(meta, dict) else {}), **rest}


#: Columns that stand elsewhere in the output.
_NOT_META = ("raw_scores", "meta", "left_out", "group_kept")


def _columns(group: RankedGroup) -> dict[str, Any]:
    meta = {name: value for name, value in group.columns.items() if name not in _NOT_META}
    nested = group.columns.get("meta")
    meta.update(nested if isinstance(nested, dict) else {})
    raw = _raw_scores(group.columns.get("raw_scores"), len(group.responses))
    if group.responses and None not in group.scores:
        raw["input"] = list(group.known_scores)
    return {"raw_scores": raw, "meta": meta}


def _raw_scores(value: Any, count: int) -> dict[str, list[float]]:
    """Earlier raw scores that are complete; a column that lacks one says nothing that could be kept."""
    if not isinstance(value, dict):
        return {}
    return {
        name: [float(score) for score in scores]
        for name, scores in value.items()
        if isinstance(scores, list)
        and len(scores) == count
        and all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores)
    }


def finished_rows(
    groups: Sequence[RankedGroup],
    raw: Sequence[Mapping[str, GroupScores]],
    scorer: Any,
    counts: Mapping[str, int],
    agreement: Mapping[str, dict[str, Any]],
    least_responses: int = LEAST_RESPONSES,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], ScoreReport]:
    """(scored rows, failure rows, report).

    Args:
        groups: all groups, in order.
        raw: for each group, label -> what that scorer said.
        scorer: the recipe's scorer section.
        counts: the scorers' totals.
        agreement: of annotators, by label.
        least_responses: groups with fewer scored responses are not kept.

    Returns:
        Scored rows have the responses that every scorer scored. A group with an unscored response, and one
        without responses, has a failure row: all of its responses, with the reasons; it can be read as
        candidates again.

    Raises:
        UserError: a combined score is no number any more.
    """
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    kept: list[tuple[list[float], list[str]]] = []
    reasons: list[str] = []
    lost = 0
    for group, group_raw, scores in zip(groups, raw, combined(raw, scorer), strict=True):
        group_reasons = _reasons(group_raw)
        reasons += group_reasons.values()
        scored = [index for index, score in enumerate(scores) if score is not None]
        is_kept = len(scored) >= least_responses
        if is_kept:
            row = _scored_row(group, group_raw, scores, scored)
            rows.append(row)
            kept.append((row["scores"], row["sources"]))
        else:
            lost += len(scored)
        if group_reasons or not is_kept:
            failed.append(_failure_row(group, group_raw, group_reasons, is_kept))
    report = make_report(
        kept,
        groups=len(groups),
        groups_without_responses=sum(not group.responses for group in groups),
        responses=sum(len(group.responses) for group in groups),
        reasons=reasons,
        lost_with_group=lost,
        counts=dict(Counter(counts)),
        agreement=dict(agreement),
    )
    return rows, failed, report


def combined(raw: Sequence[Mapping[str, GroupScores]], scorer: Any) -> list[list[float | None]]:
    """The final score of every response, None where a scorer has none; one list for each group.

    Args:
        raw: for each group, label -> what that scorer said; a scorer that stands alone has its name as label.
        scorer: the recipe's scorer section.

    Raises:
        UserError: a combined score is no number any more.
    """
    if scorer.name == "composite":
        scores = _composite(raw, scorer)
    else:
        scores = [labelled[scorer.name].scores for labelled in raw]
    for index, group in enumerate(scores):
        if too_large := [score for score in group if score is not None and not abs(score) <= LARGEST_SCORE]:
            raise UserError(
                f"scoring.scorer: the score of a response of group {index} (from 0) is {too_large[0]}, beyond "
                f"{LARGEST_SCORE:g}. Scale the scores or the parts' weights, or set normalize: rank or zscore."
            )
    return scores


def _composite(raw: Sequence[Mapping[str, GroupScores]], scorer: CompositeScorer) -> list[list[float | None]]:
    parts = {
        label: NORMALIZATIONS[part.normalize]([labelled[label].scores for labelled in raw])
        for label, part in scorer.parts.items()
    }
    if scorer.how == "weighted_sum":
        return weighted_sum(parts, {label: part.weight for label, part in scorer.parts.items()})
    if scorer.how == "min":
        return least(parts)
    assert scorer.reward is not None
    assert scorer.cost is not None
    assert scorer.cost_limit is not None
    return reward_under_cost(parts, scorer.reward, scorer.cost, scorer.cost_limit)


def _reasons(raw: Mapping[str, GroupScores]) -> dict[int, str]:
    """Response index -> why it has no score, from the first scorer that failed on it."""
    reasons: dict[int, str] = {}
    for label, scores in raw.items():
        for index, reason in scores.failures.items():
            reasons.setdefault(index, reason if len(raw) == 1 else f"{label}: {reason}")
    return reasons


def _raw_columns(group: RankedGroup, raw: Mapping[str, GroupScores]) -> dict[str, Sequence[float | None]]:
    columns: dict[str, Sequence[float | None]] = dict(group.columns["raw_scores"])
    for label, group_scores in raw.items():
        columns[label] = group_scores.scores
        columns.update({f"{label}.{aspect}": scores for aspect, scores in group_scores.aspects.items()})
    return columns


def _scored_row(
    group: RankedGroup, raw: Mapping[str, GroupScores], scores: Sequence[float | None], kept: Sequence[int]
) -> dict[str, Any]:
    """The row of the output, of the responses with the indices `kept`.

    Where responses are left out, `meta.kept` tells those indices, and what sampling says of each response
    (`meta.candidates`) goes with its response.
    """
    meta = dict(group.columns["meta"])
    if len(kept) < len(group.responses):
        meta["kept"] = list(kept)
        about = meta.get("candidates")
        if isinstance(about, list) and len(about) == len(group.responses):
            meta["candidates"] = [about[index] for index in kept]
    return {
        **replace(group, scores=scores).choose(kept).row(),
        "raw_scores": {name: [column[index] for index in kept] for name, column in _raw_columns(group, raw).items()},
        "meta": meta,
    }


def _failure_row(
    group: RankedGroup, raw: Mapping[str, GroupScores], reasons: Mapping[int, str], is_kept: bool
) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "responses": group.responses,
        "sources": group.sources,
        "raw_scores": _raw_columns(group, raw),
        "left_out": {str(index): reason for index, reason in reasons.items()},
        "group_kept": is_kept,
        "meta": group.columns["meta"],
    }


# ---- scores of several scorers into one ----

#: Scores of every group of the data, None where there is none.
Scores = Sequence[Sequence[float | None]]


def share_beaten(scores: Sequence[float | None]) -> list[float | None]:
    """Per response of one group, the share of the other scored responses that it beats, a tie counting half.

    Between 0 and 1 whatever k is; 0.5 for a response that is alone.
    """
    known = [score for score in scores if score is not None]
    others = len(known) - 1

    def share(score: float) -> float:
        below = sum(other < score for other in known)
        equal = sum(other == score for other in known) - 1
        return (below + equal / 2) / others if others else 0.5

    return [None if score is None else share(score) for score in scores]


def _unchanged(scores: Scores) -> list[list[float | None]]:
    return [list(group) for group in scores]


def _zscore(scores: Scores) -> list[list[float | None]]:
    """Mean 0 and standard deviation 1 over all responses of the data; all 0 where they are all equal."""
    known = [score for group in scores for score in group if score is not None]
    if not known:
        return _unchanged(scores)
    mean = math.fsum(known) / len(known)
    deviation = statistics.pstdev(known)
    return [
        [None if score is None else (score - mean) / deviation if deviation else 0.0 for score in group]
        for group in scores
    ]


def _rank(scores: Scores) -> list[list[float | None]]:
    return [share_beaten(group) for group in scores]


#: Name in a recipe -> what it makes of one scorer's scores.
NORMALIZATIONS: dict[str, Callable[[Scores], list[list[float | None]]]] = {
    "none": _unchanged,
    "zscore": _zscore,
    "rank": _rank,
}


def weighted_sum(parts: Mapping[str, Scores], weights: Mapping[str, float]) -> list[list[float | None]]:
    """Sum of weight times score over the parts."""
    return _each(parts, lambda scores: math.fsum(weights[label] * score for label, score in scores.items()))


def least(parts: Mapping[str, Scores]) -> list[list[float | None]]:
    """The worst of a response's scores."""
    return _each(parts, lambda scores: min(scores.values()))


def reward_under_cost(parts: Mapping[str, Scores], reward: str, cost: str, limit: float) -> list[list[float | None]]:
    """The reward of responses within the cost limit; the others lie below all of these, the costlier the lower.

    Safe RLHF (https://arxiv.org/abs/2310.12773) asks for the greatest reward among responses of bounded
    cost. A response over the limit gets ``floor - (cost - limit)``, with floor the least reward of the data.
    """
    known = [score for group in parts[reward] for score in group if score is not None]
    floor = min(known, default=0.0)
    return _each(
        {reward: parts[reward], cost: parts[cost]},
        lambda scores: scores[reward] if scores[cost] <= limit else floor - (scores[cost] - limit),
    )


def _each(parts: Mapping[str, Scores], combine: Callable[[dict[str, float]], float]) -> list[list[float | None]]:
    """`combine` over the scores of each response, by label, where all are there."""
    combined: list[list[float | None]] = []
    for group in zip(*parts.values(), strict=True):
        combined.append([])
        for scores in zip(*group, strict=True):
            known = {label: score for label, score in zip(parts, scores, strict=True) if score is not None}
            combined[-1].append(combine(known) if len(known) == len(parts) else None)
    return combined


# ---- the report ----


@dataclass(frozen=True)
class ScoreReport:
    """Numbers about the groups kept, except where they say otherwise.

    Attributes:
        groups: groups read.
        groups_without_responses: those among them that hold no response, as sampling leaves where it got no answer.
        groups_kept: groups with at least two scored responses: those of the output.
        responses: responses read.
        responses_kept: responses in the output.
        failures: reason -> responses without a score, those of groups not kept included.
        lost_with_group: responses that have a score, in groups not kept.
        mean: score over all responses.
        std: population standard deviation.
        mean_of_max: mean over groups of the best score, which a trained policy's reward approaches
            (arXiv 2304.05302).
        pairs: pairs of responses within groups.
        tied_pairs: those with equal scores.
        sources: source -> count, mean, std, mean_of_max (over groups, of this source's best) and best_share
            (share of the groups it is in where it has the best score; a tie of n sources counts 1/n for each).
        counts: the scorers' own totals: requests, retries, truncated texts ...
        agreement: of human annotators, by scorer.
    """

    groups: int
    groups_without_responses: int
    groups_kept: int
    responses: int
    responses_kept: int
    failures: dict[str, int]
    lost_with_group: int
    mean: float | None
    std: float | None
    mean_of_max: float | None
    pairs: int
    tied_pairs: int
    sources: dict[str, dict[str, float]]
    counts: dict[str, int]
    agreement: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def __rich__(self) -> Group:
        return Group(self._sources_table(), Text("\n".join(self._lines())))

    def _sources_table(self) -> Table:
        table = Table("source", "responses", "mean", "std", "mean of max", "best of group")
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        for source, values in self.sources.items():
            numbers = (f"{values[name]:.3f}" for name in ("mean", "std", "mean_of_max"))
            table.add_row(source, f"{values['count']:,.0f}", *numbers, f"{values['best_share']:.0%}")
        return table

    def _lines(self) -> Iterable[str]:
        responses = f"responses: {self.responses_kept:,} of {self.responses:,}"
        yield f"groups kept: {self.groups_kept:,} of {self.groups:,}; {responses}"
        if self.mean is not None:
            yield f"score: mean {self.mean:.3f}, std {self.std:.3f}, mean of group maximum {self.mean_of_max:.3f}"
            yield f"ties: {self.tied_pairs:,} of {self.pairs:,} pairs"
        if self.groups_without_responses:
            yield f"groups without responses, set apart: {self.groups_without_responses:,}"
        for reason, count in self.failures.items():
            yield f"not scored: {count:,} ({reason})"
        if self.lost_with_group:
            yield f"scored, but in groups with fewer than two scores: {self.lost_with_group:,}"
        if any(self.counts.values()):
            yield ", ".join(f"{name} {count:,}" for name, count in self.counts.items() if count)
        for label, agreement in self.agreement.items():
            numbers = (
                f"{name.replace('_', ' ')} {'not defined' if agreement[name] is None else f'{agreement[name]:.3f}'}"
                for name in ("same", "no_contradiction", "alpha")
            )
            yield f"{label}: agreement over {agreement['comparisons']:,} comparisons: {', '.join(numbers)}"


def make_report(
    kept: Sequence[tuple[list[float], list[str]]],
    *,
    groups: int,
    groups_without_responses: int,
    responses: int,
    reasons: Iterable[str],
    lost_with_group: int,
    counts: dict[str, int],
    agreement: dict[str, dict[str, Any]],
) -> ScoreReport:
    """The report over (scores, sources) of the groups kept."""
    scores = [score for group_scores, _ in kept for score in group_scores]
    return ScoreReport(
        groups=groups,
        groups_without_responses=groups_without_responses,
        groups_kept=len(kept),
        responses=responses,
        responses_kept=len(scores),
        failures=dict(Counter(reasons).most_common()),
        lost_with_group=lost_with_group,
        mean=_mean(scores) if scores else None,
        std=statistics.pstdev(scores) if scores else None,
        mean_of_max=_mean([max(group_scores) for group_scores, _ in kept]) if kept else None,
        pairs=sum(math.comb(len(group_scores), 2) for group_scores, _ in kept),
        tied_pairs=sum(math.comb(count, 2) for group_scores, _ in kept for count in Counter(group_scores).values()),
        sources=_by_source(kept),
        counts=counts,
        agreement=agreement,
    )


def _by_source(kept: Sequence[tuple[list[float], list[str]]]) -> dict[str, dict[str, float]]:
    scores: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    best_of_group: dict[str, float] = {}
    for group_scores, sources in kept:
        highest: dict[str, float] = {}
        for score, source in zip(group_scores, sources, strict=True):
            scores.setdefault(source, []).append(score)
            highest[source] = max(score, highest.get(source, score))
        for source, score in highest.items():
            best.setdefault(source, []).append(score)
        winners = [source for source, score in highest.items() if score == max(group_scores)]
        for source in winners:
            best_of_group[source] = best_of_group.get(source, 0.0) + 1 / len(winners)
    return {
        source: {
            "count": len(values),
            "mean": _mean(values),
            "std": statistics.pstdev(values),
            "mean_of_max": _mean(best[source]),
            "best_share": best_of_group.get(source, 0.0) / len(best[source]),
        }
        for source, values in sorted(scores.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
