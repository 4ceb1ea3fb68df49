"""The `sampling:` section: which prompts, which policies answer them, how each decodes, and where the rows go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rrhf_peft.recipe.section import Filled, OutputPath, Paths, Section

Strategy = Literal["beam", "diverse_beam", "top_p"]
Backend = Literal["transformers", "vllm", "endpoint"]

#: Which settings each strategy reads beside k, max_new_tokens and source; any other one would be without effect.
READS: dict[str, set[str]] = {
    "beam": {"num_beams", "length_penalty", "early_stopping"},
    "diverse_beam": {
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "length_penalty",
        "early_stopping",
    },
    "top_p": {"temperature", "top_p"},
}
_STRATEGY_SETTINGS = set().union(*READS.values())


class EndpointSection(Section):
    """A server that speaks OpenAI's HTTP API."""

    #: What changes no response: how the server is reached, and how hard it is tried.
    EFFORT: ClassVar[frozenset[str]] = frozenset({"base_url", "api_key_env", "concurrency", "timeout", "max_retries"})

    base_url: Filled = Field(description="For example http://localhost:8000/v1.")
    model: Filled = Field(description="The name under which the server knows the model.")
    api: Literal["chat", "completions"] = Field(
        "chat",
        description="chat sends messages and leaves the template to the server; completions sends the templated text.",
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if one is needed.")
    concurrency: int = Field(8, ge=1, description="Requests under way at the same time, for each process.")
    timeout: float = Field(120.0, gt=0, description="Seconds until a request counts as failed.")
    max_retries: int = Field(6, ge=0, description="Further attempts after 408, 409, 429, 5xx, time-outs and cut lines.")


class CandidatesSection(Section):
    """One policy and one way to decode it; a run has one or more."""

    strategy: Strategy = Field(description="beam (BP), diverse_beam (DP) or top_p (SP) of arXiv 2304.05302.")
    k: int = Field(4, ge=1, description="Responses to each prompt.")
    model: Filled | None = Field(
        None, description="Hub id or folder. Unset: the recipe's model, with all of its settings."
    )
    adapter: Filled | None = Field(None, description="PEFT adapter to put on that model: a run folder or hub id.")
    backend: Backend = Field("transformers", description="vllm and endpoint need the extras of the same names.")
    endpoint: EndpointSection | None = Field(None, description="The server, with backend: endpoint.")
    source: str | None = Field(
        None, min_length=1, description="Name in the sources column. Unset: strategy:policy, as in top_p:my-adapter."
    )
    max_new_tokens: int = Field(128, ge=1, description="A response that has not ended by then is cut.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits (top_p, diverse_beam).")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the fewest tokens that hold this probability (top_p).")
    num_beams: int | None = Field(None, ge=1, description="Beams in all (beam, diverse_beam). Unset: k.")
    num_beam_groups: int | None = Field(
        None, ge=1, description="Groups the beams are split into (diverse_beam). Unset: as many as beams."
    )
    diversity_penalty: float = Field(
        1.0, ge=0, description="Off a token's score for each earlier group that took it at this step (diverse_beam)."
    )
    length_penalty: float = Field(1.0, description="A beam's score is its log-prob / length ** this (beams).")
    early_stopping: bool | Literal["never"] = Field(
        False, description="transformers' rule for when beams are done (beams)."
    )

    @property
    def beams(self) -> int:
        """How many rows decode one prompt at the same time."""
        return self.k if self.strategy == "top_p" else self.num_beams or self.k

    @property
    def beam_groups(self) -> int:
        """How many groups `beams` is split into."""
        return (self.num_beam_groups or self.beams) if self.strategy == "diverse_beam" else 1


class SamplingSection(Section):
    """What `rrhf-peft sample` reads."""

    prompts: Annotated[
        Paths,
        Field(
            description="Prompts: .txt (one on each line), .json (a list of strings or records), .jsonl with the key "
            "prompt, or ranked data in any known format, whose responses are then the provided ones."
        ),
    ]
    output: OutputPath = Field(description="The .jsonl file to write: prompt, responses, sources, meta.")
    candidates: list[CandidatesSection] = Field(
        default_factory=list, description="Policies and strategies; empty keeps only provided responses."
    )
    keep_provided: bool = Field(True, description="Keep the responses that came with the prompts, in front.")
    format: str = Field("auto", description="Importer for ranked prompt files; auto recognises the columns.")
    split: str = Field("train", description="Split to read from hub ids and folders.")
    template: Literal["raw", "hh", "alpaca", "chat"] = Field("raw", description="As data.template in training.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description='Texts that end a response and are cut off, for example "\\n\\nHuman:".'
    )
    max_prompt_tokens: int | None = Field(
        None, ge=2, description="Longer prompts lose their beginning. Unset: none do."
    )
    max_prompts: int | None = Field(None, ge=1, description="Read only the first this many prompts.")
    seed: int = Field(
        0, ge=0, description="Of top_p. A draw depends on it, the entry's and the prompt's index and its own number."
    )
    batch_tokens: int = Field(
        16384,
        ge=1,
        description="Tokens (prompt and response, times beams) decoded together; halved when memory is out.",
    )
    unit_prompts: int = Field(
        32, ge=1, description="Prompts finished and written at a time: what a kill can lose. Changes no result."
    )

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> SamplingSection:
        for key, problem in _contradictions(self):
            raise ValueError(f"sampling.{key}: {problem}")
        return self


def _contradictions(sampling: SamplingSection) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for settings that cannot go together."""
    if not sampling.candidates and not sampling.keep_provided:
        yield "candidates", "is empty and keep_provided is false, so there is nothing to write; change one of the two"
    for place, entry in enumerate(sampling.candidates):
        yield from entry_contradictions(entry, f"candidates.{place}")


def entry_contradictions(entry: CandidatesSection, at: str) -> Iterator[tuple[str, str]]:
    """The same for one entry, whose keys begin with `at`."""
    for name in sorted(_changed(entry) & (_STRATEGY_SETTINGS - READS[entry.strategy])):
        yield f"{at}.{name}", f"has no effect with strategy {entry.strategy}; remove it"
    if entry.strategy != "top_p" and entry.beams < entry.k:
        yield f"{at}.k", f"{entry.k} responses cannot come from {entry.beams} beams; raise num_beams"
    if entry.beams % entry.beam_groups:
        yield f"{at}.num_beam_groups", f"{entry.beams} beams do not split into {entry.beam_groups} equal groups"
    for name, problem in _backend_problems(entry):
        yield f"{at}.{name}", problem


def _backend_problems(entry: CandidatesSection) -> Iterator[tuple[str, Any]]:
    if (entry.backend == "endpoint") != (entry.endpoint is not None):
        yield "endpoint", "goes with backend: endpoint, and only with it; set both or neither"
    if entry.endpoint is not None and (entry.model or entry.adapter):
        yield "model", "an endpoint serves its own weights; name them as endpoint.model, and remove model and adapter"
    if entry.backend == "endpoint" and entry.strategy != "top_p":
        yield "strategy", f"{entry.strategy} is not a part of OpenAI's API; use top_p"
    if entry.backend == "vllm" and entry.strategy == "diverse_beam":
        yield "strategy", "vllm has no diverse beam search; use backend: transformers"
    if entry.backend == "vllm" and "early_stopping" in _changed(entry):
        yield "early_stopping", "vllm's beam search has no such setting; remove it"


def _changed(entry: CandidatesSection) -> set[str]:
    """The settings that are not at their defaults, which a snapshot writes out as well."""
    return {name for name, field in type(entry).model_fields.items() if getattr(entry, name) != field.default}
