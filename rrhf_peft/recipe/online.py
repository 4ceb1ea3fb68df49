"""The `online:` section: new candidates from the policy while it is trained (OP-k of arXiv 2304.05302)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rrhf_peft.recipe.objectives import takes_from_base
from rrhf_peft.recipe.sampling import CandidatesSection, entry_contradictions
from rrhf_peft.recipe.scoring import ScorerSection, scorer_contradictions
from rrhf_peft.recipe.section import Section

#: transformers' own `save_steps`.
_SAVE_STEPS = 500


class OnlineSection(Section):
    """Every `every` optimizer steps the current policy answers the prompts of the next ones, and the scorer scores."""

    every: int = Field(ge=1, description="k of OP-k: optimizer steps between two samplings.")
    decoding: CandidatesSection = Field(
        description="How the policy answers, as an entry of `sampling.candidates` without model, adapter and backend."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="As `sampling.stop`: texts that end a response and are cut off."
    )
    scorer: ScorerSection = Field(description="Who scores, as `scoring.scorer`; people cannot.")
    keep_provided: bool = Field(
        True, description="Rank the responses that `data.train` holds for the prompt together with the new ones."
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="b of reward - b * KL against the policy with its adapter off. 0: no penalty."
    )
    kl_reduction: Literal["sum", "mean"] = Field(
        "sum", description="KL of a response: sum over its tokens of log-ratio, or their mean."
    )
    seed: int = Field(0, ge=0, description="Of top_p; each refresh has draws of its own.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens decoded together; halved when memory is out.")

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> OnlineSection:
        for key, problem in _contradictions(self):
            raise ValueError(f"online.{key}: {problem}")
        return self


def _contradictions(online: OnlineSection) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for settings of the section that cannot go together."""
    decoding = online.decoding
    for name in ("model", "adapter", "endpoint"):
        if getattr(decoding, name) is not None:
            yield f"decoding.{name}", "the policy in training answers, and no other; remove it"
    if decoding.backend != "transformers":
        yield "decoding.backend", "the policy in training is decoded where it is; remove it"
    yield from entry_contradictions(decoding, "decoding")
    parts = online.scorer.parts.values() if online.scorer.name == "composite" else []
    if "human" in [online.scorer.name, *(part.scorer.name for part in parts)]:
        yield "scorer", "training does not wait for people; use another scorer, or rrhf-peft sample, score and train"
    yield from scorer_contradictions(online.scorer)


def online_contradictions(online: OnlineSection, data: Any, adapter: Any, training: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for what does not go with the other sections.

    `data` and `training` are None where the recipe has none; `adapter` is None where all weights are trained.
    """
    if online.kl_coefficient > 0:
        if adapter is None:
            yield (
                "online.kl_coefficient",
                "the penalty is against the model with its adapter off, and adapter is null; give an adapter, or set 0",
            )
        elif takes_from_base(adapter.init_lora_weights):
            yield (
                "online.kl_coefficient",
                f"adapter.init_lora_weights: {adapter.init_lora_weights} takes a part out of the base weights, so that "
                "switching the adapter off does not give the base; remove it, or set 0",
            )
    if data is not None:
        room = data.max_tokens - (data.max_prompt_tokens or 2)
        if online.decoding.max_new_tokens > room:
            yield (
                "online.decoding.max_new_tokens",
                f"{online.decoding.max_new_tokens} with data.max_prompt_tokens do not fit into data.max_tokens = "
                f"{data.max_tokens}; raise data.max_tokens, or lower one of the two",
            )
    if training is not None:
        yield from _checkpoint_contradictions(online.every, training)


def _checkpoint_contradictions(every: int, training: Any) -> Iterator[tuple[str, str]]:
    """A run can only be continued where new responses are sampled: elsewhere the last ones would be missing."""
    if training.save_strategy == "best":
        yield (
            "training.save_strategy",
            f"best may save between two samplings; use steps with training.save_steps a multiple of online.every = "
            f"{every}, or epoch",
        )
    save_steps = _SAVE_STEPS if training.save_steps is None else training.save_steps
    if training.save_strategy == "steps" and (save_steps < 1 or save_steps % every):
        yield (
            "training.save_steps",
            f"{save_steps:g} is not a multiple of online.every = {every}, where alone a run can be continued; set it "
            "to one, or training.save_strategy to epoch",
        )
