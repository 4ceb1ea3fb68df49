"""Rules that recipes in tests name."""

from __future__ import annotations

import gc
import sys
import time

from transformers import PreTrainedModel


def slow_length(prompt: str, responses: list[str]) -> list[float]:
    """Length, after a little thought."""
    time.sleep(0.01)
    return [float(len(response)) for response in responses]


def cost(prompt: str, responses: list[str]) -> list[float]:
    """How often a response says "a"."""
    return [float(response.count("a")) for response in responses]


def skips_b(prompt: str, responses: list[str]) -> list[float | None]:
    """Length, and nothing where there is a "b"."""
    return [None if "b" in response else float(len(response)) for response in responses]


def skips_all(prompt: str, responses: list[str]) -> list[None]:
    """Nothing."""
    return [None for _ in responses]


def stops_at_messages(prompt: str, responses: list[str]) -> list[float]:
    """Length, until the second prompt comes."""
    if prompt == "hé?":
        sys.exit(0)
    return [float(len(response)) for response in responses]


def small_letters(prompt: str, responses: list[str]) -> list[float]:
    """The share of characters that are small letters of the alphabet."""
    return [sum("a" <= letter <= "z" for letter in response) / max(len(response), 1) for response in responses]


def ties_in_the_first_group(prompt: str, responses: list[str]) -> list[float]:
    """Nothing to learn from the prompt "0 "."""
    return [0.0 if prompt == "0 " else float(index) for index in range(len(responses))]


#: How many models there were whenever `counting_live_models` scored the prompt "0 ".
LIVE_MODELS: list[int] = []


def counting_live_models(prompt: str, responses: list[str]) -> list[float]:
    """Small letters, and a look at what is in memory."""
    if prompt == "0 ":  # looking takes a while
        LIVE_MODELS.append(sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()))
    return small_letters(prompt, responses)
