"""The demo's reward: how cheerful a text is, by a small lexicon. A stand-in for a reward model.

Each word counts once however often it is repeated, so that saying "happy" ten times earns no more
than saying it once. Named in a scoring rule as `rrhf_peft.demo.cheerfulness:cheerfulness`.
"""

from __future__ import annotations

import re

CHEERFUL = frozenset(
    """
    beautiful beautifully best bloomed bright cheered cheerful danced delicious delight dreams feast
    fun friend friends glad gold golden good great happy hug joy kind laughed lovely loved merry
    perfect proud purred safe sang shared smile smiled strong sun sweet thanked treasure warm
    won wonderful
    """.split()
)
GLOOMY = frozenset(
    """
    afraid alone angry badly bitter broke broken burned cold cried cruel dark empty fell gloomy gone
    hungry hurt leaked lost nobody quarrel ruined sad sank sick smoke spilled storm terrible
    thief thorn tired ugly wept withered worst wrong
    """.split()
)


def cheerfulness(prompt: str, responses: list[str]) -> list[float]:
    """Score each response between -1 (gloomy) and 1 (cheerful); 0 is neither.

    The score is (c - g) / (c + g + 1), where c and g are the numbers of different cheerful and gloomy
    words. The prompt is not judged: it is the same for all of them.
    """
    return [_cheerfulness(response) for response in responses]


def _cheerfulness(text: str) -> float:
    words = set(re.findall(r"[a-z]+", text.lower()))
    cheerful, gloomy = len(words & CHEERFUL), len(words & GLOOMY)
    return (cheerful - gloomy) / (cheerful + gloomy + 1)
