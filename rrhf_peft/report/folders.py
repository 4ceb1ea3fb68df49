"""The folders that a report is made from: which kind each one is, its name, and what a training run has logged."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from rrhf_peft.evaluate.numbers import EVALUATION, Evaluation, joined, read_evaluation
from rrhf_peft.records import UserError
from rrhf_peft.train.run_folder import DATA_REPORT, METRICS, RECIPE, read_metrics, read_object, read_recipe

ROUNDS = "rounds.json"
#: What `rrhf_peft.merge` calls it; importing that takes seconds.
MERGE_REPORT = "merge_report.json"
EVAL = "eval_"
#: Kind -> the files by which it is known; the first kind that fits.
_KNOWN_BY = {
    "evaluation": (EVALUATION,),
    "rounds": (ROUNDS,),
    "training": (RECIPE, DATA_REPORT),
    "merge": (MERGE_REPORT,),
}


@dataclass(frozen=True)
class TrainingRun:
    """One run.

    Attributes:
        path: The folder.
        recipe_text: The resolved recipe as it was written.
        recipe: The same as values.
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


@dataclass(frozen=True)
class RoundsRun:
    """A folder of rounds.

    Attributes:
        rows: One for each policy, as in rounds.json.
        runs: Policy -> the training of its round.
        evaluation: Of all policies; None where the rounds were not evaluated.
    """

    rows: list[dict[str, Any]]
    runs: dict[str, TrainingRun]
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Runs:
    """Everything to report on, under names that differ within each kind."""

    training: dict[str, TrainingRun]
    evaluations: dict[str, Evaluation]
    rounds: dict[str, RoundsRun]
    merges: dict[str, dict[str, Any]]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value out of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Sequence[Path]) -> Runs:
    """Read every folder, and the folders inside of one that `compare` made; one given twice counts once.

    Raises:
        UserError: a folder is none of those that can be reported on, or is damaged.
    """
    paths = [one for path in paths for one in (_inside(path) or [path])]
    paths = list({path.resolve(): path for path in paths}.values())
    kinds: dict[str, dict[str, Path]] = {kind: {} for kind in _KNOWN_BY}
    for name, path in zip(run_names(paths), paths, strict=True):
        kinds[_kind(path)][name] = path
    evaluations = {name: read_evaluation(path) for name, path in kinds["evaluation"].items()}
    rounds = {name: _read_rounds(path) for name, path in kinds["rounds"].items()}
    training = {name: read_training_run(path) for name, path in kinds["training"].items()}
    merges = {name: read_object(path / MERGE_REPORT) for name, path in kinds["merge"].items()}
    merges |= {name: run.merge for name, run in training.items() if run.merge is not None}
    for name, one in rounds.items():
        training |= {f"{name}/{policy}" if len(rounds) > 1 else policy: run for policy, run in one.runs.items()}
    return Runs(_as_policies(training, evaluations), evaluations, rounds, merges)


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


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


def _inside(path: Path) -> list[Path]:
    """The folders to report on inside of one that is none itself."""
    if not path.is_dir() or _kind_of(path) is not None:
        return []
    return sorted(one for one in path.iterdir() if one.is_dir() and _kind_of(one) is not None)


def _kind_of(path: Path) -> str | None:
    return next((kind for kind, files in _KNOWN_BY.items() if all((path / file).is_file() for file in files)), None)


def _kind(path: Path) -> str:
    if (kind := _kind_of(path)) is not None:
        return kind
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder. Give the folder of a training run, evaluation or rounds.")
    raise UserError(
        f"{path}: is not a folder to report on. A training run has {RECIPE}, {DATA_REPORT} and {METRICS}, an "
        f"evaluation {EVALUATION}, rounds {ROUNDS} (after their first round), a merged model {MERGE_REPORT}."
    )


def _read_rounds(path: Path) -> RoundsRun:
    rows = read_object(path / ROUNDS).get("rounds")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "policy" in row for row in rows):
        raise UserError(f"{path / ROUNDS}: holds no list of rounds. Run the rounds again, or restore the file.")
    homes = {str(row["policy"]): path / str(row["policy"]) for row in rows}
    measured = [home / "evaluation" for home in homes.values() if (home / "evaluation" / EVALUATION).is_file()]
    return RoundsRun(
        rows=rows,
        runs={
            name: read_training_run(home / "run")
            for name, home in homes.items()
            if (home / "run" / DATA_REPORT).is_file()
        },
        evaluation=joined([read_evaluation(folder) for folder in measured]) if measured else None,
    )


def _as_policies(training: dict[str, TrainingRun], evaluations: dict[str, Evaluation]) -> dict[str, TrainingRun]:
    """Runs under the name of the policy that they trained, where an evaluation says so: one name, one colour."""
    policies = {
        Path(trained).resolve(): policy
        for evaluation in evaluations.values()
        for policy, numbers in evaluation.numbers.policies.items()
        if (trained := numbers.adapter or numbers.model)
    }
    renamed: dict[str, TrainingRun] = {}
    for name, run in training.items():
        policy = policies.get(run.path.resolve(), name)
        renamed[name if policy in renamed or (policy != name and policy in training) else policy] = run
    order = list(policies.values())
    return dict(sorted(renamed.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
