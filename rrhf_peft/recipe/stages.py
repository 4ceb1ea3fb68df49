"""The sections of the verbs around training, and what every section of a recipe is.

`sampling:` which prompts, which policies answer them, how each decodes. `scoring:` which responses, which scorer.
`evaluation:` which policies, on which held-out prompts, measured how. `rounds:` all of them in turn, again and again.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A strict mapping: no unknown keys, no silent conversions, no NaN, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)

    #: Settings that change how long it takes and not what comes out.
    EFFORT: ClassVar[frozenset[str]] = frozenset()

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Yield (key inside the section, what is wrong and how to fix it) for settings that cannot go together."""
        return ()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Section:
        for key, problem in self.contradictions():
            raise ValueError(f"{key}: {problem}")
        return self


def _names_something_new(path: str) -> str:
    """`path`, unless it is a folder that everybody has: what is written there would lie among other things."""
    parts = os.path.normpath(path.strip()).split(os.sep)
    if all(part in ("", ".", "..", "~") for part in parts):
        raise PydanticCustomError("refused", "is no path to write to; name a new one inside a folder, as in runs/first")
    return path


#: Text that says something: a path or name that is empty or blank comes from a shell variable that is not set.
Filled = Annotated[str, StringConstraints(pattern=r"\S")]
#: A path that a command writes to.
OutputPath = Annotated[Filled, AfterValidator(_names_something_new)]
#: One place that is read from, or several.
Paths = Filled | Annotated[list[Filled], Field(min_length=1)]


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


class ServerSection(Section):
    """A server that speaks OpenAI's HTTP API: how it is reached, how hard it is tried, and what it may cost."""

    EFFORT = frozenset(
        {
            "base_url",
            "api_key_env",
            "concurrency",
            "timeout",
            "max_retries",
            "first_wait",
            "max_requests",
            "max_total_tokens",
            "max_cost",
            "prompt_price",
            "completion_price",
        }
    )

    base_url: Filled = Field(description="For example http://localhost:8000/v1.")
    model: Filled = Field(description="The name under which the server knows the model.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if one is needed.")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of every request, as this server knows them."
    )
    concurrency: int = Field(8, ge=1, description="Requests under way at the same time, for each process.")
    timeout: float = Field(120.0, gt=0, description="Seconds until an attempt counts as failed.")
    max_retries: int = Field(
        6, ge=0, le=1000, description="Further attempts after 408, 409, 429, 5xx, time-outs and cut lines."
    )
    first_wait: float = Field(
        1.0, ge=0, description="Seconds before the second attempt; doubled each time, at most 60."
    )
    max_requests: int | None = Field(
        None, ge=1, description="Stop after this many requests, for each process and each run of the command."
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="The same for tokens, prompt and reply, as the server counts them."
    )
    max_cost: float | None = Field(None, gt=0, description="The same for money, by the two prices.")
    prompt_price: float | None = Field(None, ge=0, description="Of a million tokens of prompts, for max_cost.")
    completion_price: float | None = Field(None, ge=0, description="Of a million tokens of replies, for max_cost.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            yield "max_cost", "needs what tokens cost; set prompt_price and completion_price"


class EndpointSection(ServerSection):
    """A server whose model answers prompts."""

    EFFORT = ServerSection.EFFORT | {"use_n"}

    api: Literal["chat", "completions"] = Field(
        "chat",
        description="chat sends messages and leaves the template to the server; completions sends the templated text.",
    )
    use_n: bool = Field(
        False,
        description="Ask for all candidates of a prompt in one request, which bills the prompt once, where the server "
        "takes n. Their lengths in tokens are not told apart then.",
    )


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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        # Those that are not at their defaults, which a snapshot writes out as well.
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for name in sorted(changed & (_STRATEGY_SETTINGS - READS[self.strategy])):
            yield name, f"has no effect with strategy {self.strategy}; remove it"
        if self.strategy != "top_p" and self.beams < self.k:
            yield "k", f"{self.k} responses cannot come from {self.beams} beams; raise num_beams"
        if self.beams % self.beam_groups:
            yield "num_beam_groups", f"{self.beams} beams do not split into {self.beam_groups} equal groups"
        if (self.backend == "endpoint") != (self.endpoint is not None):
            yield "endpoint", "goes with backend: endpoint, and only with it; set both or neither"
        if self.endpoint is not None and (self.model or self.adapter):
            yield (
                "model",
                "an endpoint serves its own weights; name them as endpoint.model, and remove model and adapter",
            )
        if self.backend == "endpoint" and self.strategy != "top_p":
            yield "strategy", f"{self.strategy} is not a part of OpenAI's API; use top_p"
        if self.backend == "vllm" and self.strategy == "diverse_beam":
            yield "strategy", "vllm has no diverse beam search; use backend: transformers"
        if self.backend == "vllm" and "early_stopping" in changed:
            yield "early_stopping", "vllm's beam search has no such setting; remove it"


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
    unit_prompts: int | None = Field(
        None,
        ge=1,
        description="Prompts finished and written at a time: what a kill can lose. Changes no result. Unset: 32, and "
        "128 of 512 prompts or more, which fill batches better; 32 with an endpoint.",
    )

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not self.candidates and not self.keep_provided:
            yield (
                "candidates",
                "is empty and keep_provided is false, so there is nothing to write; change one of the two",
            )


DEFAULT_ASPECTS = {"relevance": 1.0, "correctness": 1.0, "coherence": 1.0, "safety": 1.0}


class RewardModelScorer(Section):
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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.label is not None and self.values is not None:
            yield "values", "label and values are two ways to one score; remove one"
        if self.layout == "value_head":
            if self.label is not None or self.values is not None:
                yield "label", "a value head has a single output; remove label and values"
            if self.append_eos is False or self.template == "pair":
                yield (
                    "template" if self.template == "pair" else "append_eos",
                    "a value head is read at the EOS that ends the text; remove append_eos: false and template: pair",
                )
        elif self.base is not None:
            yield "base", "is read with layout: value_head only; remove it"


class JudgeScorer(ServerSection):
    """A language model behind an OpenAI-compatible endpoint."""

    EFFORT = ServerSection.EFFORT | {"reply_attempts"}

    name: Literal["judge"]
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
    reasoning: bool = Field(
        False, description="Let the judge think aloud first; its verdict ends the reply. Raise reply_tokens with it."
    )
    prompt_template: Filled | None = Field(
        None,
        description="Your own question in place of the built-in one, with {prompt}, {response} (mode rank: "
        "{responses}, labelled A, B ...) and the row's other columns in braces. It has to ask for the reply's form.",
    )
    score_pattern: Filled | None = Field(
        None,
        description="Regular expression with a group that holds the score, as in 'Score: ([0-9.]+)'; the last match in "
        "the reply counts. Instead of JSON and aspects, with prompt_template and mode score.",
    )
    both_orders: bool = Field(
        False,
        description="mode rank: rank each group in two opposite orders; scores are means, agreement is reported.",
    )
    temperature: float = Field(0.0, ge=0, description="Of the judge's decoding.")
    reply_tokens: int = Field(256, ge=1, description="Longest reply.")
    json_mode: bool = Field(False, description="Ask for response_format json_object, where the server knows it.")
    reply_attempts: int = Field(2, ge=1, description="How often a reply that breaks the form is asked for.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from super().contradictions()
        if self.score_pattern is not None:
            if self.prompt_template is None or self.mode != "score":
                yield "score_pattern", "reads the answer to a prompt_template in mode score; set both"
            try:
                if re.compile(self.score_pattern).groups < 1:
                    yield "score_pattern", "has no group (...) that would hold the score"
            except re.error as error:
                yield "score_pattern", f"is no regular expression ({error})"
        needed = "{response}" if self.mode == "score" else "{responses}"
        if self.prompt_template is not None and needed not in self.prompt_template:
            yield "prompt_template", f"says nowhere where {needed} stands"
        if self.both_orders and self.mode != "rank":
            yield "both_orders", "is for mode: rank; remove it"
        if self.low >= self.high:
            yield "low", f"{self.low:g} must be below high = {self.high:g}"
        if any(weight < 0 for weight in self.aspects.values()) or not any(self.aspects.values()):
            yield "aspects", "weights must not be negative, and one must be above 0"
        for aspect in self.aspects:
            if aspect not in DEFAULT_ASPECTS and aspect not in self.aspect_meanings:
                yield "aspect_meanings", f"tell the judge what {aspect!r} means"
        for aspect in self.aspect_meanings:
            if aspect not in self.aspects:
                yield "aspect_meanings", f"{aspect!r} is not among aspects; add it there with its weight"


class RuleScorer(Section):
    """A Python function."""

    EFFORT = frozenset({"processes"})

    name: Literal["rule"]
    function: Filled = Field(
        description="package.module:function of (prompt, responses, **columns) -> scores, or of TRL's (prompts, "
        "completions, **columns); rrhf_peft.score:vader and rrhf_peft.score:math_answer are shipped.",
    )
    timeout: float | None = Field(
        None, gt=0, description="Seconds that the rule may take for one group, which has no scores otherwise."
    )
    processes: int = Field(1, ge=1, description="Groups scored at the same time, by processes beside this one.")


class PolicyScorer(Section):
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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if (self.max_prompt_tokens or 1) >= self.max_tokens:
            yield "max_prompt_tokens", "leaves no token of max_tokens for a response; lower it"


class SourceScorer(Section):
    """Who wrote a response, as in SPIN: a human's answer above the policy's own."""

    name: Literal["source"]
    scores: dict[str, float] = Field(
        min_length=1,
        description='Pattern over source names and its score, {"provided*": 1.0, "*": 0.0}; the first that matches.',
    )


class HumanScorer(Section):
    """People's ranks: a blind sheet out first, then the filled copies in."""

    name: Literal["human"]
    sheet: Filled = Field(description="The sheet to write, .csv or .jsonl; its key is written beside it.")
    annotations: list[Filled] = Field(
        default_factory=list, description="Filled sheets, one for each annotator. Empty: write the sheet."
    )

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not self.sheet.endswith((".csv", ".jsonl")):
            yield "sheet", f"{self.sheet!r} must end in .csv or .jsonl"


SingleScorer = Annotated[
    RewardModelScorer | JudgeScorer | RuleScorer | PolicyScorer | SourceScorer | HumanScorer,
    Field(discriminator="name"),
]


class PartSection(Section):
    """One scorer of a composite."""

    weight: float = Field(1.0, ge=-1e6, le=1e6, description="Weight in a weighted_sum.")
    normalize: Literal["none", "zscore", "rank"] = Field(
        "none", description="Before combining. zscore: over the data. rank: share of its group that a response beats."
    )
    scorer: SingleScorer = Field(description="Any scorer but a composite.")


class CompositeScorer(Section):
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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if len(self.parts) < 2:
            yield "parts", "a composite combines two scorers or more; add one, or name the scorer alone"
        under_cost = {"reward": self.reward, "cost": self.cost, "cost_limit": self.cost_limit}
        for key, value in under_cost.items():
            if self.how == "reward_under_cost" and value is None:
                yield key, "is required by how: reward_under_cost"
            if self.how != "reward_under_cost" and value is not None:
                yield key, "is read by how: reward_under_cost only; remove it"
        if self.how == "reward_under_cost":
            for key in ("reward", "cost"):
                if under_cost[key] not in self.parts:
                    yield key, f"there is no part {under_cost[key]!r}; parts are {', '.join(self.parts)}"
            if len(self.parts) > 2 or self.reward == self.cost:
                yield "parts", "reward_under_cost combines two parts: a reward and a cost"
        for label, part in self.parts.items():
            if label == "input" or "." in label:
                problem = "this name is taken for raw scores of the input or of aspects; choose another"
                yield f"parts.{label}", problem
            if part.weight != 1.0 and self.how != "weighted_sum":
                yield f"parts.{label}.weight", "is read by how: weighted_sum only; remove it"
            if isinstance(part.scorer, HumanScorer) and not part.scorer.annotations:
                yield f"parts.{label}.scorer.annotations", "a composite needs the filled sheets; name them"


ScorerSection = Annotated[
    RewardModelScorer | JudgeScorer | RuleScorer | PolicyScorer | SourceScorer | HumanScorer | CompositeScorer,
    Field(discriminator="name"),
]


class ScoringSection(Section):
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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not self.output.endswith(".jsonl"):
            yield "output", f"{self.output!r} must end in .jsonl"


#: Names of policies and scorers are parts of file names.
_NAME = re.compile(r"\w[\w .+=@-]*", flags=re.ASCII)


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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for name in self.policies:
            if not _NAME.fullmatch(name):
                yield f"policies.{name}", "names a file as well; use letters, digits, blanks and . + = @ - _ only"
        for label, scorer in self.scorers.items():
            if not _NAME.fullmatch(label) or "." in label:
                yield f"scorers.{label}", "names a file as well; use letters, digits, blanks and + = @ - _ only"
            for problem in _scorer_problems(scorer):
                yield f"scorers.{label}", problem
        k, decoding = self.decoding.k, self.decoding
        for size in self.best_of or []:
            if not 1 <= size <= k:
                yield "best_of", f"the best of {size} cannot be taken from {k} responses; raise decoding.k or remove it"
        for name in ("temperature", "top_p"):
            if getattr(decoding, name) != 1.0 and name not in READS[decoding.strategy]:
                yield f"decoding.{name}", f"has no effect with strategy {decoding.strategy}; remove it"
        if self.wins is not None:
            yield from _wins_problems(self, self.wins)


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


class RoundsSection(Section):
    """What `rrhf-peft rounds` reads, beside `model`, `sampling`, `scoring`, `training` and `evaluation`.

    Their paths (sampling.output, scoring.input and output, data.train, training.output_dir, evaluation.output and
    policies) are set by the rounds and left out of the recipe. Entries of `sampling.candidates` that name no model,
    adapter or endpoint are the current policy. Round n draws with sampling.seed + n - 1 and trains with
    training.seed + n - 1, so that no round repeats the draws of another.
    """

    output: OutputPath = Field(description="The folder of all rounds; each has a folder of its own in it.")
    count: int = Field(3, ge=1, description="n of IP-n. May be raised later, to go on from the last round.")
    start_from: Literal["last", "base"] = Field(
        "last",
        description="last: each round trains the policy of the round before further. base: each trains the recipe's "
        "model anew, on what the policy of the round before has sampled.",
    )
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="Each round takes the next this many prompts, from the start again at the end. "
        "Unset: every round takes them all.",
    )


def round_paths(output: str, number: int) -> dict[str, dict[str, str]]:
    """Section -> key -> where round `number` (from 1) writes and reads."""
    folder = f"{output.rstrip('/')}/round-{number}"
    candidates, scored = f"{folder}/candidates.jsonl", f"{folder}/scored.jsonl"
    return {
        "sampling": {"output": candidates},
        "scoring": {"input": candidates, "output": scored},
        "data": {"train": scored},
        "training": {"output_dir": f"{folder}/run"},
        "evaluation": {"output": f"{folder}/evaluation"},
    }


def with_round_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's unchecked values with the paths of its first round filled in; without `rounds`, as they are.

    The first round's, so that the single verbs (`inspect`, `plan`, `train` ...) understand the recipe as well.

    Raises:
        ValueError: a path is set to something else.
    """
    rounds = values.get("rounds")
    output = rounds.get("output") if isinstance(rounds, dict) else None
    if not isinstance(output, str) or not output:
        return values
    filled = dict(values)
    for section, paths in round_paths(output, 1).items():
        own = values.get(section, {})
        if not isinstance(own, dict) or (section == "evaluation" and section not in values):
            continue  # no such section, or one that the schema refuses
        for key, path in paths.items():
            if own.get(key, path) != path:
                raise ValueError(f"{section}.{key}: is set by rounds, in {output}; remove it")
        if section in values or section in ("data", "training"):
            filled[section] = {**own, **paths}
    if isinstance(filled.get("evaluation"), dict):
        policies = filled["evaluation"].get("policies")
        if policies not in (None, {"base": {}}, {"base": {"model": None, "adapter": None}}):
            raise ValueError("evaluation.policies: is set by rounds (base, round-1 ...); remove it")
        if filled["evaluation"].get("wins") is not None:
            raise ValueError(
                "evaluation.wins: compares policies of one evaluation, and each round has its own; remove it, and "
                "compare the run folders with `rrhf-peft evaluate` afterwards"
            )
        filled["evaluation"]["policies"] = {"base": {}}
    return filled


def is_current_policy(entry: Any) -> bool:
    """Whether an entry of `sampling.candidates` stands for the policy that is being trained."""
    return entry.model is None and entry.adapter is None and entry.endpoint is None


def rounds_contradictions(
    sampling: SamplingSection | None, scoring: ScoringSection | None
) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for settings that cannot go together with `rounds`."""
    if sampling is not None and not any(map(is_current_policy, sampling.candidates)):
        yield (
            "sampling.candidates",
            "no entry is the policy that the rounds train, so that every round would sample the same; "
            "leave model, adapter and endpoint out of one entry",
        )
    scorer = None if scoring is None else scoring.scorer
    parts = [part.scorer for part in scorer.parts.values()] if isinstance(scorer, CompositeScorer) else [scorer]
    if any(isinstance(part, HumanScorer) for part in parts):
        yield (
            "scoring.scorer",
            "people rank one file of candidates, and every round makes another; run sample, score and train one by one",
        )
