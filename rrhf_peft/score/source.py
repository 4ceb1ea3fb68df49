"""Score a response by who wrote it: a human's answer above the policy's own, as SPIN (arXiv 2401.01335) ranks them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from rrhf_peft.records import UserError


def source_score(source: str, scores: Mapping[str, float]) -> float:
    """The score of the first pattern that matches a source name.

    Args:
        source: name from the sources column, such as ``top_p:round-1``.
        scores: shell-style pattern (``*``, ``?``, ``[ab]``; upper and lower case differ) -> score.

    Raises:
        UserError: no pattern matches.
    """
    for pattern, score in scores.items():
        if fnmatchcase(source, pattern):
            return score
    raise UserError(
        f"scoring.scorer.scores: no pattern matches the source {source!r} (there are: {', '.join(scores)}). Add one "
        'for it, or end the list with "*" and the score of all others.'
    )
