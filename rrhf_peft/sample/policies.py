"""Which policy each entry of `sampling.candidates` means, and policies loaded one after the other.

Entries are gathered into stages: one stage, one policy. Stages on the same base follow each other, so that an
adapter is taken off and the next one put on while the base stays where it is.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rrhf_peft.data import chat_messages, prompt_text
from rrhf_peft.modeling import attach_adapter, load_base_model, load_tokenizer, read_adapter
from rrhf_peft.recipe import CandidatesSection, ModelSection, Recipe, SamplingSection, takes_from_base
from rrhf_peft.recipe.online import OnlineSection
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.candidate import Candidate, Decoding
from rrhf_peft.sample.endpoint import EndpointPolicy
from rrhf_peft.sample.prompts import encode_prompts
from rrhf_peft.sample.transformers_policy import TokenBudget, respond
from rrhf_peft.sample.vllm_policy import VllmPolicy

#: Told of (prompts, tokens) that have been added.
Progress = Callable[[int, int], None]


class Policy(Protocol):
    """Something that answers prompts; may give fewer candidates than asked for, never more."""

    def respond(
        self, prompts: Sequence[RankedGroup], keys: Sequence[str], decoding: Decoding, progress: Progress
    ) -> list[list[Candidate]]:
        """The candidates of each prompt, in order; `keys` name the prompts' random streams."""


@dataclass
class Stage:
    """One policy, and the entries (place in `sampling.candidates` and section) that it answers.

    Attributes:
        name: How sources call it.
        backend: transformers, vllm or endpoint.
        model: The base; None for an endpoint.
        adapter: Folder or hub id of the adapter on it.
        entries: Place in the recipe -> section.
    """

    name: str
    backend: str
    model: ModelSection | None
    adapter: str | None
    entries: dict[int, CandidatesSection] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Everything that its responses depend on, the prompts apart; JSON values."""
        return {
            "model": None if self.model is None else self.model.model_dump(mode="json"),
            "files": [_folder_digest(name) for name in (self.model and self.model.name, self.adapter) if name],
            "adapter": self.adapter,
            "entries": {
                str(place): entry.model_dump(mode="json", exclude={"source"}) for place, entry in self.entries.items()
            },
        }


def make_stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, those with the same base side by side, else in the recipe's order.

    Raises:
        UserError: an entry names no model, and the recipe has none.
    """
    assert recipe.sampling is not None
    stages: dict[str, Stage] = {}
    for place, entry in enumerate(recipe.sampling.candidates):
        stage = _stage_of(recipe, place, entry)
        key = json.dumps(
            [stage.backend, _base_key(stage), stage.adapter, entry.endpoint and entry.endpoint.model_dump()]
        )
        stages.setdefault(key, stage).entries[place] = entry
    found = list(stages.values())
    bases = [_base_key(stage) for stage in found]
    return sorted(found, key=lambda stage: bases.index(_base_key(stage)))


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


def _stage_of(recipe: Recipe, place: int, entry: CandidatesSection) -> Stage:
    if entry.endpoint is not None:
        return Stage(Path(entry.endpoint.model).name, "endpoint", None, None)
    own = recipe.model
    if entry.model is None:
        if own is None:
            raise UserError(
                f"sampling.candidates.{place}: names no model, and the recipe has no section model. Set model.name, or "
                "this entry's model or endpoint."
            )
        model, adapter = own, entry.adapter or own.init_adapter
    elif own is not None and entry.model == own.name:
        model, adapter = own, entry.adapter
    else:
        held = {} if own is None else own.model_dump(include={"dtype", "quantization", "double_quant", "attention"})
        model, adapter = ModelSection(name=entry.model, **held), entry.adapter
    return Stage(Path(adapter or model.name).name, entry.backend, model, adapter)


def _base_key(stage: Stage) -> str:
    if stage.model is None:
        return f"endpoint {stage.name}"
    return stage.backend + stage.model.model_dump_json(exclude={"init_adapter"})


def _folder_digest(name: str) -> str:
    """What tells one local checkpoint from another: small files by content, weights by name and size."""
    folder, digest = Path(name).expanduser(), hashlib.sha256(name.encode())
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


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

    def load(self, stage: Stage) -> Policy:
        """The stage's policy; the one before it must not be used any more.

        Raises:
            UserError: it cannot be loaded, or an extra is not installed.
        """
        if self._current is not None and stage.backend != "transformers":
            self._forget()
        if stage.backend == "endpoint":
            endpoint = next(iter(stage.entries.values())).endpoint
            assert endpoint is not None
            return _Endpoint(EndpointPolicy(**endpoint.model_dump()), self.sampling)
        assert stage.model is not None
        if stage.backend == "vllm":
            tokenizer = _tokenizer_of(stage.model)
            policy = VllmPolicy(stage.model.name, **_vllm_settings(stage.model), adapter=stage.adapter)
            return _Tokenized(tokenizer, self.sampling, policy.respond)
        model = self._model(stage)

        def answer(prompts: Any, keys: Any, decoding: Decoding, progress: Progress) -> list[list[Candidate]]:
            return respond(model, self._tokenizer, prompts, keys, decoding, self.budget, progress)

        self._current = model
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
            self._tokenizer = _tokenizer_of(model)
            self._base = load_base_model(
                model.name,
                revision=model.revision,
                dtype=model.dtype,
                quantization=model.quantization,
                double_quant=model.double_quant,
                attention=model.attention,
                trust_remote_code=model.trust_remote_code,
            )
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

    def __init__(self, tokenizer: Any, sampling: SamplingSection, answer: Any) -> None:
        self.tokenizer, self.sampling, self.answer = tokenizer, sampling, answer

    def respond(
        self, prompts: Sequence[RankedGroup], keys: Sequence[str], decoding: Decoding, progress: Progress
    ) -> list[list[Candidate]]:
        texts = [prompt_text(item, self.tokenizer, self.sampling.template) for item in prompts]
        encoded = encode_prompts(
            self.tokenizer,
            texts,
            add_bos=self.sampling.template != "chat",
            max_tokens=self.sampling.max_prompt_tokens,
        )
        return self.answer(encoded, keys, decoding, progress)


class _Endpoint:
    """A server: gets messages, or templated text that needs no tokenizer."""

    def __init__(self, server: EndpointPolicy, sampling: SamplingSection) -> None:
        self.server, self.sampling = server, sampling
        if server.api == "completions" and sampling.template == "chat":
            raise UserError(
                "sampling.template: chat needs a tokenizer, which an endpoint does not give. Set endpoint.api: chat, "
                "so that the server applies its own template."
            )

    def respond(
        self, prompts: Sequence[RankedGroup], keys: Sequence[str], decoding: Decoding, progress: Progress
    ) -> list[list[Candidate]]:
        if self.server.api == "chat":
            inputs: list[Any] = [chat_messages(item.prompt) for item in prompts]
        else:
            unused: Any = None  # these templates read no tokenizer
            inputs = [prompt_text(item, unused, self.sampling.template) for item in prompts]
        return self.server.respond(inputs, keys, decoding, progress)


def _tokenizer_of(model: ModelSection) -> Any:
    own = model.tokenizer is None
    return load_tokenizer(
        model.tokenizer or model.name,
        revision=model.revision if own else None,
        trust_remote_code=model.trust_remote_code,
    )


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
