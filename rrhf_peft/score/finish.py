"""All raw scores into the scored groups: combined, failures set apart, reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rrhf_peft.recipe.scoring import CompositeScorer
from rrhf_peft.records import RankedGroup
from rrhf_peft.score.combining import NORMALIZATIONS, least, reward_under_cost, weighted_sum
from rrhf_peft.score.report import ScoreReport, make_report
from rrhf_peft.score.scorers import GroupScores

#: Fewer scored responses than this compare nothing, and are nothing to train on.
LEAST_RESPONSES = 2


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
        Scored rows have the responses that every scorer scored. A group with an unscored response has a
        failure row: all of its responses, with the reasons; it can be read as candidates again.
    """
    final = combined(raw, scorer)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    kept: list[tuple[list[float], list[str]]] = []
    reasons: list[str] = []
    lost = 0
    for group, own_raw, scores in zip(groups, raw, final, strict=True):
        own_reasons = _reasons(own_raw)
        reasons += own_reasons.values()
        places = [place for place, score in enumerate(scores) if score is not None]
        is_kept = len(places) >= least_responses
        if is_kept:
            row = _scored_row(group, own_raw, scores, places)
            rows.append(row)
            kept.append((row["scores"], row["sources"]))
        else:
            lost += len(places)
        if own_reasons or not is_kept:
            failed.append(_failure_row(group, own_raw, own_reasons, is_kept))
    report = make_report(
        kept,
        groups=len(groups),
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
    """
    if not isinstance(scorer, CompositeScorer):
        return [own[scorer.name].scores for own in raw]
    parts = {
        label: NORMALIZATIONS[part.normalize]([own[label].scores for own in raw])
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
    for label, own in raw.items():
        for place, reason in own.failures.items():
            reasons.setdefault(place, reason if len(raw) == 1 else f"{label}: {reason}")
    return reasons


def _raw_columns(group: RankedGroup, raw: Mapping[str, GroupScores]) -> dict[str, Sequence[float | None]]:
    columns: dict[str, Sequence[float | None]] = dict(group.columns["raw_scores"])
    for label, own in raw.items():
        columns[label] = own.scores
        columns.update({f"{label}.{aspect}": scores for aspect, scores in own.aspects.items()})
    return columns


def _scored_row(
    group: RankedGroup, raw: Mapping[str, GroupScores], scores: Sequence[float | None], places: Sequence[int]
) -> dict[str, Any]:
    """The row of the output.

    Where responses are left out, `meta.kept` tells the places of the others in the input, and what sampling
    says of each response (`meta.candidates`) goes with its response.
    """
    meta = dict(group.columns["meta"])
    if len(places) < len(group.responses):
        meta["kept"] = list(places)
        about = meta.get("candidates")
        if isinstance(about, list) and len(about) == len(group.responses):
            meta["candidates"] = [about[place] for place in places]
    return {
        "prompt": group.prompt,
        "responses": [group.responses[place] for place in places],
        "scores": [scores[place] for place in places],
        "sources": [group.sources[place] for place in places],
        "raw_scores": {name: [column[place] for place in places] for name, column in _raw_columns(group, raw).items()},
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
        "left_out": {str(place): reason for place, reason in reasons.items()},
        "group_kept": is_kept,
        "meta": group.columns["meta"],
    }
