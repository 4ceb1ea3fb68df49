"""Rules that recipes in tests name."""

from __future__ import annotations

import time


def slow_length(prompt: str, responses: list[str]) -> list[float]:
    """Length, after a little thought."""
    time.sleep(0.01)
    return [float(len(response)) for response in responses]


def cost(prompt: str, responses: list[str]) -> list[float]:
    """How often a response says "a"."""
    return [float(response.count("a")) for response in responses]


def small_letters(prompt: str, responses: list[str]) -> list[float]:
    """The share of characters that are small letters of the alphabet."""
    return [sum("a" <= letter <= "z" for letter in response) / max(len(response), 1) for response in responses]
