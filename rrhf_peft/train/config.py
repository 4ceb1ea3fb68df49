"""`RRHFConfig`: transformers.TrainingArguments plus what ranking needs, in TRL's manner; and a recipe as one.

Defaults that differ from transformers' are the ones a LoRA run on ranked responses wants.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from rrhf_peft.jobs import not_all_came
from rrhf_peft.objectives import OBJECTIVES
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.messages import did_you_mean
from rrhf_peft.recipe.schema import OBJECTIVE_NAMES, ObjectiveSection
from rrhf_peft.records import UserError


@dataclass
class RRHFConfig(TrainingArguments):
    """Arguments of `RRHFTrainer`. A batch counts groups: `per_device_train_batch_size=4` is 4 prompts.

    Attributes:
        objective: name in `rrhf_peft.objectives.OBJECTIVES`.
        objective_options: that objective's keyword arguments (`variant`, `rank_weight` ...).
        reference: where reference log-probs come from: adapter_off, cached, auto (adapter_off for a new adapter, else
            cached) or none. Unset: auto for objectives that need a reference, none for the others.
        layout: shared, plain, or auto (shared, proved on the first batch).
        chunk_tokens: tokens per chunk of a micro-batch; bounds peak memory, not the result.
        template: how prompts become text, for data that is not tokenised yet.
        max_prompt_tokens: longer prompts lose their beginning.
        max_tokens: prompt plus response.
        overlong_prompt: truncate, drop or error.

    Raises:
        UserError: an objective or an option that does not exist, or a value it cannot have.
    """

    learning_rate: float = field(default=1e-4)
    logging_steps: float = field(default=1)
    save_strategy: str = field(default="epoch")
    report_to: str | list[str] | None = field(default="none")
    bf16: bool | None = field(default=None)  # type: ignore[assignment]

    objective: str = field(default="rrhf")
    objective_options: dict[str, Any] = field(default_factory=dict)
    reference: Literal["none", "auto", "adapter_off", "cached"] | None = field(default=None)
    layout: Literal["auto", "shared", "plain"] = field(default="auto")
    chunk_tokens: int | Literal["auto"] = field(default="auto")
    template: Literal["raw", "hh", "alpaca", "chat"] = field(default="raw")
    max_prompt_tokens: int | None = field(default=None)
    max_tokens: int = field(default=512)
    overlong_prompt: Literal["truncate", "drop", "error"] = field(default="truncate")

    def __post_init__(self) -> None:
        _check_objective(self.objective, self.objective_options)
        if not torch.accelerator.is_available():
            # Else a launcher's processes would each train alone: without it transformers joins only GPUs.
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and _computes_bf16()
        self.remove_unused_columns = False
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available() and not self.use_cpu
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter weight is used by every batch
        super().__post_init__()
        if self.n_gpu > 1:
            # Without a launcher transformers would wrap the model in DataParallel, which cuts a
            # GroupBatch along its flat token dimension. One process drives one GPU.
            self._n_gpu = 1


def training_config(recipe: Recipe) -> RRHFConfig:
    """The recipe's training, objective, engine and data sections as `RRHFConfig`, tried on a model of four weights.

    Raises:
        UserError: a value that transformers, the optimizer or the scheduler refuses.
    """
    fields: dict[str, Any] = recipe.training.model_dump(exclude_none=True)  # type: ignore[attr-defined]
    wanted = fields.get("report_to") or []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
            raise UserError(f"training.report_to: {name} is not installed. Run: pip install 'rrhf-peft[{name}]'.")
    try:
        args = _config(recipe, fields)
    except UserError:
        raise
    except torch.distributed.DistError as error:
        raise not_all_came(error) from None
    except Exception as error:  # whatever a library makes of a value
        key = next((key for key in fields if _is_accepted(recipe, {**fields, key: None})), None)
        start = (
            f"training.{key}: transformers refuses {fields[key]!r}" if key else "training: transformers refuses these"
        )
        raise UserError(f"{start} ({_first_line(error)}). Change or remove it.") from error
    _try_optimizer(args)
    return args


def _config(recipe: Recipe, fields: dict[str, Any]) -> RRHFConfig:
    return RRHFConfig(
        **{key: value for key, value in fields.items() if value is not None},
        objective=recipe.objective.name,
        objective_options=recipe.objective.model_dump(exclude={"name", "reference"}),
        reference=getattr(recipe.objective, "reference", None),
        layout=recipe.engine.layout,
        chunk_tokens=recipe.engine.chunk_tokens,
        template=recipe.data.template,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_tokens=recipe.data.max_tokens,
        overlong_prompt=recipe.data.overlong_prompt,
    )


def _is_accepted(recipe: Recipe, fields: dict[str, Any]) -> bool:
    with contextlib.suppress(Exception):
        return _config(recipe, fields) is not None
    return False


def _try_optimizer(args: RRHFConfig) -> None:
    """Build the optimizer and the schedule, and take no step; those that need the whole model are tried with it."""
    if args.deepspeed is not None:
        return  # its own file configures both
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, nn.Linear(2, 2))  # type: ignore[arg-type]
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or "optimizer_dict" in options:
            return
        weights = options.pop("params", [nn.Parameter(torch.zeros(2, 2, device=args.device))])
        optimizer = kind(weights, **options)
    except Exception as error:
        raise UserError(
            f"training.optim: {getattr(args.optim, 'value', args.optim)} cannot be made with training.learning_rate, "
            f"training.optim_args and the training.adam_* settings ({_first_line(error)}). Change them."
        ) from error
    try:
        name, given, steps = args.lr_scheduler_type, args.lr_scheduler_kwargs, 10
        get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, given)  # type: ignore[arg-type]
    except Exception as error:
        raise UserError(
            f"training.lr_scheduler_type: {getattr(name, 'value', name)} cannot be made with "
            f"training.lr_scheduler_kwargs {given or {}} ({_first_line(error)}). Change one of the two."
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_objective(name: str, options: dict[str, Any]) -> None:
    """The same words from Python as from a recipe: an objective or an option that does not exist, or cannot be.

    Raises:
        UserError: with the nearest name.
    """
    if name not in OBJECTIVES:
        raise UserError(
            f"objective: there is no {name!r}{did_you_mean(str(name), OBJECTIVES)}. Known: {', '.join(OBJECTIVES)}."
        )
    known = {
        option
        for option, parameter in inspect.signature(OBJECTIVES[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and option != "reference"
    }
    for option in options:
        if option not in known:
            raise UserError(
                f"objective_options: {name} has no option {option!r}{did_you_mean(str(option), known)}. "
                f"It has {', '.join(sorted(known))}."
            )
    if name in OBJECTIVE_NAMES:  # one that was added in Python checks its values itself
        try:
            TypeAdapter(ObjectiveSection).validate_python({"name": name, **options})
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(
                f"objective_options: {problem['loc'][1]} {problem['input']!r} of {name} cannot be: {problem['msg']}."
            ) from None


def _computes_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
