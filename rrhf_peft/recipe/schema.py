"""The recipe's schema: every key a YAML recipe may hold, typed and documented once, here.

`adapter` and `training` pass PEFT's and transformers' own field names through unchanged, so their
models are generated from `peft.LoraConfig` and `transformers.TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from peft import LoraConfig
from pydantic import Field, create_model, model_validator
from transformers import TrainingArguments

from rrhf_peft.recipe.stages import (
    CandidatesSection,
    EvaluationSection,
    Filled,
    OutputPath,
    Paths,
    RoundsSection,
    SamplingSection,
    ScorerSection,
    ScoringSection,
    Section,
    rounds_contradictions,
    with_round_paths,
)


def takes_from_base(init_lora_weights: object) -> bool:
    """Whether this initialisation moves a part of the base weights into the adapter.

    With such an adapter switched off, neither the base nor the starting policy is left.
    """
    return str(init_lora_weights).lower().startswith(("pissa", "olora", "loftq", "corda", "lora_ga"))


class RRHFObjective(Section):
    """The RRHF loss (arXiv 2304.05302), Eq. 1-5."""

    name: Literal["rrhf"] = "rrhf"
    variant: Literal["balanced", "paper", "released"] = Field(
        "balanced",
        description="balanced: Eq. 1-2 and a mean SFT loss. paper: Eq. 1-5 to the letter. released: the released "
        "code's arithmetic, which divides by the padded length.",
    )
    rank_weight: float = Field(1.0, ge=0, description="Weight of the ranking loss.")
    sft_weight: float = Field(1.0, ge=0, description="Weight of the fine-tuning loss on the best response.")
    length_penalty: float = Field(1.0, ge=0, description="Exponent a of |y| in Eq. 1.")
    margin: float = Field(0.0, description="Added inside the hinge of Eq. 2.")
    min_score_gap: float = Field(0.0, ge=0, description="Only pairs whose scores differ by more than this count.")
    pair_function: Literal["hinge", "logistic"] = Field(
        "hinge", description="hinge: max(0, d). logistic: log(1 + exp(d))."
    )
    pair_reduction: Literal["sum", "mean"] = Field("sum", description="Over the ordered pairs of a group.")
    sft_reduction: Literal["sum", "mean"] | None = Field(
        None, description="Over the best response's tokens. Unset: sum for paper, mean for balanced."
    )
    tied_best: Literal["first", "mean"] = Field(
        "first", description="Fine-tuning target when several responses share the best score."
    )

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.variant == "released" and self.sft_reduction is not None:
            yield "sft_reduction", "variant released always takes the mean over the padded length; remove it"
        if self.rank_weight == 0 and self.sft_weight == 0:
            yield "rank_weight", "rank_weight and sft_weight are both 0: nothing would be trained"


class SFTObjective(Section):
    """Fine-tuning on the best response only."""

    name: Literal["sft"]
    sft_reduction: Literal["sum", "mean"] = Field("mean", description="Over the best response's tokens.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


class _RankedObjective(Section):
    """What every objective on ordered pairs can be told."""

    pairs: Literal["all", "best_worst", "best_vs_rest"] = Field(
        "all", description="Which ordered pairs of a group: all, the best with the worst, or the best with each other."
    )
    min_score_gap: float = Field(0.0, ge=0, description="Only pairs whose scores differ by more than this count.")


class _WithReference(Section):
    """Objectives that cannot do without a reference policy."""

    reference: Literal["auto", "adapter_off", "cached"] = Field(
        "auto",
        description="Reference log-probs. adapter_off: the base, by a second forward pass with the adapter off. "
        "cached: the policy that training starts from, by one pass over the data before it. auto: adapter_off for a "
        "new adapter, else cached.",
    )


class _MayHaveReference(Section):
    """Objectives with and without a reference policy."""

    reference: Literal["none", "auto", "adapter_off", "cached"] = Field(
        "none", description="none: log-probs themselves are compared. Otherwise log-ratios; choices as for dpo."
    )


class _ImplicitReward(_WithReference):
    """Objectives on beta times the log-ratio to a reference policy."""

    beta: float = Field(0.1, gt=0, description="How hard the policy is held to the reference.")


class DPOObjective(_RankedObjective, _ImplicitReward):
    """Direct preference optimization (arXiv 2305.18290), Eq. 7."""

    name: Literal["dpo"]
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled wrongly.")


class IPOObjective(_RankedObjective, _WithReference):
    """Identity preference optimization (arXiv 2310.12036), Eq. 17."""

    name: Literal["ipo"]
    beta: float = Field(0.1, gt=0, description="tau: the difference of log-ratios is drawn to 1 / (2 beta).")
    average_log_prob: bool = Field(True, description="Log-ratios per token, as TRL does; false: sums, as the paper.")


class ODPOObjective(_RankedObjective, _ImplicitReward):
    """DPO with an offset from the score gap (arXiv 2402.10571)."""

    name: Literal["odpo"]
    alpha: float = Field(1.0, ge=0, description="How much the score gap counts; 0 is dpo.")
    offset: Literal["log", "linear"] = Field("log", description="alpha * log(gap), or alpha * gap.")


class SimPOObjective(_RankedObjective):
    """Simple preference optimization (arXiv 2405.14734), Eq. 6."""

    name: Literal["simpo"]
    beta: float = Field(2.0, gt=0, description="Scales the mean log-prob per token.")
    gamma: float = Field(0.5, description="Margin between two rewards (TRL's simpo_gamma).")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled wrongly.")


class ORPOObjective(_RankedObjective):
    """Odds ratio preference optimization (arXiv 2403.07691), Eq. 6."""

    name: Literal["orpo"]
    beta: float = Field(0.1, ge=0, description="lambda: weight of the odds ratio loss beside the fine-tuning loss.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


class _WithFineTuning(Section):
    """A ranking loss beside a weighted fine-tuning loss on the best response."""

    sft_weight: float = Field(1.0, ge=0, description="Weight of the fine-tuning loss on the best response.")
    sft_reduction: Literal["sum", "mean"] = Field("mean", description="Over the best response's tokens.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


class CPOObjective(_RankedObjective, _WithFineTuning):
    """Contrastive preference optimization (arXiv 2401.08417), Eq. 3; `sft_weight` is TRL's cpo_alpha."""

    name: Literal["cpo"]
    beta: float = Field(0.1, gt=0, description="Scales the difference of summed log-probs.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled wrongly.")


class KTOObjective(_ImplicitReward):
    """Kahneman-Tversky optimization (arXiv 2402.01306), Eq. 7."""

    name: Literal["kto"]
    desirable_weight: float = Field(1.0, ge=0, description="lambda_D.")
    undesirable_weight: float = Field(1.0, ge=0, description="lambda_U.")
    threshold: Literal["group_mean"] | float = Field(
        "group_mean", description="Scores above are desirable, those below not: a number, or each group's mean."
    )
    reference_point: Literal["batch", "group"] | Annotated[float, Field(ge=0)] = Field(
        "batch", description="z0: mean log-ratio of the micro-batch or of the group, at least 0; or a number of nats."
    )


class HingeObjective(_RankedObjective, _WithFineTuning, _MayHaveReference):
    """SLiC-HF (arXiv 2305.10425); with a reference and sft_weight 0, TRL's hinge form of DPO."""

    name: Literal["hinge"]
    beta: float = Field(1.0, gt=0, description="Scales log-probs, or log-ratios, before they are compared.")
    margin: float = Field(1.0, ge=0, description="delta inside the hinge.")
    length_penalty: float = Field(0.0, ge=0, description="Log-probs are divided by |y| to this power.")


class PlackettLuceObjective(_MayHaveReference):
    """The likelihood of the whole ranking (DPO's appendix A.3, LiPO's list-MLE)."""

    name: Literal["plackett_luce"]
    beta: float = Field(1.0, gt=0, description="Scales log-probs, or log-ratios, before they are compared.")
    length_penalty: float = Field(1.0, ge=0, description="Log-probs are divided by |y| to this power.")
    top_k: int | None = Field(None, ge=1, description="Only the first this many ranks. Unset: all.")


class PROObjective(_WithFineTuning):
    """Preference ranking optimization (arXiv 2306.17492)."""

    name: Literal["pro"]
    temperature: Literal["score_gap", "none"] = Field(
        "score_gap", description="score_gap: a contrast counts by its difference in score. none: all alike."
    )
    sft_weight: float = Field(0.05, ge=0, description="Weight of the fine-tuning loss, times (k - 1)^2.")
    sft_reduction: Literal["sum", "mean"] = Field("sum", description="Over the best response's tokens.")


class LiPOObjective(_ImplicitReward):
    """LiPO-lambda, LambdaLoss over a whole group (arXiv 2402.01878), Eq. 8."""

    name: Literal["lipo_lambda"]


class InfoNCAObjective(_ImplicitReward):
    """InfoNCA, cross-entropy between softmaxes of scores and of log-ratios (arXiv 2402.05369)."""

    name: Literal["info_nca"]
    alpha: float = Field(1.0, gt=0, description="Temperature of the scores, in their units.")


class NCAObjective(_ImplicitReward):
    """Noise contrastive alignment, which holds good responses' likelihood up (arXiv 2402.05369)."""

    name: Literal["nca"]
    alpha: float = Field(1.0, gt=0, description="Temperature of the scores, in their units.")


class MPOObjective(_ImplicitReward):
    """Multi-preference optimization, the responses above the mean against all (arXiv 2412.04628, first SWEPO)."""

    name: Literal["mpo"]
    alpha: float = Field(0.0, ge=0, description="How much a response's distance from the mean score counts.")
    deviation: Literal["absolute", "signed"] = Field("absolute", description="exp(alpha |d|), or exp(alpha d).")


class RPOObjective(_RankedObjective, _ImplicitReward):
    """Reward-aware preference optimization (arXiv 2502.00203); squared with eta 1 is REBEL (arXiv 2404.16767)."""

    name: Literal["rpo"]
    eta: float = Field(1.0, gt=0, description="Scale of the scores that the log-ratios are to follow.")
    distance: Literal["squared", "backward_kl", "forward_kl"] = Field(
        "backward_kl", description="Between a pair's difference in log-ratio and its difference in score."
    )


class GVPOObjective(_ImplicitReward):
    """Group variance policy optimization (arXiv 2504.19599): centred log-ratios follow centred scores."""

    name: Literal["gvpo"]


class QRPOObjective(_ImplicitReward):
    """Quantile reward policy optimization (arXiv 2507.08068): regression to a response's rank in its group."""

    name: Literal["qrpo"]


class _PolicyGradient(Section):
    """Online training with the policy's own responses; only with `online:`."""

    epsilon: float = Field(0.2, gt=0, lt=1, description="Ratios to the sampling policy count from 1 - epsilon on.")
    epsilon_high: float | None = Field(None, gt=0, description="And up to 1 + epsilon_high. Unset: epsilon.")


class RLOOObjective(_PolicyGradient):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740), clipped; the ratio is of whole responses."""

    name: Literal["rloo"]


class GRPOObjective(_PolicyGradient):
    """Group relative policy optimization (arXiv 2402.03300), clipped; the ratio is GSPO's, per response."""

    name: Literal["grpo"]
    scale_rewards: Literal["group", "none"] = Field(
        "group", description="group: advantages are divided by the group's standard deviation. none: as Dr. GRPO."
    )


ObjectiveSection = Annotated[
    RRHFObjective
    | SFTObjective
    | DPOObjective
    | IPOObjective
    | ODPOObjective
    | SimPOObjective
    | ORPOObjective
    | CPOObjective
    | KTOObjective
    | HingeObjective
    | PlackettLuceObjective
    | PROObjective
    | LiPOObjective
    | InfoNCAObjective
    | NCAObjective
    | MPOObjective
    | RPOObjective
    | GVPOObjective
    | QRPOObjective
    | RLOOObjective
    | GRPOObjective,
    Field(discriminator="name"),
]

#: What `objective.name` may be.
OBJECTIVE_NAMES = frozenset(
    section.model_fields["name"].annotation.__args__[0] for section in get_args(get_args(ObjectiveSection)[0])
)


def reference_contradictions(
    objective: Section, *, adapter: bool, init_lora_weights: Any, online: bool
) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for a reference policy that cannot be had.

    Args:
        objective: the section.
        adapter: whether an adapter is trained, a new one or one that is there already.
        init_lora_weights: of a new adapter.
        online: whether training makes new responses.
    """
    reference = getattr(objective, "reference", "none")
    if reference == "adapter_off" and not adapter:
        yield "objective.reference", "adapter_off needs an adapter, and all weights are trained; use cached"
    if reference == "adapter_off" and takes_from_base(init_lora_weights):
        yield (
            "objective.reference",
            f"adapter.init_lora_weights {init_lora_weights} moves a part of the base into the adapter, so that with "
            "the adapter off another model is left; use cached",
        )
    if reference == "cached" and online:
        yield "objective.reference", "online training makes new responses, which no cache holds; use adapter_off"


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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for name in ("model", "adapter", "endpoint"):
            if getattr(self.decoding, name) is not None:
                yield f"decoding.{name}", "the policy in training answers, and no other; remove it"
        if self.decoding.backend != "transformers":
            yield "decoding.backend", "the policy in training is decoded where it is; remove it"
        parts = self.scorer.parts.values() if self.scorer.name == "composite" else []
        if "human" in [self.scorer.name, *(part.scorer.name for part in parts)]:
            yield (
                "scorer",
                "training does not wait for people; use another scorer, or rrhf-peft sample, score and train",
            )


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


class CompareSection(Section):
    """What `rrhf-peft compare` reads, beside `model`, `data`, `training` and `evaluation`.

    Only the objective differs between the runs. The section `objective` and the paths (training.output_dir,
    evaluation.output and policies) are set by the comparison and left out of the recipe.
    """

    output: OutputPath = Field(description="The folder of all runs; each has a folder with its name in it.")
    objectives: dict[str, ObjectiveSection] = Field(
        min_length=1, description="Name in the table -> objective; a name that is an objective's own says the kind."
    )
    only: list[str] | None = Field(None, min_length=1, description="Train and compare only these. Unset: all.")

    @property
    def names(self) -> list[str]:
        """The runs, in the order of the table."""
        return [name for name in self.objectives if self.only is None or name in self.only]

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for name in self.only or []:
            if name not in self.objectives:
                yield "only", f"there is no objective {name!r}; there are {', '.join(self.objectives)}"


def compared_run(output: str, name: str) -> str:
    """Where the run of one objective is."""
    return f"{output.rstrip('/')}/{name}"


def with_compare_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's unchecked values with the first objective and the paths filled in; without `compare`, as they are.

    So the single verbs (`inspect`, `plan`, `train`, `evaluate`) understand the recipe as well.

    Raises:
        ValueError: one of these is set to something else.
    """
    compare = values.get("compare")
    objectives = compare.get("objectives") if isinstance(compare, dict) else None
    output = compare.get("output") if isinstance(compare, dict) else None
    if not isinstance(objectives, dict) or not objectives or not isinstance(output, str):
        return values
    assert isinstance(compare, dict)
    named = {
        name: {"name": name, **item} if isinstance(item, dict) and name in OBJECTIVE_NAMES else item
        for name, item in objectives.items()
    }
    filled = {**values, "compare": {**compare, "objectives": named}}
    only = compare.get("only")
    names = [name for name in named if not isinstance(only, list) or name in only] or list(named)
    first = named[names[0]]
    chosen = values.get("objective")
    if isinstance(chosen, dict) and isinstance(first, dict) and chosen.get("name") != first.get("name"):
        raise ValueError("objective: is set by compare.objectives; remove it")
    filled["objective"] = chosen or first
    weights = "model" if "adapter" in values and values["adapter"] is None else "adapter"
    policies = {"base": {}, **{name: {weights: compared_run(output, name)} for name in names}}
    for section, key, value in (
        ("training", "output_dir", compared_run(output, names[0])),
        ("evaluation", "output", f"{output.rstrip('/')}/evaluation"),
        ("evaluation", "policies", policies),
    ):
        inside = filled.get(section)
        if not isinstance(inside, dict):
            continue
        if _without_nulls(inside.get(key, value)) != value:
            raise ValueError(f"{section}.{key}: is set by compare, in {output}; remove it")
        filled[section] = {**inside, key: value}
    return filled


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


Quantization = Literal["none", "int8", "nf4", "fp4"]
Layout = Literal["auto", "shared", "plain"]
Format = Literal[
    "auto",
    "ranked",
    "rrhf",
    "rm_static",
    "llama_factory",
    "hh",
    "preference",
    "ultrafeedback",
    "nectar",
    "helpsteer2",
    "summarize_comparisons",
    "stack_exchange_paired",
    "shp",
    "pku_saferlhf",
    "pku_saferlhf:safer",
    "pro",
    "oasst",
    "alpaca_farm",
    "lmflow",
]
Template = Literal["raw", "hh", "alpaca", "chat"]


class ModelSection(Section):
    """Which base model to train, and how its weights are held."""

    name: Filled = Field(description="Hub id or local folder of the base model.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    tokenizer: Filled | None = Field(None, description="Hub id or folder of the tokenizer, if not the model's own.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the unquantised weights. auto: bfloat16 on a GPU that computes in it, float32 elsewhere.",
    )
    quantization: Quantization = Field(
        "none", description="How the frozen base is stored. nf4 with double_quant is QLoRA."
    )
    double_quant: bool = Field(True, description="Quantise the 4-bit blocks' scales as well (nf4 and fp4 only).")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "sdpa", description="Attention implementation. The shared layout needs sdpa, eager or flex_attention."
    )
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights. Off for a reason.")
    allow_pickle: bool = Field(
        False,
        description="Read weights from pytorch_model.bin where there are no safetensors. Pickled files can hide code.",
    )
    init_adapter: Filled | None = Field(
        None, description="Continue training this PEFT adapter instead of a new one; leave out `adapter`."
    )


class DataSection(Section):
    """Where ranked responses come from and how they become tokens."""

    train: Paths = Field(
        description="Files (.jsonl .json .parquet .csv), folders of them, or hub ids; a list is concatenated."
    )
    eval: Paths | None = Field(None, description="Held-out ranked data, same format as `train`.")
    eval_size: int | float | None = Field(
        None, gt=0, description="Hold out this many groups (int) or this share (float below 1) of `train`."
    )
    overlap: Literal["keep", "remove"] = Field(
        "keep",
        description="remove takes groups out of `train` whose prompt is held out, up to case, punctuation and white "
        "space; `rrhf-peft inspect` counts them.",
    )
    split: str = Field("train", description="Split to read from hub ids and data set folders.")
    eval_split: str = Field("test", description="The same for `eval`.")
    format: Format = Field("auto", description="Importer; auto recognises the columns.")
    template: Template = Field("raw", description="How a prompt becomes text; chat is the tokenizer's own template.")
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="Longer prompts lose their beginning. Unset: max_tokens less the group's longest response, but at "
        "least half of max_tokens.",
    )
    max_tokens: int = Field(512, ge=2, description="Prompt plus response; longer responses lose their end and EOS.")
    overlong_prompt: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What happens to a prompt longer than its limit."
    )
    max_groups: int | None = Field(None, ge=1, description="Read only the first this many groups.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.max_prompt_tokens is not None and self.max_prompt_tokens >= self.max_tokens:
            yield (
                "max_prompt_tokens",
                f"{self.max_prompt_tokens} leaves no token of data.max_tokens = {self.max_tokens} for a response; "
                "lower it or raise data.max_tokens",
            )
        if self.eval is not None and self.eval_size is not None:
            yield "eval_size", "data.eval already names held-out data; remove one of the two"
        if isinstance(self.eval_size, float) and self.eval_size >= 1:
            yield "eval_size", f"{self.eval_size} is a share and must be below 1; write an integer for a count"


class EngineSection(Section):
    """How response log-probs are computed. Changes speed and memory, never the result."""

    layout: Layout = Field(
        "auto",
        description="shared: the prompt once for its k responses. plain: one row per response. auto: shared where "
        "the model allows it, proved on the first batch.",
    )
    chunk_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Split a micro-batch into chunks of about this many tokens; bounds the peak memory."
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Recompute each layer in the backward pass. auto: on for models over 1B parameters."
    )


def _plain_type(hint: Any) -> Any:
    """A type hint reduced to what YAML can say: enums become their values, foreign classes anything."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(member.value for member in hint)]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        members = [_plain_type(argument) for argument in arguments]
        if Any in members:
            return Any
        if any(typing.get_origin(member) is Literal for member in members):
            members = [member for member in members if member is not str]  # the enum's values are all there is
        return typing.Union[tuple(members)]  # noqa: UP007 - built at run time
    if origin is Literal:
        return str if any("[" in str(argument) for argument in arguments) else hint
    if origin in (list, dict):
        return origin
    return hint if hint in (int, float, bool, str, dict, list, type(None)) else Any


def _model_of(name: str, source: type, doc: str, leave_out: set[str], limits: dict[str, Any]) -> type[Section]:
    """A strict model with the fields of a configuration dataclass, each optional and unset by default."""
    hints = typing.get_type_hints(source)
    fields: dict[str, Any] = {}
    for item in dataclasses.fields(source):
        if item.init and item.name not in leave_out:
            description = str(item.metadata.get("help", "")).strip()
            kind = limits.get(item.name, _plain_type(hints[item.name]))
            fields[item.name] = (kind if kind is Any else kind | None, Field(None, description=description))
    return create_model(name, __base__=Section, __doc__=doc, **fields)


_COUNT = Annotated[int, Field(ge=1)]
_ABOVE_0 = Annotated[float, Field(gt=0)]

AdapterSection = _model_of(
    "AdapterSection",
    LoraConfig,
    "peft.LoraConfig fields, names unchanged; `adapter: null` trains all weights.",
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    | {"inference_mode", "runtime_config", "megatron_config", "megatron_core"},
    {"r": _COUNT, "lora_alpha": _COUNT, "lora_dropout": Annotated[float, Field(ge=0, lt=1)]},
)
TrainingSection = _model_of(
    "TrainingSection",
    TrainingArguments,
    "transformers.TrainingArguments fields, names unchanged.",
    {"gradient_checkpointing", "activation_checkpointing", "remove_unused_columns", "label_names"}
    | {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "label_smoothing_factor", "debug"},
    {
        "output_dir": OutputPath,
        **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon"), _ABOVE_0),
        **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _ABOVE_0),
        **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "eval_delay"), Annotated[float, Field(ge=0)]),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)]),
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
        **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), _COUNT),
        **dict.fromkeys(("seed", "data_seed"), Annotated[int, Field(ge=0, lt=2**32)]),
        "dataloader_num_workers": Annotated[int, Field(ge=0)],
        "max_steps": Literal[-1] | _COUNT,
    },
)

#: Keys that exist elsewhere but not here, with where to turn instead.
MOVED_KEYS = {
    "extends": "is read in recipe files only, at their top level; write it there",
    "training.gradient_checkpointing": "set engine.gradient_checkpointing instead",
    "training.activation_checkpointing": "set engine.gradient_checkpointing instead",
    "training.resume_from_checkpoint": "pass --resume on the command line instead",
    "training.remove_unused_columns": "the data columns are fixed; remove the key",
    "training.label_smoothing_factor": "set objective.label_smoothing where the objective has it, or remove the key",
    "objective.simpo_gamma": "set objective.gamma instead",
    "objective.cpo_alpha": "set objective.sft_weight instead",
    "objective.loss_type": "set objective.name instead",
    "training.max_length": "set data.max_tokens instead",
    "data.max_length": "set data.max_tokens instead",
    "data.max_prompt_length": "set data.max_prompt_tokens instead",
    "data.max_seq_length": "set data.max_tokens instead",
    "training.max_seq_length": "set data.max_tokens instead",
    "training.warmup_ratio": "set training.warmup_steps to a share below 1 instead, for example 0.03",
    "training.lr": "set training.learning_rate instead",
    "training.epochs": "set training.num_train_epochs instead",
    "training.batch_size": "set training.per_device_train_batch_size instead (in groups)",
    "adapter.rank": "set adapter.r instead",
    "adapter.alpha": "set adapter.lora_alpha instead",
    "adapter.dropout": "set adapter.lora_dropout instead",
    "model.load_in_4bit": "set model.quantization: nf4 instead",
    "model.load_in_8bit": "set model.quantization: int8 instead",
    "model.torch_dtype": "set model.dtype instead",
    "model.model_name_or_path": "set model.name instead",
}


def _absent() -> Any:
    return None


class Recipe(Section):
    """What one run does; each verb needs some of the sections.

    `model`, `data` and `training` are annotated as present although they may be left out (and are None then):
    `load_recipe` refuses a recipe without the sections that its caller needs.
    """

    model: ModelSection = Field(default_factory=_absent, description="The base model.")
    adapter: AdapterSection | None = Field(  # type: ignore[valid-type]
        default_factory=AdapterSection,
        description="peft.LoraConfig fields. Left out: LoRA on all linear layers. null: train all weights.",
    )
    data: DataSection = Field(default_factory=_absent, description="Ranked responses to train on.")
    objective: ObjectiveSection = Field(default_factory=RRHFObjective, description="The loss and its options.")
    engine: EngineSection = Field(default_factory=EngineSection, description="Layout, chunks, checkpointing.")
    training: TrainingSection = Field(  # type: ignore[valid-type]
        default_factory=_absent, description="transformers.TrainingArguments fields."
    )
    sampling: SamplingSection | None = Field(None, description="What `rrhf-peft sample` reads.")
    scoring: ScoringSection | None = Field(None, description="What `rrhf-peft score` reads.")
    online: OnlineSection | None = Field(None, description="Sample again from the policy while it is trained (OP-k).")
    evaluation: EvaluationSection | None = Field(None, description="What `rrhf-peft evaluate` reads.")
    rounds: RoundsSection | None = Field(None, description="What `rrhf-peft rounds` reads.")
    compare: CompareSection | None = Field(None, description="What `rrhf-peft compare` reads.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The kind of an objective that names none, and the paths that rounds and compare set."""
        if not isinstance(values, dict):
            return values
        values = with_round_paths(with_compare_paths(values))
        objective = values.get("objective")
        if isinstance(objective, dict) and "name" not in objective:
            values = {**values, "objective": {"name": "rrhf", **objective}}
        return values

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.model is not None:
            yield from _model_contradictions(self)
        if self.rounds is not None:
            yield from rounds_contradictions(self.sampling, self.scoring)
        training: Any = self.training
        if training is not None:
            if not training.output_dir:
                yield "training.output_dir", "is required: the run folder to write, for example runs/my-run"
            if training.bf16 and training.fp16:
                yield "training.fp16", "bf16 and fp16 exclude each other; remove one"
        if training is not None and self.data is not None:
            held_out = self.data.eval is not None or self.data.eval_size is not None
            if training.eval_strategy not in (None, "no") and not held_out:
                yield "training.eval_strategy", "needs held-out data; set data.eval or data.eval_size"
        if self.online is not None and self.rounds is not None:
            yield "online", "rounds train on what they have sampled and scored before; remove online or rounds"
        if self.compare is not None and (self.rounds is not None or self.online is not None):
            yield "compare", "trains once on ranked data; remove rounds and online"
        if self.online is not None:
            yield from online_contradictions(self.online, self.data, self.adapter, training)
        objective = self.objective
        if isinstance(objective, _PolicyGradient):
            if self.online is None:
                yield (
                    "objective.name",
                    f"{objective.name} learns from responses that the policy samples while it is trained; add a "
                    "section online (rrhf-peft recipes copy online shows one), or take another objective",
                )
            elif self.online.keep_provided:
                yield (
                    "online.keep_provided",
                    f"{objective.name} learns from the policy's own responses alone; set it to false",
                )
        yield from reference_contradictions(
            objective,
            init_lora_weights=getattr(self.adapter, "init_lora_weights", None),
            adapter=self.adapter is not None or bool(self.model and self.model.init_adapter),
            online=self.online is not None,
        )


def _model_contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model = recipe.model
    if model.quantization != "none" and recipe.adapter is None:
        yield (
            "adapter",
            f"null trains all weights, but {model.quantization} weights cannot be trained; "
            + ("set model.quantization: none, or give an adapter"),
        )
    if model.init_adapter and recipe.adapter != AdapterSection():
        yield "adapter", "model.init_adapter brings its own adapter settings; remove one of the two"
    if recipe.engine.layout == "shared" and model.attention == "flash_attention_2":
        yield "engine.layout", "shared needs an attention mask that flash_attention_2 cannot take; use sdpa or plain"
