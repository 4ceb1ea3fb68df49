"""Which kind of folder each RUN is, and what it is called in the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_peft.evaluate.folder import EvaluationFolder, joined, read_evaluation
from rrhf_peft.records import UserError
from rrhf_peft.report.training_run import MERGE_REPORT, TrainingRun, read_training_run
from rrhf_peft.train.run_folder import DATA_REPORT, METRICS, RECIPE, read_object

EVALUATION, ROUNDS = "evaluation.json", "rounds.json"


@dataclass(frozen=True)
class RoundsRun:
    """A folder of rounds.

    Attributes:
        path: The folder.
        rows: One for each policy, as in rounds.json.
        runs: Policy -> the training of its round.
        evaluation: Of all policies; None where the rounds were not evaluated.
        headline: The scorer whose reward the rows have; None without an evaluation.
    """

    path: Path
    rows: list[dict[str, Any]]
    runs: dict[str, TrainingRun]
    evaluation: EvaluationFolder | None
    headline: str | None


@dataclass(frozen=True)
class Runs:
    """Everything to report on, under names that differ within each kind."""

    training: dict[str, TrainingRun]
    evaluations: dict[str, EvaluationFolder]
    rounds: dict[str, RoundsRun]
    merges: dict[str, dict[str, Any]]


def read_runs(paths: Sequence[Path]) -> Runs:
    """Read every folder; one given twice counts once.

    Raises:
        UserError: a folder is none of those that can be reported on, or is damaged.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    named = dict(zip(run_names(paths), paths, strict=True))
    kinds = {name: _kind(path) for name, path in named.items()}
    of = {kind: {name: path for name, path in named.items() if kinds[name] == kind} for kind in _LOOK}
    evaluations = {name: read_evaluation(path) for name, path in of["evaluation"].items()}
    rounds = {name: _read_rounds(path) for name, path in of["rounds"].items()}
    training = {name: read_training_run(path) for name, path in of["training"].items()}
    merges = {name: read_object(path / MERGE_REPORT) for name, path in of["merge"].items()}
    merges |= {name: run.merge for name, run in training.items() if run.merge is not None}
    for name, one in rounds.items():
        training |= {f"{name}/{policy}" if len(rounds) > 1 else policy: run for policy, run in one.runs.items()}
    return Runs(_as_policies(training, evaluations), evaluations, rounds, merges)


#: Kind -> the files by which it is known; the first kind that fits.
_LOOK = {
    "evaluation": (EVALUATION,),
    "rounds": (ROUNDS,),
    "training": (RECIPE, DATA_REPORT),
    "merge": (MERGE_REPORT,),
}


def _kind(path: Path) -> str:
    for kind, files in _LOOK.items():
        if all((path / file).is_file() for file in files):
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
    trained = {name: home / "run" for name, home in homes.items() if (home / "run" / DATA_REPORT).is_file()}
    measured = [home / "evaluation" for home in homes.values() if (home / "evaluation" / EVALUATION).is_file()]
    evaluation = joined([read_evaluation(folder) for folder in measured]) if measured else None
    runs = {name: read_training_run(folder) for name, folder in trained.items()}
    return RoundsRun(path, rows, runs, evaluation, evaluation.headline if evaluation else None)


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _as_policies(training: dict[str, TrainingRun], evaluations: dict[str, EvaluationFolder]) -> dict[str, TrainingRun]:
    """Runs under the name of the policy that they trained, where an evaluation says so: one name, one colour."""
    policies = {
        Path(trained).resolve(): policy
        for evaluation in evaluations.values()
        for policy, own in evaluation.policies.items()
        if (trained := own.adapter or own.model)
    }
    renamed: dict[str, TrainingRun] = {}
    for name, run in training.items():
        policy = policies.get(run.path.resolve(), name)
        renamed[name if policy in renamed or (policy != name and policy in training) else policy] = run
    return renamed
