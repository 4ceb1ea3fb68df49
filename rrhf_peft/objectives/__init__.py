"""Objectives: pure losses over `ResponseLogProbs`. To add one: a function, a line here, a recipe section, a test."""

from collections.abc import Callable
from typing import Any

from rrhf_peft.objectives.cpo import cpo
from rrhf_peft.objectives.dpo import dpo
from rrhf_peft.objectives.hinge import hinge
from rrhf_peft.objectives.ipo import ipo
from rrhf_peft.objectives.kto import kto
from rrhf_peft.objectives.odpo import odpo
from rrhf_peft.objectives.orpo import orpo
from rrhf_peft.objectives.plackett_luce import plackett_luce
from rrhf_peft.objectives.pro import pro
from rrhf_peft.objectives.rrhf import rrhf
from rrhf_peft.objectives.sft import sft
from rrhf_peft.objectives.simpo import simpo

#: Name in a recipe -> `(log_probs, scores, *, reference=None, **hyper) -> (loss, metrics)`.
OBJECTIVES: dict[str, Callable[..., Any]] = {
    "rrhf": rrhf,
    "sft": sft,
    "dpo": dpo,
    "ipo": ipo,
    "odpo": odpo,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "kto": kto,
    "hinge": hinge,
    "plackett_luce": plackett_luce,
    "pro": pro,
}

#: Objectives that learn from ordered pairs: a group without one teaches them nothing.
NEEDS_PAIRS = frozenset({"rrhf", "dpo", "ipo", "odpo", "simpo", "orpo", "cpo", "hinge", "plackett_luce", "pro"})

#: Objectives that compare the policy with a reference policy.
NEEDS_REFERENCE = frozenset({"dpo", "ipo", "odpo", "kto"})

#: Objectives that do so when they are given one.
TAKES_REFERENCE = NEEDS_REFERENCE | {"hinge", "plackett_luce"}

__all__ = ["NEEDS_PAIRS", "NEEDS_REFERENCE", "OBJECTIVES", "TAKES_REFERENCE", *OBJECTIVES]
