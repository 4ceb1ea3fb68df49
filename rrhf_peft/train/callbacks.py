"""What happens beside the training loop: the metrics file, the progress display, the first-step check."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rrhf_peft.console import terminal
from rrhf_peft.files import replace_text, writing
from rrhf_peft.modeling import check_gradients
from rrhf_peft.train.run_folder import read_metrics

#: Without a terminal, one line of progress at most this often, in seconds.
SECONDS_BETWEEN_LINES = 10.0


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
    """A bar with loss, pair accuracy, groups/s, time left and, online, the reward; plain lines without a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or terminal(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._last_line = 0.0
        self._first_step = 0
        self._reward = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if not state.is_world_process_zero:
            return
        self._started, self._first_step = time.monotonic(), state.global_step
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                Remaining(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers."""
        if not state.is_world_process_zero or not logs:
            return
        if "rewards/mean" in logs:
            self._reward = f"  reward {logs['rewards/mean']:.3f}"
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held out: {_numbers(logs, 'eval_')}")
        elif "loss" in logs:
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, numbers=_numbers(logs, "") + self._reward)
            else:
                self._print_line(state, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state of the bar on the screen."""
        self.stop()

    def stop(self) -> None:
        """Put the terminal right, also when training ended in an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and state.global_step < state.max_steps:
            return
        self._last_line = now
        done = state.global_step - self._first_step
        left = (now - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {_numbers(logs, '')}{self._reward}  {_duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )


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
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
