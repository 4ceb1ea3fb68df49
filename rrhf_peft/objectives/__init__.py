"""Objectives: pure losses over `ResponseLogProbs`. To add one: a function, a line here, a recipe section, a test."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from rrhf_peft.objectives.listwise import info_nca, lipo_lambda, mpo, plackett_luce, pro
from rrhf_peft.objectives.pairwise import cpo, dpo, hinge, ipo, odpo, orpo, rpo, simpo
from rrhf_peft.objectives.pointwise import gvpo, kto, nca, qrpo
from rrhf_peft.objectives.policy_gradient import grpo, rloo
from rrhf_peft.objectives.rrhf import rrhf, sft

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
    "lipo_lambda": lipo_lambda,
    "info_nca": info_nca,
    "nca": nca,
    "mpo": mpo,
    "rpo": rpo,
    "gvpo": gvpo,
    "qrpo": qrpo,
    "rloo": rloo,
    "grpo": grpo,
}

#: Objectives that learn from ordered pairs: a group without one teaches them nothing (or, qrpo, nothing true).
NEEDS_PAIRS = frozenset(OBJECTIVES) - {"sft", "kto", "info_nca", "nca", "gvpo"}

#: Objectives for online training alone: their reference is the policy that sampled the responses.
ONLINE_ONLY = frozenset({"rloo", "grpo"})

#: Objectives that compare the policy with a reference policy: `reference` has no default.
NEEDS_REFERENCE = frozenset(
    name
    for name, objective in OBJECTIVES.items()
    if inspect.signature(objective).parameters["reference"].default is inspect.Parameter.empty
)

#: Those and the objectives that do so when they are given one: `reference` can be something else than None.
TAKES_REFERENCE = frozenset(
    name for name, objective in OBJECTIVES.items() if typing.get_type_hints(objective)["reference"] is not type(None)
)

#: Objectives whose loss of a group depends on the other groups of its micro-batch.
COUPLES_GROUPS = frozenset({"kto"})

__all__ = [
    "COUPLES_GROUPS",
    "NEEDS_PAIRS",
    "NEEDS_REFERENCE",
    "OBJECTIVES",
    "ONLINE_ONLY",
    "TAKES_REFERENCE",
    *OBJECTIVES,
]
