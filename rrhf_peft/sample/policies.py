"""What a policy is asked and gives, which policy each entry of `sampling.candidates` means, and one loaded at a time.

Entries are gathered into stages: one stage, one policy. Stages on the same base follow each other, so that an
adapter is taken off and the next one put on while the base stays where it is.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from rrhf_peft.data import encode_prompts, prompt_text, stop_token_ids, tokenization_fingerprint
from rrhf_peft.modeling import TokenBudget, attach_adapter, base_of, read_adapter, tokenizer_of, weights_fingerprint
from rrhf_peft.recipe import CandidatesSection, ModelSection, Recipe, SamplingSection, takes_from_base
from rrhf_peft.recipe.schema import OnlineSection
from rrhf_peft.recipe.stages import EndpointSection
from rrhf_peft.records import RankedGroup, UserError

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


#: Told of (prompts, tokens) that have been added.
Progress = Callable[[int, int], None]


class Policy(Protocol):
    """Something that answers prompts; may give fewer candidates than asked for, never more."""

    #: Fingerprint of the tokenizer and template that the candidates' token ids belong to, where they have some.
    tokenizer_fingerprint: str | None
    #: Whether it takes the prompts of all units at once.
    across_units: bool

    def respond(
        self, prompts: Sequence[RankedGroup], keys: Sequence[str], decoding: Decoding, progress: Progress
    ) -> Iterator[tuple[int, Answers]]:
        """(index, answers) of every prompt, as they are done; `keys` name the prompts' random streams."""


@dataclass
class Stage:
    """One policy, and the entries (index in `sampling.candidates` and section) that it answers.

    Attributes:
        name: How sources call it.
        backend: transformers, vllm or endpoint.
        model: The base; None for an endpoint.
        adapter: Folder or hub id of the adapter on it.
        entries: Index in the recipe -> section.
    """

    name: str
    backend: str
    model: ModelSection | None
    adapter: str | None
    entries: dict[int, CandidatesSection] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The weights that all its responses depend on; JSON values."""
        return {
            "model": None if self.model is None else self.model.model_dump(mode="json"),
            "files": [
                None if self.model is None else weights_fingerprint(self.model.name, self.model.revision),
                None if self.adapter is None else weights_fingerprint(self.adapter),
            ],
            "adapter": self.adapter,
        }


def describe_entry(entry: CandidatesSection) -> dict[str, Any]:
    """The settings that an entry's responses depend on: not how they are called, nor how hard a server is tried."""
    values = entry.model_dump(mode="json", exclude={"source"})
    if entry.endpoint is not None:
        values["endpoint"] = entry.endpoint.model_dump(mode="json", exclude=set(EndpointSection.EFFORT))
    return values


def make_stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, those with the same base side by side, else in the recipe's order.

    Raises:
        UserError: an entry names no model, and the recipe has none.
    """
    assert recipe.sampling is not None
    stages: dict[str, Stage] = {}
    for index, entry in enumerate(recipe.sampling.candidates):
        stage = _stage_of(recipe, index, entry)
        key = json.dumps(
            [stage.backend, _base_key(stage), stage.adapter, entry.endpoint and entry.endpoint.model_dump()]
        )
        stages.setdefault(key, stage).entries[index] = entry
    ordered = list(stages.values())
    bases = [_base_key(stage) for stage in ordered]
    return sorted(ordered, key=lambda stage: bases.index(_base_key(stage)))


def source_of(stage: Stage, entry: CandidatesSection) -> str:
    """The name in the sources column."""
    return entry.source or f"{entry.strategy}:{stage.name}"


def decoding_of(entry: CandidatesSection, sampling: SamplingSection | OnlineSection) -> Decoding:
    """An entry's settings as `rrhf_peft.sample` takes them."""
    return Decoding(
        strategy=entry.strategy,
        k=entry.k,
        max_new_tokens=entry.max_new_tokens,
        temperature=entry.temperature,
        top_p=entry.top_p,
        num_beams=entry.beams,
        num_beam_groups=entry.beam_groups,
        diversity_penalty=entry.diversity_penalty,
        length_penalty=entry.length_penalty,
        early_stopping=entry.early_stopping,
        stop=tuple(sampling.stop),
    )


def _stage_of(recipe: Recipe, index: int, entry: CandidatesSection) -> Stage:
    if entry.endpoint is not None:
        return Stage(Path(entry.endpoint.model).name, "endpoint", None, None)
    default = recipe.model
    if entry.model is None:
        if default is None:
            raise UserError(
                f"sampling.candidates.{index}: names no model, and the recipe has no section model. Set model.name, or "
                "this entry's model or endpoint."
            )
        model, adapter = default, entry.adapter or default.init_adapter
    elif default is not None and entry.model == default.name:
        model, adapter = default, entry.adapter
    else:
        held = (
            {}
            if default is None
            else default.model_dump(include={"dtype", "quantization", "double_quant", "attention"})
        )
        model, adapter = ModelSection(name=entry.model, **held), entry.adapter
    return Stage(Path(adapter or model.name).name, entry.backend, model, adapter)


def _base_key(stage: Stage) -> str:
    if stage.model is None:
        return f"endpoint {stage.name}"
    return stage.backend + stage.model.model_dump_json(exclude={"init_adapter"})


class PolicyLoader:
    """Loads the policy of one stage at a time, and keeps the base while the stages want the same."""

    def __init__(self, sampling: SamplingSection) -> None:
        self.sampling = sampling
        self.budget = TokenBudget(sampling.batch_tokens)
        self._base: Any = None
        self._base_key: str | None = None
        self._adapted: Any = None
        self._tokenizer: Any = None
        self._current: Any = None

    def load(self, stage: Stage, *, known_to_answer: bool = False) -> Policy:
        """The stage's policy; the one before it must not be used any more.

        Args:
            stage: What to load.
            known_to_answer: An earlier run has got answers from it; of interest to an endpoint.

        Raises:
            UserError: it cannot be loaded, or an extra is not installed.
        """
        if self._current is not None and stage.backend != "transformers":
            self._forget()
        # A backend's file is opened where a stage wants it.
        if stage.backend == "endpoint":
            from rrhf_peft.sample.endpoint import EndpointPolicy

            index, entry = next(iter(stage.entries.items()))
            assert entry.endpoint is not None
            at = f"sampling.candidates.{index}.endpoint"
            return EndpointPolicy(entry.endpoint, self.sampling.template, at=at, known_to_answer=known_to_answer)
        assert stage.model is not None
        if stage.backend == "vllm":
            from rrhf_peft.sample.vllm_policy import VllmPolicy

            tokenizer = tokenizer_of(stage.model)
            policy = VllmPolicy(stage.model.name, **_vllm_settings(stage.model), adapter=stage.adapter)
            return _Tokenized(tokenizer, self.sampling, policy.respond)
        from rrhf_peft.sample.transformers_policy import respond

        self._current = model = self._model(stage)

        def answer(
            prompts: Any, keys: Any, decoding: Decoding, progress: Progress, **more: Any
        ) -> list[list[Candidate]]:
            return respond(model, self._tokenizer, prompts, keys, decoding, self.budget, progress, **more)

        return _Tokenized(self._tokenizer, self.sampling, answer)

    def _model(self, stage: Stage) -> Any:
        model = stage.model
        assert model is not None
        if self._adapted is not None:
            if takes_from_base(self._adapted.active_peft_config.init_lora_weights):
                self._forget()  # the base weights are no longer what was loaded
            else:
                self._base = self._adapted.unload()
            self._adapted = None
        if self._base_key != _base_key(stage):
            self._forget()
            self._tokenizer = tokenizer_of(model)
            self._base = base_of(model, self._tokenizer)
            self._base_key = _base_key(stage)
        if stage.adapter is None:
            return self._base
        self._adapted = attach_adapter(self._base, None, init_adapter=stage.adapter)
        return self._adapted

    def _forget(self) -> None:
        self._base = self._adapted = self._tokenizer = self._current = self._base_key = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Tokenized:
    """A policy that reads token ids: templates and tokenises the prompts for it."""

    #: Batches hold prompts of one unit, so that rows are the same to the last digit wherever a run was killed.
    across_units = False

    def __init__(self, tokenizer: Any, sampling: SamplingSection, answer: Any) -> None:
        self.tokenizer, self.sampling, self.answer = tokenizer, sampling, answer
        self.tokenizer_fingerprint: str | None = tokenization_fingerprint(tokenizer, sampling.template)
        self.ends = stop_token_ids(tokenizer, sampling.template)

    def respond(
        self, prompts: Sequence[RankedGroup], keys: Sequence[str], decoding: Decoding, progress: Progress
    ) -> Iterator[tuple[int, Answers]]:
        """The answers to each prompt; one that no template fits, or that is too long, costs nothing but its own."""
        encoded: dict[int, list[int]] = {}
        failures: dict[int, str] = {}
        for index, item in enumerate(prompts):
            try:
                encoded[index] = self._encode(item)
            except UserError as error:
                failures[index] = str(error)
        if failures:
            progress(len(failures), 0)
        indices = list(encoded)
        responses = self.answer(
            [encoded[index] for index in indices],
            [keys[index] for index in indices],
            decoding,
            progress,
            ends=self.ends,
            too_long=lambda number, reason: failures.update({indices[number]: reason}),
        )
        answers = [Answers([], [failures[index]] if index in failures else []) for index in range(len(prompts))]
        for index, candidates in zip(indices, responses, strict=True):
            answers[index].candidates.extend(candidates)
        yield from enumerate(answers)

    def _encode(self, prompt: RankedGroup) -> list[int]:
        text = prompt_text(prompt, self.tokenizer, self.sampling.template)
        (ids,) = encode_prompts(
            self.tokenizer,
            [text],
            add_bos=self.sampling.template != "chat",
            max_tokens=self.sampling.max_prompt_tokens,
        )
        return ids


def _vllm_settings(model: ModelSection) -> dict[str, Any]:
    if model.quantization != "none":
        raise UserError(
            f"model.quantization: {model.quantization} is loaded by bitsandbytes here, not in vllm. Set backend: "
            "transformers, or quantization: none."
        )
    return {
        "revision": model.revision,
        "dtype": model.dtype,
        "tokenizer": model.tokenizer,
        "trust_remote_code": model.trust_remote_code,
    }


def check_adapters(stages: Sequence[Stage]) -> None:
    """Read every adapter once, so that a damaged one is told before hours of sampling with the others.

    Raises:
        UserError: an adapter is missing or damaged.
    """
    for stage in stages:
        if stage.adapter is not None:
            read_adapter(stage.adapter)
