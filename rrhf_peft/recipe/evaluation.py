"""The `evaluation:` section: which policies, on which held-out prompts, measured how."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from rrhf_peft.recipe.sampling import READS, Strategy
from rrhf_peft.recipe.scoring import CompositeScorer, HumanScorer, JudgeScorer, ScorerSection, SourceScorer
from rrhf_peft.recipe.section import Filled, OutputPath, Paths, Section


class PolicySection(Section):
    """One policy: the recipe's model, another one, or an adapter on either.

    A run folder brings its recipe: template, limits, stop strings and quantisation are those of its training where
    this recipe does not set them.
    """

    model: Filled | None = Field(None, description="Hub id or folder, a merged one too. Unset: the recipe's model.")
    adapter: Filled | None = Field(None, description="PEFT adapter to put on that model: a run folder or hub id.")


class DecodingSection(Section):
    """How every policy answers the prompts; the same for all, so that they can be compared."""

    strategy: Strategy = Field("top_p", description="As in `sampling.candidates`.")
    k: int = Field(4, ge=1, description="Responses to each prompt.")
    max_new_tokens: int = Field(128, ge=1, description="A response that has not ended by then is cut.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits (top_p, diverse_beam).")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the fewest tokens that hold this probability (top_p).")


class PerplexityJudge(Section):
    """The model under which generated text is to be likely; the paper takes gpt2-medium."""

    model: Filled | None = Field(None, description="Hub id or folder. Unset: the recipe's model, without an adapter.")
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

    output: OutputPath = Field(description="The folder to write: samples, scores, numbers, table, plots.")
    prompts: Paths = Field(description="Held-out prompts, in any form that `sampling.prompts` takes.")
    format: str = Field("auto", description="Importer for ranked files; auto recognises the columns.")
    split: str = Field("test", description="Split to read from hub ids and folders.")
    template: Literal["raw", "hh", "alpaca", "chat"] | None = Field(
        None,
        description="As data.template in training. Unset: as the policies were trained, and raw where no run says.",
    )
    stop: list[str] | None = Field(None, description="As `sampling.stop`. Unset: as the policies were trained online.")
    max_prompts: int | None = Field(None, ge=1, description="Read only the first this many prompts.")
    max_prompt_tokens: int | None = Field(
        None, ge=2, description="As `sampling.max_prompt_tokens`. Unset: as the policies were trained."
    )
    max_tokens: int | None = Field(
        None,
        ge=2,
        description="As data.max_tokens: the longest prompt with its reference. Unset: as trained, and 512 where no "
        "run says.",
    )
    policies: dict[str, PolicySection] = Field(min_length=1, description="Name in the tables -> policy.")
    decoding: DecodingSection = Field(default_factory=DecodingSection, description="The same for every policy.")
    scorers: dict[str, ScorerSection] = Field(
        default_factory=dict, description="Label -> scorer, as `scoring.scorer`. The first is the headline."
    )
    perplexity: PerplexityJudge | None = Field(None, description="Judge of the generated text. null: not measured.")
    references: Paths | None = Field(
        None, description="Prompts with reference answers (ranked data: the best): their perplexity under each policy."
    )
    pairs: Paths | None = Field(
        None,
        description="Ranked data whose order each policy's p_i is compared with: pair accuracy and Kendall's tau.",
    )
    best_of: list[int] | None = Field(None, description="Sizes n of best-of-n, at most k. Unset: 1, 2, 4 ... up to k.")
    wins: WinsSection | None = Field(None, description="Win, tie and lose against one policy. null: not counted.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Of the bootstrap intervals.")
    resamples: int = Field(2000, ge=100, description="Bootstrap resamples.")
    examples: int = Field(8, ge=0, description="Prompts whose answers the report shows side by side.")
    seed: int = Field(0, ge=0, description="Of decoding and bootstrap.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens decoded or judged together; halved when memory is out.")

    @property
    def best_of_sizes(self) -> list[int]:
        """`best_of`, or 1, 2, 4 ... up to k."""
        if self.best_of is not None:
            return sorted(set(self.best_of))
        return [2**power for power in range(self.decoding.k.bit_length())]

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> EvaluationSection:
        for key, problem in _contradictions(self):
            raise ValueError(f"evaluation.{key}: {problem}")
        return self


#: Names of policies and scorers are parts of file names.
_NAME = re.compile(r"\w[\w .+=@-]*", flags=re.ASCII)


def _contradictions(evaluation: EvaluationSection) -> Iterator[tuple[str, str]]:
    """Yield (key inside evaluation, what is wrong and how to fix it) for settings that cannot go together."""
    for name in evaluation.policies:
        if not _NAME.fullmatch(name):
            yield f"policies.{name}", "names a file as well; use letters, digits, blanks and . + = @ - _ only"
    for label, scorer in evaluation.scorers.items():
        if not _NAME.fullmatch(label) or "." in label:
            yield f"scorers.{label}", "names a file as well; use letters, digits, blanks and + = @ - _ only"
        for problem in _scorer_problems(scorer):
            yield f"scorers.{label}", problem
    k, decoding = evaluation.decoding.k, evaluation.decoding
    for size in evaluation.best_of or []:
        if not 1 <= size <= k:
            yield "best_of", f"the best of {size} cannot be taken from {k} responses; raise decoding.k or remove it"
    for name in ("temperature", "top_p"):
        if getattr(decoding, name) != 1.0 and name not in READS[decoding.strategy]:
            yield f"decoding.{name}", f"has no effect with strategy {decoding.strategy}; remove it"
    if evaluation.wins is not None:
        yield from _wins_problems(evaluation, evaluation.wins)


def _scorer_problems(scorer: Any) -> Iterator[str]:
    """Why a scorer's numbers say nothing between policies, whose responses are scored apart."""
    if isinstance(scorer, CompositeScorer):
        if scorer.how == "reward_under_cost":
            yield "reward_under_cost ranks responses below the worst of the same policy; score reward and cost apart"
        for label, part in scorer.parts.items():
            if part.normalize != "none":
                yield f"part {label} is normalised within each policy, which hides what differs; remove normalize"
            yield from _scorer_problems(part.scorer)
    if isinstance(scorer, HumanScorer):
        yield "people rank the responses of one prompt, which gives no reward to average; use `rrhf-peft score`"
    if isinstance(scorer, SourceScorer):
        yield "scores who wrote a response, and here that is the policy; remove it"
    if isinstance(scorer, JudgeScorer) and scorer.mode == "rank":
        yield "ranks within a policy's own responses have the same mean for all; use mode: score, or wins.by"


def _wins_problems(evaluation: EvaluationSection, wins: WinsSection) -> Iterator[tuple[str, str]]:
    if wins.against not in evaluation.policies:
        yield "wins.against", f"there is no policy {wins.against!r}{_near(wins.against, evaluation.policies)}"
    elif len(evaluation.policies) == 1:
        yield "wins.against", "is the only policy; add another one to compare with it, or remove wins"
    if isinstance(wins.by, str) and wins.by not in evaluation.scorers:
        yield "wins.by", f"there is no scorer {wins.by!r}{_near(wins.by, evaluation.scorers)}"
    if not isinstance(wins.by, str) and wins.tie_margin:
        yield "wins.tie_margin", "is read with the reward of a scorer; a judge says itself what is a tie; remove it"


def _near(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known) or 'none'}"
