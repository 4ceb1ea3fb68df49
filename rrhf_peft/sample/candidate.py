"""What sampling makes, the settings it is made with, and the row that a prompt's candidates become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rrhf_peft.recipe import CandidatesSection
from rrhf_peft.records import PER_RESPONSE, RankedGroup

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled response.

    Attributes:
        text: The response as it reads after its prompt, without special tokens, end token and stop string.
        num_tokens: Tokens generated, the end token or the stop string's included; None where a server does not say.
        log_prob: Sum over those tokens of the policy's log P(token | past) at temperature 1, in nats; None where
            the backend does not tell.
        finish_reason: ``eos`` ended by itself, ``stop`` at a stop string, ``length`` was cut.
        token_ids: The tokens themselves; None where the backend does not tell, and where the text was cut at a
            stop string and is not all of them.
    """

    text: str
    num_tokens: int | None
    log_prob: float | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class Answers(NamedTuple):
    """What a policy gave for one prompt, and for what it did not give, why."""

    candidates: list[Candidate]
    failures: list[str]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a policy is decoded; names and meanings as in the recipe's `sampling.candidates`."""

    strategy: Literal["beam", "diverse_beam", "top_p"]
    k: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Sequences decoded at the same time for one prompt."""
        return self.k if self.strategy == "top_p" else self.num_beams


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one entry gave for one prompt, as it was read from the stage's file.

    Attributes:
        entry: Its section.
        source: Its name in the sources column.
        policy: The name of the model or adapter.
        candidates: Fields of `Candidate`.
        failures: Why others are missing.
        tokenizer: Fingerprint of what the candidates' token ids belong to; None without ids.
    """

    entry: CandidatesSection
    source: str
    policy: str
    candidates: Sequence[dict[str, Any]]
    failures: Sequence[str] = ()
    tokenizer: str | None = None


def joined_row(
    prompt: RankedGroup,
    sampled: Sequence[Sampled],
    *,
    keep_provided: bool,
    as_trained: Callable[[str], str],
    keep_all: bool = False,
) -> dict[str, Any]:
    """All candidates of a prompt in one row: provided responses first, then entry by entry, each text once.

    The row has the columns of `RankedGroup`, without scores, and the prompt's own ones. `meta.candidates` says for
    each response how it was made, with the same keys for all; `meta.removed` names what was left out and why;
    `meta.prompt_index` is the prompt's index. Who measures a policy, instead of training one, keeps empty texts and
    repeated ones too.

    Args:
        prompt: With the responses it came with.
        sampled: Of every entry, in the recipe's order.
        keep_provided: Whether those responses stay.
        as_trained: The template's response text; two responses equal after it are duplicates.
        keep_all: Whether empty texts and duplicates stay.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("responses", "sources", *PER_RESPONSE)}
    details, removed, seen = list[dict[str, Any]](), list[dict[str, str]](), set[str]()

    def add(text: str, source: str, detail: dict[str, Any], known: Mapping[str, Any]) -> None:
        key = as_trained(text)
        if not keep_all and (not text.strip() or key in seen):
            removed.append({"source": source, "reason": "duplicate" if text.strip() else "empty"})
            return
        seen.add(key)
        details.append(detail)
        for name, value in {"responses": text, "sources": source, **known}.items():
            columns[name].append(value)

    if keep_provided:
        for index, (text, source) in enumerate(zip(prompt.responses, prompt.sources, strict=True)):
            detail = _detail("provided", source, provided_score=prompt.scores[index])
            add(text, source, detail, {name: getattr(prompt, name)[index] for name in PER_RESPONSE})
    for item in sampled:
        entry = item.entry
        temperature = None if entry.strategy == "beam" else entry.temperature
        for candidate in item.candidates:
            told = {name: candidate[name] for name in ("num_tokens", "log_prob", "finish_reason")}
            known = {
                "finish_reasons": told["finish_reason"],
                "num_tokens": told["num_tokens"],
                "token_ids": candidate["token_ids"],
                "tokenizers": None if candidate["token_ids"] is None else item.tokenizer,
            }
            add(candidate["text"], item.source, _detail(entry.strategy, item.policy, temperature, **told), known)
        for number in range(entry.k - len(item.candidates)):
            why = {"why": item.failures[min(number, len(item.failures) - 1)]} if item.failures else {}
            removed.append({"source": item.source, "reason": "missing", **why})
    told_of = {
        name: values
        for name, values in columns.items()
        if name not in PER_RESPONSE or any(value is not None for value in values)
    }
    rest = {name: value for name, value in prompt.columns.items() if name not in ("meta", "scores", *columns)}
    meta = {**prompt.origin, "prompt_index": prompt.index, "candidates": details, "removed": removed}
    return {"prompt": prompt.prompt, **told_of, **rest, "meta": meta}


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
