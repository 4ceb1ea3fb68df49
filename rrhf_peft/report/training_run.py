"""A training run's folder read back, checked line by line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_peft.report.numbers import is_number
from rrhf_peft.train.run_folder import DATA_REPORT, METRICS, RECIPE, read_metrics, read_object, read_recipe

#: What `rrhf_peft.merge` calls it; importing that takes seconds.
MERGE_REPORT = "merge_report.json"
EVAL = "eval_"


@dataclass(frozen=True)
class TrainingRun:
    """One run.

    Attributes:
        path: The folder.
        recipe: The resolved recipe, as text and as values.
        data: `train` and, with held-out data, `eval` -> what their data report says.
        steps: The logs of optimizer steps: `step`, `loss` and the objective's metrics.
        held_out: The logs of evaluations while training: `step` and metrics, `eval_` taken off their names.
        refreshes: The logs of online training, one for each time that the policy answered anew.
        closing: The summary at the end; empty where the run has not ended.
        merge: What merge_report.json in the folder says, or None.
        peft_version: By which the adapter was saved, or None.
    """

    path: Path
    recipe_text: str
    recipe: dict[str, Any]
    data: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    refreshes: list[dict[str, Any]]
    closing: dict[str, Any]
    merge: dict[str, Any] | None
    peft_version: str | None

    def series(
        self, metric: str, *, held_out: bool = False, refreshes: bool = False
    ) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and is a finite number."""
        logs = self.held_out if held_out else self.refreshes if refreshes else self.steps
        kept = [(entry["step"], entry[metric]) for entry in logs if is_number(entry.get(metric))]
        return [step for step, _ in kept], [value for _, value in kept]

    def last_step(self) -> int:
        """The last optimizer step that anything was logged at."""
        logs = [*self.steps, *self.held_out, *([self.closing] if self.closing else [])]
        return max((int(entry["step"]) for entry in logs), default=0)

    def peak_memory_gib(self) -> float | None:
        """The highest that was logged."""
        return max(self.series("peak_memory_gib")[1], default=None)


def read_training_run(path: Path) -> TrainingRun:
    """Read a run folder.

    Raises:
        UserError: a file is damaged; names file and line.
    """
    text, recipe = read_recipe(path / RECIPE)
    logs = read_metrics(path / METRICS)
    held_out = [
        {name.removeprefix(EVAL): value for name, value in entry.items() if name.startswith(EVAL) or name == "step"}
        for entry in logs
        if any(name.startswith(EVAL) for name in entry)
    ]
    adapter = read_object(path / "adapter_config.json") if (path / "adapter_config.json").is_file() else {}
    return TrainingRun(
        path=path,
        recipe_text=text,
        recipe=recipe,
        data={name: report for name, report in read_object(path / DATA_REPORT).items() if isinstance(report, dict)},
        steps=[entry for entry in logs if "loss" in entry],
        held_out=held_out,
        refreshes=[entry for entry in logs if "refresh" in entry],
        closing=next((entry for entry in reversed(logs) if "train_runtime" in entry), {}),
        merge=read_object(path / MERGE_REPORT) if (path / MERGE_REPORT).is_file() else None,
        peft_version=str(adapter["peft_version"]) if "peft_version" in adapter else None,
    )
