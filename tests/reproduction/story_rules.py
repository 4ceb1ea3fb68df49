"""A rule for a model whose text means nothing: it gives nearly every text another score."""

from __future__ import annotations


def letters(prompt: str, responses: list[str]) -> list[float]:
    """Between 0 and 1, from all letters of the response."""
    return [sum(place * ord(letter) for place, letter in enumerate(text, start=1)) % 97 / 96 for text in responses]
