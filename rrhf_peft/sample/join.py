"""All candidates of a prompt into one row: provided responses first, then entry by entry, each text once.

A row is ``prompt, responses, sources, meta``. ``meta.candidates`` says for each response how it was made,
with the same keys for all; ``meta.removed`` names what was left out and why; ``meta.prompt_index`` is the
prompt's place. What else the input said about the prompt stands in `meta` as well. Who measures a policy,
instead of training one, keeps empty texts and repeated ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf_peft.recipe import CandidatesSection
from rrhf_peft.records import RankedGroup


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one entry gave for one prompt: `candidates` as `dataclasses.asdict` makes them."""

    entry: CandidatesSection
    source: str
    policy: str
    candidates: Sequence[dict[str, Any]]


def joined_row(
    prompt: RankedGroup,
    sampled: Sequence[Sampled],
    *,
    keep_provided: bool,
    as_trained: Callable[[str], str],
    keep_all: bool = False,
) -> dict[str, Any]:
    """The row of one prompt.

    Args:
        prompt: With the responses it came with.
        sampled: Of every entry, in the recipe's order.
        keep_provided: Whether those responses stay.
        as_trained: The template's response text; two responses equal after it are duplicates.
        keep_all: Whether empty texts and duplicates stay.
    """
    responses: list[str] = []
    sources: list[str] = []
    details: list[dict[str, Any]] = []
    removed: list[dict[str, str]] = []
    seen: set[str] = set()

    def add(text: str, source: str, detail: dict[str, Any]) -> None:
        key = as_trained(text)
        if not keep_all and (not text.strip() or key in seen):
            removed.append({"source": source, "reason": "duplicate" if text.strip() else "empty"})
            return
        seen.add(key)
        responses.append(text)
        sources.append(source)
        details.append(detail)

    if keep_provided:
        scores = prompt.scores or [None] * len(prompt.responses)
        for text, source, score in zip(prompt.responses, prompt.sources, scores, strict=True):
            add(text, source, _detail("provided", source, provided_score=score))
    for item in sampled:
        entry = item.entry
        temperature = None if entry.strategy == "beam" else entry.temperature
        for candidate in item.candidates:
            figures = {name: candidate[name] for name in ("num_tokens", "log_prob", "finish_reason")}
            add(candidate["text"], item.source, _detail(entry.strategy, item.policy, temperature, **figures))
        removed += [{"source": item.source, "reason": "missing"}] * (entry.k - len(item.candidates))
    rest = {name: value for name, value in prompt.columns.items() if name not in ("candidates", "removed", "meta")}
    meta = {**rest, **prompt.origin, "prompt_index": prompt.index, "candidates": details, "removed": removed}
    return {"prompt": prompt.prompt, "responses": responses, "sources": sources, "meta": meta}


def _detail(
    strategy: str,
    policy: str,
    temperature: float | None = None,
    *,
    num_tokens: int | None = None,
    log_prob: float | None = None,
    finish_reason: str | None = None,
    provided_score: float | None = None,
) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "policy": policy,
        "temperature": temperature,
        "num_tokens": num_tokens,
        "log_prob": log_prob,
        "finish_reason": finish_reason,
        "provided_score": provided_score,
    }
