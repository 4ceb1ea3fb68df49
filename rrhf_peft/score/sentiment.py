"""VADER sentiment as a rule (`rrhf_peft.score:vader`), behind the extra `vader`.

Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
"""

from __future__ import annotations

import functools
from typing import Any

from rrhf_peft.records import UserError


def vader(prompt: str, responses: list[str]) -> list[float]:
    """The compound sentiment of each response, between -1 and 1; the prompt is not judged.

    Raises:
        UserError: vaderSentiment is not installed.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise UserError(
            "The rule rrhf_peft.score:vader needs a package that is not installed: pip install 'rrhf-peft[vader]'."
        ) from None
    return SentimentIntensityAnalyzer()
