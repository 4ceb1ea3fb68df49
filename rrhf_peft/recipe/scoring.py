"""The `scoring:` section: which responses, which scorer with which settings, and where the scored rows go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rrhf_peft.recipe.section import Filled, OutputPath, Paths, Section

DEFAULT_ASPECTS = {"relevance": 1.0, "correctness": 1.0, "coherence": 1.0, "safety": 1.0}


class _Strict(Section):
    """A section; `EFFORT` names the settings that change how long it takes and not what comes out."""

    EFFORT: ClassVar[frozenset[str]] = frozenset()


class RewardModelScorer(_Strict):
    """A reward model: one number for prompt and response."""

    EFFORT = frozenset({"batch_tokens"})

    name: Literal["reward_model"]
    model: Filled = Field(description="Hub id or folder; of a value-head checkpoint also its weight file.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    layout: Literal["sequence_classification", "value_head"] = Field(
        "sequence_classification", description="value_head: the layout of Dahoas/gptj-rm-static."
    )
    base: Filled | None = Field(
        None, description="value_head: the model it was trained from, where the checkpoint has no config.json."
    )
    tokenizer: Filled | None = Field(
        None, description="Hub id or folder of the tokenizer. Unset: the model's (or base's)."
    )
    template: Literal["raw", "hh", "alpaca", "chat", "pair", "response"] = Field(
        "raw",
        description="The text that is scored. raw, hh, alpaca, chat: as in `data`. pair: prompt and response as the "
        "tokenizer's two texts. response: the response alone.",
    )
    append_eos: bool | None = Field(
        None, description="End the text with EOS. Unset: only with value_head, which is read there."
    )
    max_tokens: int = Field(1024, ge=2, description="Longer texts lose their beginning. At most what the model reads.")
    label: int | str | None = Field(None, description="Of several labels, the one whose log-odds are the score.")
    values: list[float] | None = Field(
        None, description="What each label is worth: the score is the expected value under the model."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights. auto: bfloat16 on a GPU that computes in it, float32 elsewhere."
    )
    batch_tokens: int = Field(16384, ge=1, description="Padded tokens per batch; halved where the GPU's memory ends.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights. Off for a reason.")
    allow_pickle: bool = Field(
        False, description="Read pytorch_model.bin where there are no safetensors. Pickled files can hide code."
    )


class JudgeScorer(_Strict):
    """A language model behind an OpenAI-compatible endpoint."""

    EFFORT = frozenset(
        {
            "base_url",
            "api_key_env",
            "concurrency",
            "timeout",
            "max_retries",
            "first_wait",
            "reply_attempts",
            "max_requests",
            "max_total_tokens",
        }
    )

    name: Literal["judge"]
    base_url: Filled = Field(description="For example http://localhost:8000/v1.")
    model: Filled = Field(description="The name under which the server knows the judge.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if one is needed.")
    mode: Literal["score", "rank"] = Field(
        "score", description="score: a request per response. rank: one per group, its responses shuffled."
    )
    aspects: dict[str, float] = Field(
        default_factory=lambda: dict(DEFAULT_ASPECTS),
        min_length=1,
        description="Aspect and its weight; the score is the weighted mean.",
    )
    aspect_meanings: dict[str, str] = Field(
        default_factory=dict, description="What the judge is told about an aspect; for other aspects than the usual."
    )
    low: float = Field(0.0, description="Worst score of an aspect.")
    high: float = Field(10.0, description="Best score of an aspect.")
    instructions: str | None = Field(None, description="Further words to the judge.")
    temperature: float = Field(0.0, ge=0, description="Of the judge's decoding.")
    reply_tokens: int = Field(256, ge=1, description="Longest reply.")
    json_mode: bool = Field(False, description="Ask for response_format json_object, where the server knows it.")
    reply_attempts: int = Field(2, ge=1, description="How often a reply that breaks the form is asked for.")
    max_retries: int = Field(
        6, ge=0, le=1000, description="Further attempts after 408, 409, 429, 5xx, time-outs and cut lines."
    )
    first_wait: float = Field(
        1.0, ge=0, description="Seconds before the second attempt; doubled each time, at most 60."
    )
    timeout: float = Field(120.0, gt=0, description="Seconds until an attempt counts as failed.")
    concurrency: int = Field(8, ge=1, description="Requests under way at the same time, for each process.")
    max_requests: int | None = Field(
        None, ge=1, description="Stop after this many requests, for each process and each run of the command."
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="The same for tokens, prompt and reply, as the server counts them."
    )


class RuleScorer(_Strict):
    """A Python function."""

    name: Literal["rule"]
    function: Filled = Field(
        description="package.module:function of (prompt, responses) -> scores; rrhf_peft.score:vader is shipped.",
    )


class PolicyScorer(_Strict):
    """RRHF as a reward model: the length-normalised log-prob of the response under a policy."""

    EFFORT = frozenset({"batch_tokens"})

    name: Literal["policy"]
    model: Filled | None = Field(
        None, description="Hub id or folder. Unset: the recipe's model, with all of its settings."
    )
    adapter: Filled | None = Field(None, description="PEFT adapter to put on that model: a run folder or hub id.")
    template: Literal["raw", "hh", "alpaca", "chat"] = Field("raw", description="How prompt and response become text.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="As in `data`.")
    max_tokens: int = Field(512, ge=2, description="As in `data`.")
    length_penalty: float = Field(1.0, ge=0, description="Exponent a of |y| in Eq. 1 of arXiv 2304.05302.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens per batch; halved where the GPU's memory ends.")


class SourceScorer(_Strict):
    """Who wrote a response, as in SPIN: a human's answer above the policy's own."""

    name: Literal["source"]
    scores: dict[str, float] = Field(
        min_length=1,
        description='Pattern over source names and its score, {"provided*": 1.0, "*": 0.0}; the first that matches.',
    )


class HumanScorer(_Strict):
    """People's ranks: a blind sheet out first, then the filled copies in."""

    name: Literal["human"]
    sheet: Filled = Field(description="The sheet to write, .csv or .jsonl; its key is written beside it.")
    annotations: list[Filled] = Field(
        default_factory=list, description="Filled sheets, one for each annotator. Empty: write the sheet."
    )


class _WithDefaults(_Strict):
    weight: float = Field(1.0, ge=-1e6, le=1e6, description="Weight in a weighted_sum.")
    normalize: Literal["none", "zscore", "rank"] = Field(
        "none", description="Before combining. zscore: over the data. rank: share of its group that a response beats."
    )


SingleScorer = Annotated[
    RewardModelScorer | JudgeScorer | RuleScorer | PolicyScorer | SourceScorer | HumanScorer,
    Field(discriminator="name"),
]


class PartSection(_WithDefaults):
    """One scorer of a composite."""

    scorer: SingleScorer = Field(description="Any scorer but a composite.")


class CompositeScorer(_Strict):
    """Several scorers as one."""

    name: Literal["composite"]
    how: Literal["weighted_sum", "min", "reward_under_cost"] = Field(
        "weighted_sum", description="What the parts' scores become."
    )
    parts: dict[str, PartSection] = Field(description="Label and scorer; raw scores keep the label.")
    reward: str | None = Field(None, description="reward_under_cost: label of the reward.")
    cost: str | None = Field(None, description="reward_under_cost: label of the cost, which is to stay low.")
    cost_limit: float | None = Field(
        None, description="reward_under_cost: responses that cost more rank below all others."
    )


ScorerSection = Annotated[
    RewardModelScorer | JudgeScorer | RuleScorer | PolicyScorer | SourceScorer | HumanScorer | CompositeScorer,
    Field(discriminator="name"),
]


class ScoringSection(_Strict):
    """Candidates in, scored groups out."""

    input: Paths = Field(
        description="Candidates (prompt, responses, sources, meta) or ranked data, whose scores are kept as raw scores."
    )
    output: OutputPath = Field(description="The scored .jsonl file; its report and its failures are written beside it.")
    format: str = Field("auto", description="Importer of ranked input; auto recognises the columns.")
    split: str = Field("train", description="Split to read from hub ids and data set folders.")
    max_groups: int | None = Field(None, ge=1, description="Read only the first this many groups.")
    scorer: ScorerSection = Field(description="Who scores.")
    unit_groups: int = Field(
        16,
        ge=1,
        description="Groups scored and saved at a time: what a kill can lose. Changes no result but last digits.",
    )
    seed: int = Field(0, description="Of the shuffling in rankings and sheets.")

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> ScoringSection:
        for key, problem in _contradictions(self):
            raise ValueError(f"scoring.{key}: {problem}")
        return self


def _contradictions(scoring: ScoringSection) -> Iterator[tuple[str, str]]:
    """Yield (key inside scoring, what is wrong and how to fix it) for settings that cannot go together."""
    if not scoring.output.endswith(".jsonl"):
        yield "output", f"{scoring.output!r} must end in .jsonl"
    yield from scorer_contradictions(scoring.scorer)


def scorer_contradictions(scorer: Any) -> Iterator[tuple[str, str]]:
    """The same for a scorer of any kind, which stands under the key `scorer`."""
    if isinstance(scorer, CompositeScorer):
        yield from _composite_contradictions(scorer)
        for label, part in scorer.parts.items():
            yield from _single_contradictions(part.scorer, f"scorer.parts.{label}.scorer")
    else:
        yield from _single_contradictions(scorer, "scorer")


def _single_contradictions(scorer: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(scorer, RewardModelScorer):
        if scorer.label is not None and scorer.values is not None:
            yield f"{key}.values", "label and values are two ways to one score; remove one"
        if scorer.layout == "value_head" and (scorer.label is not None or scorer.values is not None):
            yield f"{key}.label", "a value head has a single output; remove label and values"
        if scorer.layout == "value_head" and (scorer.append_eos is False or scorer.template == "pair"):
            yield key, "a value head is read at the EOS that ends the text; remove append_eos: false and template: pair"
        if scorer.layout != "value_head" and scorer.base is not None:
            yield f"{key}.base", "is read with layout: value_head only; remove it"
    if isinstance(scorer, JudgeScorer):
        if scorer.low >= scorer.high:
            yield f"{key}.low", f"{scorer.low:g} must be below {key}.high = {scorer.high:g}"
        if any(weight < 0 for weight in scorer.aspects.values()) or not any(scorer.aspects.values()):
            yield f"{key}.aspects", "weights must not be negative, and one must be above 0"
        for aspect in scorer.aspects:
            if aspect not in DEFAULT_ASPECTS and aspect not in scorer.aspect_meanings:
                yield f"{key}.aspect_meanings", f"tell the judge what {aspect!r} means"
        for aspect in scorer.aspect_meanings:
            if aspect not in scorer.aspects:
                yield f"{key}.aspect_meanings", f"{aspect!r} is not among aspects; add it there with its weight"
    if isinstance(scorer, PolicyScorer) and (scorer.max_prompt_tokens or 1) >= scorer.max_tokens:
        yield f"{key}.max_prompt_tokens", "leaves no token of max_tokens for a response; lower it"
    if isinstance(scorer, HumanScorer) and not scorer.sheet.endswith((".csv", ".jsonl")):
        yield f"{key}.sheet", f"{scorer.sheet!r} must end in .csv or .jsonl"


def _composite_contradictions(scorer: CompositeScorer) -> Iterator[tuple[str, str]]:
    labels = ", ".join(scorer.parts)
    if len(scorer.parts) < 2:
        yield "scorer.parts", "a composite combines two scorers or more; add one, or name the scorer alone"
    under_cost = {"reward": scorer.reward, "cost": scorer.cost, "cost_limit": scorer.cost_limit}
    for key, value in under_cost.items():
        if scorer.how == "reward_under_cost" and value is None:
            yield f"scorer.{key}", "is required by how: reward_under_cost"
        if scorer.how != "reward_under_cost" and value is not None:
            yield f"scorer.{key}", "is read by how: reward_under_cost only; remove it"
    if scorer.how == "reward_under_cost":
        for key in ("reward", "cost"):
            if under_cost[key] not in scorer.parts:
                yield f"scorer.{key}", f"there is no part {under_cost[key]!r}; parts are {labels}"
        if len(scorer.parts) > 2 or scorer.reward == scorer.cost:
            yield "scorer.parts", "reward_under_cost combines two parts: a reward and a cost"
    for label, part in scorer.parts.items():
        if label == "input" or "." in label:
            yield (
                f"scorer.parts.{label}",
                "this name is taken for raw scores of the input or of aspects; choose another",
            )
        if part.weight != 1.0 and scorer.how != "weighted_sum":
            yield f"scorer.parts.{label}.weight", "is read by how: weighted_sum only; remove it"
        if isinstance(part.scorer, HumanScorer) and not part.scorer.annotations:
            yield f"scorer.parts.{label}.scorer.annotations", "a composite needs the filled sheets; name them"
