"""A recipe becomes a run folder: data, model, adapter, trainer, in the order a reader expects.

All that can be refused is refused before the run folder is touched. One run at a time works on a folder; the run that
it replaces (`--overwrite`) comes back when the new one ends before its first checkpoint.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_fsdp_enabled

from rrhf_peft.console import terminal
from rrhf_peft.data import DataReport, hold_out, open_groups, template_note, tokenize_groups, without_overlap
from rrhf_peft.files import begun_folder, check_output, disk_trouble, is_empty_folder, read_mark, replace_text, writing
from rrhf_peft.jobs import exclusive, launched_processes
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
from rrhf_peft.objectives import NEEDS_PAIRS
from rrhf_peft.progress import Advance
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.train.config import RRHFConfig, training_config
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
    write_model_card,
)
from rrhf_peft.train.trainer import RRHFTrainer

if TYPE_CHECKING:
    from rrhf_peft.train.online import PromptReport


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

        trainer, progress = make_trainer(recipe, args, tokenizer, splits, console)

        def begin() -> None:
            begun = held.enter_context(
                begun_folder(folder, verb="train", writes=WRITES, overwrite=overwrite, resume=not overwrite)
            )
            trainer.after_checkpoint = lambda: begun.keep(folder / f"checkpoint-{trainer.state.global_step}")
            remove_unfinished(folder, start.checkpoint)
            texts = {name: report.to_dict() for name, report in reports.items()}
            describe_run(folder, recipe, texts, _circumstances(recipe, args))
            trainer.write_card = lambda: write_model_card(folder, recipe, reports["train"], trainer.state.log_history)
            console.print(reports["train"])
            note = template_note(tokenizer, recipe.data.template)
            for line in (_summary(trainer), *([note] if note else []), *start.notes):
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


# ---- The data ----


def read_splits(recipe: Recipe) -> dict[str, Sequence[RankedGroup]]:
    """The groups of `train`, and of `eval` where the recipe names or holds out such data.

    `training.seed` decides which groups `data.eval_size` holds out. Of an online recipe the groups of `train` may
    have no responses.
    """
    data, training = recipe.data, recipe.training
    where: dict[str, Any] = {"format": data.format, "split": data.split, "max_groups": data.max_groups}
    seed = TrainingArguments.seed if training.seed is None else training.seed  # type: ignore[attr-defined]
    groups = {"train": open_groups(data.train, **where, needs="scores" if recipe.online is None else "prompt")}
    if data.eval is not None:
        groups["eval"] = open_groups(data.eval, format=data.format, split=data.eval_split, max_groups=data.max_groups)
    elif data.eval_size is not None:
        groups["train"], groups["eval"] = hold_out(groups["train"], data.eval_size, seed)
        if recipe.online is not None and not any(group.responses for group in groups["eval"]):
            raise UserError(
                "data.eval_size: online training needs no responses in data.train, but held-out data does, and there "
                "are none. Name ranked data in data.eval, or remove data.eval_size."
            )
    if data.overlap == "remove" and "eval" in groups:
        groups["train"] = without_overlap(groups["train"], groups["eval"])
    return groups


def tokenize_splits(
    recipe: Recipe, groups: dict[str, Sequence[RankedGroup]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same splits as tokens, each with its report.

    They are `TokenizedGroup` with a `DataReport`; of an online recipe, `train` is `OnlinePrompt` with a `PromptReport`.
    """
    data, online = recipe.data, recipe.online
    splits: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    for name, split in groups.items():
        if name == "train" and online is not None:
            from rrhf_peft.train.online import tokenize_prompts  # opens all of sampling

            splits[name], reports[name] = tokenize_prompts(
                split,
                tokenizer,
                template=data.template,
                max_prompt_tokens=data.max_prompt_tokens or data.max_tokens - online.decoding.max_new_tokens,
                overlong_prompt=data.overlong_prompt,
                keep_provided=online.keep_provided,
            )
            continue
        splits[name], reports[name] = tokenize_groups(
            split,
            tokenizer,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_tokens=data.max_tokens,
            overlong_prompt=data.overlong_prompt,
            needs_pairs=recipe.objective.name in NEEDS_PAIRS,
            min_score_gap=getattr(recipe.objective, "min_score_gap", 0.0),
        )
    return splits, reports


# ---- What is refused before anything is written ----


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
    if is_empty_folder(folder) or (resume and mark is not None and not is_run):  # killed before its first line
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


def make_trainer(
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
    if display:
        trainer.console = console
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


# ---- What is told while it trains ----


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`: one object per line with step, epoch and the metrics.

    Resuming drops the lines after the checkpoint and an earlier closing line, so the file reads as if nothing had
    happened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start afresh, or keep what was logged up to the step resumed from."""
        if not state.is_world_process_zero:
            return
        kept = [entry for entry in read_metrics(self.path) if _is_before(entry, state.global_step)]
        replace_text(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept if state.global_step > 0))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, **logs}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


class TrainingProgress(TrainerCallback):
    """Steps, time left, loss, pair accuracy, groups/s and, online, the reward: a bar, or lines without a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or terminal(stderr=True)
        self._advance: Advance | None = None
        self._shown = 0
        self._reward = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._shown = state.global_step
            self._advance = Advance(self.console, "training", state.max_steps, unit="steps", done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, unless the log that follows does."""
        if not control.should_log:
            self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers."""
        if self._advance is None or not logs:
            return
        if "rewards/mean" in logs:
            self._reward = f", reward {logs['rewards/mean']:.3f}"
        if "eval_loss" in logs:
            self._advance.note(f"step {state.global_step}: held out: {_numbers(logs, 'eval_')}")
        elif "loss" in logs:
            self._show(state, _numbers(logs, "") + self._reward)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the bar."""
        self.stop()

    def stop(self) -> None:
        """Put the terminal right, also when training ended in an error."""
        if self._advance is not None:
            self._advance.stop()

    def _show(self, state: TrainerState, text: str | None = None) -> None:
        if self._advance is not None:
            self._advance(state.global_step - self._shown, text=text)
            self._shown = state.global_step


def _is_before(entry: dict[str, Any], step: int) -> bool:
    """Whether a line was logged before a checkpoint at this step; the refresh of online training comes after it."""
    if "train_runtime" in entry:
        return False
    return entry["step"] < step if "refresh" in entry else entry["step"] <= step


def _numbers(logs: dict[str, Any], prefix: str) -> str:
    parts = [f"loss {logs[f'{prefix}loss']:.3f}"]
    for metric in ("rewards/accuracies", "pair_accuracy"):  # an objective's own order of pairs before p_i's
        if (accuracy := logs.get(f"{prefix}{metric}")) is not None:
            parts.append(f"pairs {accuracy:.0%}")
            break
    if (rate := logs.get(f"{prefix}groups_per_second")) is not None:
        parts.append(f"{rate:,.1f} groups/s" if rate < 100 else f"{rate:,.0f} groups/s")
    return ", ".join(parts)
