"""The recipe's schema: every key a YAML recipe may hold, typed and documented once, here.

`adapter` and `training` pass PEFT's and transformers' own field names through unchanged, so their
models are generated from `peft.LoraConfig` and `transformers.TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import Field, create_model, model_validator
from transformers import TrainingArguments

from rrhf_peft.recipe.compare import CompareSection, with_compare_paths
from rrhf_peft.recipe.evaluation import EvaluationSection
from rrhf_peft.recipe.objectives import ObjectiveSection, RRHFObjective, reference_contradictions
from rrhf_peft.recipe.online import OnlineSection, online_contradictions
from rrhf_peft.recipe.rounds import RoundsSection, rounds_contradictions, with_round_paths
from rrhf_peft.recipe.sampling import SamplingSection
from rrhf_peft.recipe.scoring import ScoringSection
from rrhf_peft.recipe.section import Filled, OutputPath, Paths, Section

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
    def _objective_is_rrhf_unless_named(cls, values: Any) -> Any:
        objective = values.get("objective") if isinstance(values, dict) else None
        if isinstance(objective, dict) and "name" not in objective:
            return {**values, "objective": {"name": "rrhf", **objective}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _rounds_set_their_paths(cls, values: Any) -> Any:
        return with_round_paths(values) if isinstance(values, dict) else values

    @model_validator(mode="before")
    @classmethod
    def _compare_sets_its_paths(cls, values: Any) -> Any:
        return with_compare_paths(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> Recipe:
        for key, problem in _contradictions(self):
            raise ValueError(f"{key}: {problem}")
        return self


def _contradictions(recipe: Recipe) -> typing.Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for settings that cannot go together."""
    if recipe.model is not None:
        yield from _model_contradictions(recipe)
    if recipe.data is not None:
        yield from _data_contradictions(recipe.data)
    if recipe.rounds is not None:
        yield from rounds_contradictions(recipe.sampling, recipe.scoring)
    training: Any = recipe.training
    if training is not None:
        if not training.output_dir:
            yield "training.output_dir", "is required: the run folder to write, for example runs/my-run"
        if training.bf16 and training.fp16:
            yield "training.fp16", "bf16 and fp16 exclude each other; remove one"
    if training is not None and recipe.data is not None:
        held_out = recipe.data.eval is not None or recipe.data.eval_size is not None
        if training.eval_strategy not in (None, "no") and not held_out:
            yield "training.eval_strategy", "needs held-out data; set data.eval or data.eval_size"
    if recipe.online is not None and recipe.rounds is not None:
        yield "online", "rounds train on what they have sampled and scored before; remove online or rounds"
    if recipe.compare is not None and (recipe.rounds is not None or recipe.online is not None):
        yield "compare", "trains once on ranked data; remove rounds and online"
    if recipe.online is not None:
        yield from online_contradictions(recipe.online, recipe.data, recipe.adapter, training)
    objective = recipe.objective
    if isinstance(objective, RRHFObjective):
        if objective.variant == "released" and objective.sft_reduction is not None:
            yield "objective.sft_reduction", "variant released always takes the mean over the padded length; remove it"
        if objective.rank_weight == 0 and objective.sft_weight == 0:
            yield "objective.rank_weight", "rank_weight and sft_weight are both 0: nothing would be trained"
    yield from reference_contradictions(
        objective,
        init_lora_weights=getattr(recipe.adapter, "init_lora_weights", None),
        adapter=recipe.adapter is not None or bool(recipe.model and recipe.model.init_adapter),
        online=recipe.online is not None,
    )


def _model_contradictions(recipe: Recipe) -> typing.Iterator[tuple[str, str]]:
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


def _data_contradictions(data: DataSection) -> typing.Iterator[tuple[str, str]]:
    if data.max_prompt_tokens is not None and data.max_prompt_tokens >= data.max_tokens:
        yield (
            "data.max_prompt_tokens",
            f"{data.max_prompt_tokens} leaves no token of data.max_tokens = {data.max_tokens} for a response; "
            "lower it or raise data.max_tokens",
        )
    if data.eval is not None and data.eval_size is not None:
        yield "data.eval_size", "data.eval already names held-out data; remove one of the two"
    if isinstance(data.eval_size, float) and data.eval_size >= 1:
        yield "data.eval_size", f"{data.eval_size} is a share and must be below 1; write an integer for a count"
