"""A rule that works, and rules that do not."""

from __future__ import annotations

import sys
from typing import Any


def length(prompt: str, responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def raises(prompt: str, responses: list[str]) -> list[float]:
    raise KeyError("no such thing\x1b[31m")


def leaves(prompt: str, responses: list[str]) -> list[float]:
    sys.exit(0)


def too_few(prompt: str, responses: list[str]) -> list[float]:
    return [1.0]


def returns_text(prompt: str, responses: list[str]) -> Any:
    return "12" * len(responses)


def returns_strings(prompt: str, responses: list[str]) -> Any:
    return ["good"] * len(responses)


def returns_nothing(prompt: str, responses: list[str]) -> Any:
    return None


def returns_sets(prompt: str, responses: list[str]) -> Any:
    return set(range(len(responses)))


def returns_a_mapping(prompt: str, responses: list[str]) -> Any:
    return dict.fromkeys(responses, 1.0)


def returns_nan(prompt: str, responses: list[str]) -> Any:
    return [float("nan")] * len(responses)


def returns_infinity(prompt: str, responses: list[str]) -> Any:
    return [float("inf")] * len(responses)


not_callable = 3
