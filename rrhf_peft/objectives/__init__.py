"""Objectives: pure losses over `ResponseLogProbs`. To add one: a function, a line here, a recipe section, a test."""

from collections.abc import Callable
from typing import Any

from rrhf_peft.objectives.rrhf import rrhf
from rrhf_peft.objectives.sft import sft

#: Name in a recipe -> `(log_probs, scores, *, reference=None, **hyper) -> (loss, metrics)`.
OBJECTIVES: dict[str, Callable[..., Any]] = {
    "rrhf": rrhf,
    "sft": sft,
}

#: Objectives that learn from ordered pairs: a group without one teaches them nothing.
NEEDS_PAIRS = frozenset({"rrhf"})

__all__ = ["NEEDS_PAIRS", "OBJECTIVES", "rrhf", "sft"]
