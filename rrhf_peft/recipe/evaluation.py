"""The `evaluation:` section: which policies, on which held-out prompts, measured how.

Left to others: what the values do (`rrhf_peft.evaluation`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rrhf_peft.recipe.sampling import Strategy
from rrhf_peft.recipe.scoring import JudgeScorer, ScorerSection
from rrhf_peft.recipe.section import Section


class PolicySection(Section):
    """One policy: the recipe's model, another one, or an adapter on either."""

    model: str | None = Field(None, description="Hub id or folder, a merged one too. Unset: the recipe's model.")
    adapter: str | None = Field(None, description="PEFT adapter to put on that model: a run folder or hub id.")


class DecodingSection(Section):
    """How every policy answers the prompts; the same for all, so that they can be compared."""

    strategy: Strategy = Field("top_p", description="As in `sampling.candidates`.")
    k: int = Field(4, ge=1, description="Responses to each prompt.")
    max_new_tokens: int = Field(128, ge=1, description="A response that has not ended by then is cut.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits (top_p, diverse_beam).")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the fewest tokens that hold this probability (top_p).")


class PerplexityJudge(Section):
    """The model under which generated text is to be likely; the paper takes gpt2-medium."""

    model: str | None = Field(None, description="Hub id or folder. Unset: the recipe's model, without an adapter.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Type of its weights.")


class WinsSection(Section):
    """Win, tie and lose of every policy against one of them."""

    against: str = Field(description="Name of the policy that the others are compared with.")
    by: str | JudgeScorer = Field(
        description="Label of a scorer, whose reward decides; or a judge, who sees each pair in both orders."
    )
    tie_margin: float = Field(0.0, ge=0, description="Rewards that differ by no more are a tie.")


class EvaluationSection(Section):
    """What `rrhf-peft evaluate` reads."""

    output: str = Field(min_length=1, description="The folder to write: samples, scores, numbers, table, plots.")
    prompts: str | list[str] = Field(description="Held-out prompts, in any form that `sampling.prompts` takes.")
    format: str = Field("auto", description="Importer for ranked prompt files; auto recognises the columns.")
    split: str = Field("test", description="Split to read from hub ids and folders.")
    template: Literal["raw", "hh", "alpaca", "chat"] = Field("raw", description="As data.template in training.")
    stop: list[str] = Field(default_factory=list, description="As `sampling.stop`.")
    max_prompts: int | None = Field(None, ge=1, description="Read only the first this many prompts.")
    max_prompt_tokens: int | None = Field(None, ge=2, description="As `sampling.max_prompt_tokens`.")
    max_tokens: int = Field(512, ge=2, description="As data.max_tokens: the longest prompt with its reference.")
    policies: dict[str, PolicySection] = Field(min_length=1, description="Name in the tables -> policy.")
    decoding: DecodingSection = Field(default_factory=DecodingSection, description="The same for every policy.")
    scorers: dict[str, ScorerSection] = Field(
        default_factory=dict, description="Label -> scorer, as `scoring.scorer`. The first is the headline."
    )
    perplexity: PerplexityJudge | None = Field(None, description="Judge of the generated text. null: not measured.")
    references: str | list[str] | None = Field(
        None, description="Prompts with reference answers (ranked data: the best): their perplexity under each policy."
    )
    pairs: str | list[str] | None = Field(
        None,
        description="Ranked data whose order each policy's p_i is compared with: pair accuracy and Kendall's tau.",
    )
    best_of: list[int] = Field(default_factory=lambda: [1, 2, 4], description="Sizes n of best-of-n, at most k.")
    wins: WinsSection | None = Field(None, description="Win, tie and lose against one policy. null: not counted.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Of the bootstrap intervals.")
    resamples: int = Field(2000, ge=100, description="Bootstrap resamples.")
    examples: int = Field(8, ge=0, description="Prompts whose answers the report shows side by side.")
    seed: int = Field(0, ge=0, description="Of decoding and bootstrap.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens decoded or judged together; halved when memory is out.")
