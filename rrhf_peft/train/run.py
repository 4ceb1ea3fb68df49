"""A recipe becomes a run folder: data, model, adapter, trainer, in the order a reader expects."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.integrations import is_fsdp_enabled

from rrhf_peft.console import terminal
from rrhf_peft.data import DataReport
from rrhf_peft.modeling import (
    attach_adapter,
    base_of,
    refuse_beyond_context,
    resolve_dtype,
    resolve_source,
    tokenizer_of,
    uses_checkpointing,
)
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import UserError
from rrhf_peft.sample.policies import decoding_of
from rrhf_peft.train.callbacks import MetricsFile, TrainingProgress
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.model_card import write_model_card
from rrhf_peft.train.online import OnlineTrainer, make_reward
from rrhf_peft.train.run_folder import (
    METRICS,
    describe_run,
    last_checkpoint,
    open_run_folder,
    refuse_changes,
    refuse_occupied,
)
from rrhf_peft.train.splits import PromptReport, read_splits, tokenize_splits
from rrhf_peft.train.trainer import RRHFTrainer


@dataclass(frozen=True)
class TrainOutcome:
    """What a finished run leaves.

    Attributes:
        run_folder: the adapter (or model), its tokenizer, recipe, reports, metrics and checkpoints.
        metrics: the trainer's closing numbers (train_loss, train_runtime in seconds ...).
        reports: data reports by split; of online training, `train` is a `PromptReport`.
    """

    run_folder: Path
    metrics: dict[str, float]
    reports: dict[str, DataReport | PromptReport]


def train_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ignore_changes: bool = False,
    console: Console | None = None,
) -> TrainOutcome:
    """Train what a recipe describes; under a launcher every process calls it.

    Args:
        recipe: checked recipe.
        resume: continue from the last whole checkpoint; from the start if there is none.
        overwrite: replace an existing run folder.
        ignore_changes: resume although the recipe or the data changed.
        console: where the report, notes and progress go; standard error by default.

    Raises:
        UserError: anything the user can mend; the run folder is untouched if it comes before training.
    """
    console = console or terminal(stderr=True)
    args = training_config(recipe)
    main = args.process_index == 0  # joins the other processes
    folder = Path(str(args.output_dir))
    if main:
        refuse_occupied(folder, resume=resume, overwrite=overwrite)
    set_seed(args.seed)
    # Resolved, so that resuming and merging on another machine read what was trained and not "auto".
    dtype = str(resolve_dtype(recipe.model.dtype, args.device)).removeprefix("torch.")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})

    resolve_source(recipe.model.name, revision=recipe.model.revision)  # before anything that takes longer
    tokenizer = tokenizer_of(recipe.model)
    splits, reports = tokenize_splits(recipe, read_splits(recipe), tokenizer)
    if resume and not ignore_changes:
        refuse_changes(folder, recipe, reports["train"].fingerprint)
    base = base_of(recipe.model, tokenizer, device=_loading_device(args))
    refuse_beyond_context(base.config, recipe.data.max_tokens, "data.max_tokens", recipe.model.name)
    args.gradient_checkpointing = uses_checkpointing(recipe.engine.gradient_checkpointing, base.num_parameters())
    base.config.pad_token_id = tokenizer.pad_token_id
    if base.generation_config is not None:
        base.generation_config.pad_token_id = tokenizer.pad_token_id
    fields = None if recipe.adapter is None or recipe.model.init_adapter else recipe.adapter.model_dump()
    model = attach_adapter(base, fields, init_adapter=recipe.model.init_adapter)
    progress = TrainingProgress(console)
    display = [] if args.disable_tqdm else [progress]
    args.disable_tqdm = True  # ours shows what matters here
    trainer = _trainer(
        recipe,
        splits["train"],
        model=model,
        args=args,
        eval_dataset=splits.get("eval"),
        processing_class=tokenizer,
        callbacks=[MetricsFile(folder / METRICS), *display],
    )

    with args.main_process_first(desc="run folder"):
        if main:
            open_run_folder(folder, overwrite=overwrite)
            describe_run(folder, recipe, {name: report.to_dict() for name, report in reports.items()})
            console.print(reports["train"])
            console.print(_summary(model, trainer), highlight=False)
    checkpoint = last_checkpoint(folder) if resume else None
    if resume and main:
        start = (
            f"continuing from {checkpoint}" if checkpoint else "no whole checkpoint yet: starting from the beginning"
        )
        console.print(start, highlight=False, soft_wrap=True)
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()
    trainer.save_model()
    trainer.save_state()
    if main:
        write_model_card(folder, recipe, reports["train"], trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return TrainOutcome(folder, result.metrics, reports)


def training_config(recipe: Recipe) -> RRHFConfig:
    """The recipe's training, objective, engine and data sections as `RRHFConfig`.

    Raises:
        UserError: a value that transformers refuses.
    """
    fields: dict[str, Any] = recipe.training.model_dump(exclude_none=True)  # type: ignore[attr-defined]
    options = recipe.objective.model_dump(exclude={"name", "reference"})
    wanted = fields.get("report_to") or []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
            raise UserError(f"training.report_to: {name} is not installed. Run: pip install 'rrhf-peft[{name}]'.")
    try:
        return RRHFConfig(
            **fields,
            objective=recipe.objective.name,
            objective_options=options,
            reference=getattr(recipe.objective, "reference", None),
            layout=recipe.engine.layout,
            chunk_tokens=recipe.engine.chunk_tokens,
            template=recipe.data.template,
            max_prompt_tokens=recipe.data.max_prompt_tokens,
            max_tokens=recipe.data.max_tokens,
            overlong_prompt=recipe.data.overlong_prompt,
        )
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"training: transformers refuses these settings ({error}). Change or remove them.") from None


def _trainer(recipe: Recipe, train_dataset: Any, **common: Any) -> RRHFTrainer:
    """The trainer of given groups, or of the policy's own answers where the recipe has `online:`."""
    online = recipe.online
    if online is None:
        return RRHFTrainer(train_dataset=train_dataset, **common)
    source = online.decoding.source or f"{online.decoding.strategy}:online"
    return OnlineTrainer(
        train_dataset=train_dataset,
        reward=make_reward(online.scorer, recipe, online.seed, train_dataset, source),
        every=online.every,
        decoding=decoding_of(online.decoding, online),
        own_source=source,
        kl_coefficient=online.kl_coefficient,
        kl_reduction=online.kl_reduction,
        seed=online.seed,
        batch_tokens=online.batch_tokens,
        **common,
    )


def _loading_device(args: RRHFConfig) -> torch.device:
    """Where this process puts the weights: its own device, or the host where FSDP or ZeRO will share them out."""
    sharded = is_fsdp_enabled() or args.deepspeed is not None
    return torch.device("cpu") if sharded else args.device


def _summary(model: Any, trainer: RRHFTrainer) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    args, count = trainer.args, len(trainer.train_dataset)  # type: ignore[arg-type]
    what = "prompts" if isinstance(trainer, OnlineTrainer) else "groups"
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (
        f"training {trained:,} parameters on {count:,} {what}, {per_step} per step "
        f"on {args.world_size} process{'es' * (args.world_size > 1)} ({args.device.type})"
    )
