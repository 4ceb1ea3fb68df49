"""A recipe becomes a run folder: data, model, adapter, trainer, in the order a reader expects.

All that can be refused is refused before the run folder is touched. One run at a time works on a folder; the run that
it replaces (`--overwrite`) comes back when the new one ends before its first checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, get_scheduler, set_seed
from transformers.integrations import is_fsdp_enabled

from rrhf_peft.console import terminal
from rrhf_peft.data import DataReport
from rrhf_peft.files import begun_folder, check_output, disk_trouble, read_mark
from rrhf_peft.jobs import exclusive, launched_processes, not_all_came
from rrhf_peft.modeling import (
    attach_adapter,
    base_of,
    refuse_beyond_context,
    resolve_dtype,
    resolve_source,
    tokenizer_of,
    uses_checkpointing,
    weights_fingerprint,
)
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import UserError
from rrhf_peft.train.callbacks import MetricsFile, TrainingProgress
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.model_card import write_model_card
from rrhf_peft.train.run_folder import (
    METRICS,
    RECIPE,
    WRITES,
    Circumstances,
    checkpoint_to_resume,
    describe_run,
    input_changes,
    last_checkpoint,
    read_metrics,
    recipe_changes,
    remove_unfinished,
    weights_damage,
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
        was_finished: an earlier run of the same recipe on the same data had ended; nothing was done.
    """

    run_folder: Path
    metrics: dict[str, float]
    reports: dict[str, DataReport | PromptReport]
    was_finished: bool = False


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
        ignore_changes: resume although the recipe, the data, the base or the number of processes changed.
        console: where the report, notes and progress go; standard error by default.

    Raises:
        UserError: anything the user can fix; the run folder is untouched if it comes before training.
    """
    console = console or terminal(stderr=True)
    args = training_config(recipe)
    main = args.process_index == 0  # joins the other processes
    folder = Path(str(args.output_dir))
    # Resolved, so that resuming and merging on another machine read what was trained and not "auto".
    dtype = str(resolve_dtype(recipe.model.dtype, args.device)).removeprefix("torch.")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    with launched_processes() as processes, contextlib.ExitStack() as held:
        choices: dict[str, bool] = {"resume": resume, "ignore_changes": ignore_changes}
        processes.on_main(lambda: _refuse_folder(folder, recipe, resume=resume, overwrite=overwrite))
        held.enter_context(exclusive(folder, processes, goes_on=False))
        set_seed(args.seed)
        resolve_source(recipe.model.name, revision=recipe.model.revision)  # before anything that takes longer
        tokenizer = tokenizer_of(recipe.model, recipe.data.template)
        splits, reports = tokenize_splits(recipe, read_splits(recipe), tokenizer)
        start = _Start()
        if not overwrite:
            fingerprint = reports["train"].fingerprint
            start = processes.on_main(lambda: _where_to_start(folder, recipe, fingerprint, args, **choices))
        if start.is_finished:
            if main:
                console.print(f"{folder}: this run is finished already.", highlight=False, soft_wrap=True)
            return TrainOutcome(folder, _closing_numbers(folder), reports, was_finished=True)

        trainer, progress = _make_trainer(recipe, args, tokenizer, splits, console)

        def begin() -> None:
            begun = held.enter_context(
                begun_folder(folder, verb="train", writes=WRITES, overwrite=overwrite, resume=not overwrite)
            )
            trainer.after_checkpoint = begun.keep
            remove_unfinished(folder, start.checkpoint)
            texts = {name: report.to_dict() for name, report in reports.items()}
            describe_run(folder, recipe, texts, _circumstances(recipe, args))
            trainer.write_card = lambda: write_model_card(folder, recipe, reports["train"], trainer.state.log_history)
            console.print(reports["train"])
            for line in (_summary(trainer), *start.notes):
                console.print(line, highlight=False, soft_wrap=True)

        processes.on_main(begin)
        with _told_how_to_go_on(folder, trainer, console):
            try:
                result = trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
            finally:
                progress.stop()
            trainer.save_state()
            trainer.save_model()  # and uploads, where the recipe says so
            if trainer.write_card is not None:
                trainer.write_card()
            processes.wait_for_all()
    return TrainOutcome(folder, result.metrics, reports)


# ---- What is refused before anything is written ----


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


def _refuse_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder, as far as can be told without the data; changes nothing.

    Raises:
        UserError: the folder cannot be made, holds what the run reads, or another run.
    """
    data, model = recipe.data, recipe.model
    reads = [model.name, model.tokenizer, model.init_adapter]
    for where in (data.train, data.eval):
        reads += [where] if where is None or isinstance(where, str) else where
    key = "training.output_dir"
    check_output(folder, key=key, folder=True, reads=reads, overwrite=overwrite, continues=not overwrite)
    if overwrite or not folder.is_dir():
        return
    mark, is_run = read_mark(folder), (folder / RECIPE).is_file()
    is_empty = not any(folder.iterdir())
    if is_empty or (resume and mark is not None and not is_run):  # killed before its first line
        return
    changes = recipe_changes(folder, recipe) if is_run else []
    is_same_and_whole = is_run and mark is not None and mark.state == "whole" and not changes
    if not resume and not is_same_and_whole:
        changed = f" of another recipe ({_some(changes)})" if changes else ""
        raise UserError(
            f"{folder}: {key} already holds files{changed}. Pass --resume to continue that run, --overwrite to replace "
            "it, or choose another folder."
        )
    if resume and not is_run:
        raise UserError(f"{folder}: holds files but no run that could be continued. Choose another {key}.")


@dataclass(frozen=True)
class _Start:
    """Where a run starts: from the beginning, from a checkpoint, or not at all because it is finished."""

    checkpoint: Path | None = None
    is_finished: bool = False
    notes: tuple[str, ...] = ()


def _where_to_start(
    folder: Path, recipe: Recipe, fingerprint: str, args: RRHFConfig, *, resume: bool, ignore_changes: bool
) -> _Start:
    """Look at the folder, in which there is nothing, or a run of the same recipe; changes nothing.

    Raises:
        UserError: the data, the base model or the launch is not that of the run, or no checkpoint is whole.
    """
    if not (folder / RECIPE).is_file():
        return _Start(notes=("no run was begun here yet: starting from the beginning",) if resume else ())
    mark = read_mark(folder)
    is_whole = mark is not None and mark.state == "whole"
    read_metrics(folder / METRICS)
    now = _circumstances(recipe, args)
    changes = recipe_changes(folder, recipe) + input_changes(folder, fingerprint, now, processes=not is_whole)
    if changes and not ignore_changes:
        if resume:
            raise UserError(
                f"{folder}: cannot resume, because {_some(changes)}. Undo the change, choose another "
                "training.output_dir, or pass --ignore-changes to continue all the same."
            )
        raise UserError(
            f"{folder}: training.output_dir already holds files: a finished run, and {_some(changes)}. Pass "
            "--overwrite to replace it, or choose another folder."
        )
    if is_whole and not changes and weights_damage(folder) is None:
        return _Start(is_finished=True)
    checkpoint, passed = checkpoint_to_resume(folder, weights_suffice=ignore_changes)
    going_on = f"continuing from {checkpoint}" if checkpoint else "no whole checkpoint yet: starting from the beginning"
    return _Start(checkpoint, notes=(*passed, going_on))


def _circumstances(recipe: Recipe, args: RRHFConfig) -> Circumstances:
    model = recipe.model
    return Circumstances(
        processes=args.world_size,
        groups_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        base=weights_fingerprint(model.name, model.revision),
        init_adapter=weights_fingerprint(model.init_adapter) if model.init_adapter else None,
    )


def _closing_numbers(folder: Path) -> dict[str, float]:
    """The last line of a finished run's metrics."""
    closing = [entry for entry in read_metrics(folder / METRICS) if "train_runtime" in entry]
    return closing[-1] if closing else {}


# ---- The trainer ----


def _make_trainer(
    recipe: Recipe,
    args: RRHFConfig,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Any],
    console: Console,
) -> tuple[RRHFTrainer, TrainingProgress]:
    """Load the base, attach the adapter, and put both into a trainer."""
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
        callbacks=[MetricsFile(Path(str(args.output_dir)) / METRICS), *display],
    )
    return trainer, progress


def _trainer(recipe: Recipe, train_dataset: Any, **common: Any) -> RRHFTrainer:
    """The trainer of given groups, or of the policy's own answers where the recipe has `online:`."""
    online = recipe.online
    if online is None:
        return RRHFTrainer(train_dataset=train_dataset, **common)
    from rrhf_peft.sample.policies import decoding_of  # here: training on given groups opens none of sampling
    from rrhf_peft.train.online import OnlineTrainer, make_reward

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


def _summary(trainer: RRHFTrainer) -> str:
    model: Any = trainer.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    args, count = trainer.args, len(trainer.train_dataset)  # type: ignore[arg-type]
    what = "groups" if type(trainer) is RRHFTrainer else "prompts"
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (
        f"training {trained:,} parameters on {count:,} {what}, {per_step} per step "
        f"on {args.world_size} process{'es' * (args.world_size > 1)} ({args.device.type})"
    )


@contextlib.contextmanager
def _told_how_to_go_on(folder: Path, trainer: RRHFTrainer, console: Console) -> Iterator[None]:
    """Say what was kept, and how to continue, when training is interrupted or the disk takes no more."""
    try:
        yield
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            console.print(f"Interrupted {_progress(trainer)}. {_kept(folder)}", highlight=False, soft_wrap=True)
        raise
    except Exception as error:
        cause = error.__context__ if isinstance(error, UserError) and error.__context__ is not None else error
        trouble = disk_trouble(cause, folder)
        if trouble is None:
            raise
        raise UserError(f"{trouble} Training stopped {_progress(trainer)}. {_kept(folder)}") from error


def _progress(trainer: RRHFTrainer) -> str:
    return f"after step {trainer.state.global_step} of {trainer.state.max_steps}"


def _kept(folder: Path) -> str:
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return "No checkpoint was written yet (training.save_steps), so the same command would begin again."
    return f"{checkpoint} is kept: the same command with --resume continues from it."


def _some(changes: list[str]) -> str:
    """The changes in one line, not all of a long list."""
    return "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")


def _first_line(error: Exception) -> str:
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
