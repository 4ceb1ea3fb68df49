"""A group from responses of which some may have no rating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrhf_peft.records import Message, RankedGroup

#: Key of `RankedGroup.meta` under which the responses without a rating are kept.
UNRATED = "unrated"


def rated_group(
    prompt: str | list[Message],
    responses: Sequence[str],
    ratings: Sequence[float | None],
    sources: Sequence[str],
    meta: dict[str, Any],
) -> RankedGroup:
    """The group of those responses that have a rating, which is their score.

    The others are not made up a number for: they stand in ``meta["unrated"]``, each with `response` and
    `source`. A group may so have a single response, or none.
    """
    entries = list(zip(responses, ratings, sources, strict=True))
    rated = [(response, rating, source) for response, rating, source in entries if rating is not None]
    unrated = [{"response": response, "source": source} for response, rating, source in entries if rating is None]
    if unrated:
        meta = {**meta, UNRATED: unrated}
    return RankedGroup(
        prompt,
        [response for response, _, _ in rated],
        [rating for _, rating, _ in rated],
        [source for _, _, source in rated],
        meta,
    )


def score_of_rank(rank: float | None) -> float | None:
    """A rank, lower is better, as a score, higher is better; equal ranks stay a tie."""
    return None if rank is None else 0.0 - rank


def numbered_sources(count: int) -> list[str]:
    """Names for responses whose writers the file does not tell: their places in its list."""
    return [f"response-{place}" for place in range(count)]
