"""What a judge writes, read strictly: one JSON object with everything asked for, or no score at all.

Nothing is guessed from a reply that breaks the form: a score out of the scale, a missing aspect or a
rank given twice is a `BadReplyError` with the reason, which is counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any


class BadReplyError(Exception):
    """A reply that does not answer the question; the message says what is wrong with it, in a few words."""


def parse_aspects(reply: str, aspects: Sequence[str], low: float, high: float) -> dict[str, float]:
    """``{"relevance": 7, ...}`` -> the score of each aspect.

    Raises:
        BadReplyError: not JSON, an aspect is missing or no number, or a number is outside [low, high].
    """
    values = _object(reply)
    missing = [aspect for aspect in aspects if aspect not in values]
    if missing:
        raise BadReplyError("missing aspect")
    for aspect in aspects:
        if isinstance(values[aspect], bool) or not isinstance(values[aspect], (int, float)):
            raise BadReplyError("aspect is no number")
        if not math.isfinite(values[aspect]) or not low <= values[aspect] <= high:
            raise BadReplyError("aspect outside the scale")
    return {aspect: float(values[aspect]) for aspect in aspects}


def parse_ranks(reply: str, labels: Sequence[str]) -> list[int]:
    """``{"ranks": {"A": 2, "B": 1, ...}}`` -> the rank of each label, 1 is best, equal ranks are ties.

    Both ways of counting after a tie are ranks: 1 2 2 3 and 1 2 2 4.

    Raises:
        BadReplyError: not JSON, a response without a rank or an unknown one, or numbers that are no ranking.
    """
    ranks = _object(reply).get("ranks")
    if not isinstance(ranks, dict):
        raise BadReplyError("no ranks")
    if set(ranks) != set(labels):
        raise BadReplyError("ranks of other responses than asked for")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks.values()):
        raise BadReplyError("rank is no whole number")
    given = sorted(ranks.values())
    dense = {rank: place for place, rank in enumerate(sorted(set(given)), start=1)}
    skipping = {rank: given.index(rank) + 1 for rank in given}
    if any(dense[rank] != rank for rank in given) and any(skipping[rank] != rank for rank in given):
        raise BadReplyError("numbers that are no ranking")
    return [ranks[label] for label in labels]


def _object(reply: str) -> dict[str, Any]:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", reply, flags=re.DOTALL)
    try:
        values = json.loads(fenced.group(1) if fenced else reply, object_pairs_hook=_without_repeats)
    except ValueError:
        raise BadReplyError("not JSON") from None
    if not isinstance(values, dict):
        raise BadReplyError("not a JSON object")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise BadReplyError("key given twice")
    return dict(pairs)
