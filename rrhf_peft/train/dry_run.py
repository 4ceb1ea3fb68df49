"""`rrhf-peft train --dry-run`: the data, the longest groups' steps, the memory and the time, before a run is begun.

The model, the adapter and the trainer are the run's; the run folder is not touched.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rrhf_peft.data import template_note
from rrhf_peft.modeling import tokenizer_of
from rrhf_peft.plan.run import plan_memory
from rrhf_peft.progress import duration
from rrhf_peft.recipe import Recipe, make_recipe, recipe_text
from rrhf_peft.records import TokenizedGroup, UserError
from rrhf_peft.train.run import make_trainer, read_splits, tokenize_splits, training_config

#: The first step also proves the engine and warms the device up; the last is timed.
STEPS = 2


@dataclass(frozen=True)
class DryRun:
    """What a few steps on the longest groups showed.

    Attributes:
        groups: That training would go through in an epoch.
        groups_per_step: In an optimizer step.
        steps: Of the whole run.
        longest_tokens: Of the longest group, its prompt counted once.
        step_seconds: Of an optimizer step on the longest groups.
        estimated_seconds: Of the whole run's steps, by its tokens; without evaluation and saving.
        planned_bytes: Peak memory as `rrhf-peft plan` predicts it.
        peak_bytes: Peak memory as the device counted it; None on a CPU.
        free_bytes: Memory that was free before the model was loaded.
    """

    groups: int
    groups_per_step: int
    steps: int
    longest_tokens: int
    step_seconds: float
    estimated_seconds: float
    planned_bytes: int
    peak_bytes: int | None
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        gib = 2**30
        measured = "" if self.peak_bytes is None else f", {self.peak_bytes / gib:.1f} GiB measured"
        fits = "fits" if (self.peak_bytes or self.planned_bytes) <= self.free_bytes else "DOES NOT FIT"
        return [
            f"memory: {self.planned_bytes / gib:.1f} GiB planned{measured}, {self.free_bytes / gib:.1f} GiB free: "
            f"{fits}",
            f"longest group: {self.longest_tokens:,} tokens; a step of {self.groups_per_step} such groups takes "
            f"{self.step_seconds:.2f} s",
            f"the run: {self.steps:,} steps over {self.groups:,} groups, about {duration(self.estimated_seconds)} "
            "without evaluation and saving",
        ]


class _StepTimes(TrainerCallback):
    """When each optimizer step began and ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop it, when the device is done."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._began)


def dry_run(recipe: Recipe, console: Console) -> DryRun:
    """Read the data, and train a few steps on its longest groups, on one process.

    Args:
        recipe: A checked recipe that trains on given groups.
        console: Where the data report goes.

    Raises:
        UserError: whatever training would refuse; online training, which has no responses yet.
    """
    if recipe.online is not None:
        raise UserError("--dry-run: online training has no responses before it runs. Remove --dry-run.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--dry-run: runs on one process. Give the command without a launcher.")
    wanted = training_config(recipe)
    tokenizer = tokenizer_of(recipe.model)
    splits, reports = tokenize_splits(recipe, read_splits(recipe), tokenizer)
    console.print(reports["train"])
    if (note := template_note(tokenizer, recipe.data.template)) is not None:
        console.print(note, highlight=False, soft_wrap=True)
    groups: list[TokenizedGroup] = list(splits["train"])
    per_step = wanted.per_device_train_batch_size * wanted.gradient_accumulation_steps
    batch = wanted.per_device_train_batch_size  # what is in memory at once; accumulating takes only time
    longest = sorted(groups, key=tokens_of, reverse=True)[:batch]
    longest = (longest * batch)[:batch]  # small data comes more than once
    on_gpu = wanted.device.type == "cuda"
    free = torch.cuda.mem_get_info(wanted.device)[0] if on_gpu else _free_host_bytes()
    planned = plan_memory(recipe, device="cuda" if on_gpu else "cpu").peak_bytes
    with tempfile.TemporaryDirectory() as scratch:
        short = _shortened(recipe, scratch)
        args, times = training_config(short), _StepTimes()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(args.device)
        trainer, progress = make_trainer(short, args, tokenizer, {"train": longest * STEPS}, console)
        trainer.add_callback(times)
        try:
            trainer.train()
        finally:
            progress.stop()
        peak = torch.cuda.max_memory_allocated(args.device) if on_gpu else None
    steps = wanted.max_steps if wanted.max_steps > 0 else int(-(-len(groups) // per_step) * wanted.num_train_epochs)
    seconds = times.seconds[-1] * wanted.gradient_accumulation_steps
    share = sum(map(tokens_of, groups)) / len(groups) * batch / sum(map(tokens_of, longest))
    return DryRun(
        groups=len(groups),
        groups_per_step=per_step,
        steps=steps,
        longest_tokens=tokens_of(longest[0]),
        step_seconds=seconds,
        estimated_seconds=seconds * share * steps,
        planned_bytes=planned,
        peak_bytes=peak,
        free_bytes=free,
    )


def tokens_of(group: TokenizedGroup) -> int:
    """Tokens that the engine computes for a group: its prompt once, and its responses."""
    return len(group.prompt_ids) + sum(map(len, group.response_ids))


def _shortened(recipe: Recipe, folder: str) -> Recipe:
    """The recipe for a few steps into a scratch folder, with no logs, checkpoints or evaluations."""
    values = yaml.safe_load(recipe_text(recipe))
    values["training"].update(
        output_dir=str(Path(folder, "run")),
        max_steps=STEPS,
        gradient_accumulation_steps=1,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        push_to_hub=False,
        logging_strategy="no",
        disable_tqdm=True,
    )
    for key in ("eval", "eval_size"):
        values["data"].pop(key, None)
    return make_recipe(values, where="the recipe, shortened")


def _free_host_bytes() -> int:
    """Memory that the system can still give, in bytes."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # another system than Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
