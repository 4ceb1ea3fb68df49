"""What happens beside the training loop: the metrics file, the progress display, the first-step check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rrhf_peft.console import terminal
from rrhf_peft.files import replace_text, writing
from rrhf_peft.modeling import check_gradients
from rrhf_peft.progress import Advance
from rrhf_peft.train.run_folder import read_metrics


class GradientCheck(TrainerCallback):
    """Stops a run that would train nothing, at its first optimizer step that had a loss.

    Args:
        lost_anything: whether any process has seen a loss other than 0 yet; collective.
        overflowed: whether this step will be skipped because fp16's loss was scaled too far; collective.
    """

    def __init__(self, lost_anything: Callable[[], bool], overflowed: Callable[[], bool]) -> None:
        self._lost_anything, self._overflowed = lost_anything, overflowed
        self._checked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients once; DeepSpeed keeps them to itself."""
        if not self._checked and args.deepspeed is None and self._lost_anything() and not self._overflowed():
            check_gradients(kwargs["model"])
            self._checked = True


class AtBegin(TrainerCallback):
    """Calls a function when the model, the optimizer and the state of a run are there, before its first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call it."""
        self._function()


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
