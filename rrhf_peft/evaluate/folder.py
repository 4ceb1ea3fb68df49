"""The folder of an evaluation: what is written where, what it was made with, and reading it back.

samples/POLICY.jsonl           all responses            scored/POLICY.LABEL.jsonl    their rewards
perplexity/POLICY.jsonl        under the judge model    references/POLICY.jsonl      under the policy
pairs/POLICY.jsonl             its p_i                  wins/POLICY.jsonl            the judge's verdicts
made_with.json                 the settings behind each of these files
evaluation.json, table.md, recipe.yaml, plots/
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.files import REPORT, BegunFolder, begun_folder, check_output, is_empty_folder, read_mark, replace_text
from rrhf_peft.records import UserError

EVALUATION, TABLE, RECIPE, PLOTS, MADE_WITH = "evaluation.json", "table.md", "recipe.yaml", "plots", "made_with.json"
#: What an evaluation writes in its folder.
WRITES = [*(f"{name}/*" for name in ("samples", "scored", "perplexity", "references", "pairs", "wins", PLOTS))]
WRITES += [EVALUATION, TABLE, RECIPE, MADE_WITH, REPORT]
STAGES = ("samples", "scored", "perplexity", "references", "pairs", "wins")


class OutputFolder:
    """One evaluation's folder.

    Args:
        path: the folder; need not be there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._begun: BegunFolder | None = None

    def file(self, stage: str, policy: str, label: str | None = None) -> Path:
        """The file of one policy in one stage."""
        assert stage in STAGES, stage
        return self.path / stage / f"{policy}{'' if label is None else f'.{label}'}.jsonl"

    def open(
        self, settings: Mapping[str, Any], *, reads: Iterable[str | Path], overwrite: bool, end: contextlib.ExitStack
    ) -> bool:
        """Start or continue; the main process calls it before anything is written, and holds the folder's lock.

        Args:
            settings: file relative to the folder -> JSON values that it depends on. `evaluation.json` may be
                made again with others, because it is made from the other files.
            reads: files and folders that the evaluation reads.
            overwrite: start from nothing; what an earlier evaluation made comes back if this one fails early.
            end: entered with the folder, left when the evaluation is over.

        Returns:
            Whether the same evaluation was finished before.

        Raises:
            UserError: the folder is something else's, or a file that is there was made with other settings.
        """
        record = self.path / MADE_WITH
        check_output(
            self.path, key="evaluation.output", folder=True, reads=reads, overwrite=overwrite, continues=not overwrite
        )
        is_empty = not self.path.is_dir() or is_empty_folder(self.path)
        if not is_empty and read_mark(self.path) is None and not record.is_file():
            raise UserError(f"{self.path}: evaluation.output holds other files. Choose another folder, or empty it.")
        made = {} if overwrite else self._recorded()
        for file, wanted in settings.items():
            then = made.get(file)
            if file == EVALUATION or then is None or then == wanted or not self._is_begun(file):
                continue
            raise UserError(
                f"{self.path / file}: was made with other settings ({'; '.join(_changes(then, wanted))}). Undo the "
                "change, choose another evaluation.output or another name, or pass --overwrite to evaluate everything "
                "again."
            )
        self._begun = end.enter_context(
            begun_folder(self.path, verb="evaluate", writes=WRITES, overwrite=overwrite, resume=not overwrite)
        )
        if made.get(EVALUATION) == settings[EVALUATION] and (self.path / TABLE).is_file():
            return True
        if made.get(EVALUATION) != settings[EVALUATION]:  # what other settings led to must not pass for this one's
            (self.path / TABLE).unlink(missing_ok=True)
            (self.path / EVALUATION).unlink(missing_ok=True)
        replace_text(record, json.dumps({**made, **settings}, indent=1, ensure_ascii=False) + "\n")
        return False

    def keep(self) -> None:
        """There is something now that is worth more than the evaluation that this one replaces."""
        if self._begun is not None:
            self._begun.keep()

    def recorded(self, stage: str, policy: str) -> Any:
        """The settings that one of the files is made with; files of other settings were refused by `open`."""
        return self._recorded()[self.file(stage, policy).relative_to(self.path).as_posix()]

    def rows(self, stage: str, policy: str, label: str | None = None) -> list[dict[str, Any]]:
        """The rows of one of the files.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.file(stage, policy, label)
        try:
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Remove it and run the same command again.") from None

    def _recorded(self) -> dict[str, Any]:
        record = self.path / MADE_WITH
        if not record.is_file():
            return {}
        try:
            made = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            made = error
        if not isinstance(made, dict):
            raise UserError(
                f"{record}: is damaged ({made!s:.200}), so nothing says what the files beside it were made with. "
                "Choose another evaluation.output, or pass --overwrite to evaluate everything again."
            )
        return made

    def _is_begun(self, file: str) -> bool:
        path = self.path / file
        return any(other.exists() for other in (path, *(Path(f"{path}.{more}") for more in ("parts", "stages"))))


def _changes(then: Any, now: Any, key: str = "") -> list[str]:
    """What differs, key by key."""
    if isinstance(then, dict) and isinstance(now, dict):
        inner = (_changes(then.get(name), now.get(name), f"{key}.{name}" if key else name) for name in {**then, **now})
        return [change for own in inner for change in own]
    if then == now:
        return []
    if key.endswith("_sha256"):
        return [f"{key.removesuffix('_sha256')} has another content"]
    return [f"{key} was {json.dumps(then, ensure_ascii=False)} and is {json.dumps(now, ensure_ascii=False)}"]


class _Read(BaseModel):
    """Keys that are not known here are passed over: a newer version may say more."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class _Estimate(_Read):
    mean: float | None
    low: float | None = None
    high: float | None = None

    def interval(self) -> Interval | None:
        """The estimate, or None where it has no finite mean."""
        if self.mean is None or not math.isfinite(self.mean):
            return None
        low, high = (math.nan if bound is None else bound for bound in (self.low, self.high))
        return Interval(self.mean, low, high)


class TrainNumbers(_Read):
    """What training a policy took."""

    seconds: float | None = None
    peak_memory_gib: float | None = None
    steps: int | None = None
    objective: str | None = None


class PreferenceNumbers(_Read):
    """How a policy's log-probs order labelled responses."""

    pair_accuracy: _Estimate | None = None
    kendall_tau: float | None = None
    best_hit_rate: float | None = None
    pairs: int | None = None
    groups: int | None = None


class PolicyNumbers(_Read):
    """Everything that was measured of one policy; None where it was not."""

    model: str | None = None
    adapter: str | None = None
    responses: int | None = None
    train: TrainNumbers | None = None
    rewards: dict[str, _Estimate] = Field(default_factory=dict)
    best_of_n: dict[str, dict[int, _Estimate]] = Field(default_factory=dict)
    perplexity: float | None = None
    reference_perplexity: float | None = None
    preference: PreferenceNumbers | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None
    words: float | None = None
    tokens: float | None = None
    unfinished: float | None = None


class DifferenceRow(_Read):
    """How much more reward one policy has than another on the same prompts, by each scorer."""

    policy: str
    against: str
    rewards: dict[str, _Estimate] = Field(default_factory=dict)


class WinRow(_Read):
    """One policy against another: win, tie and lose as shares of answer pairs, every prompt weighing the same."""

    policy: str
    against: str
    by: str
    win: float = Field(ge=0)
    tie: float = Field(ge=0)
    lose: float = Field(ge=0)
    prompts: int | None = None
    win_rate: _Estimate | None = None
    length_controlled_win_rate: float | None = None


class _File(_Read):
    version: Literal[1]
    settings: dict[str, Any] = Field(default_factory=dict)
    headline: str | None = None
    policies: dict[str, PolicyNumbers] = Field(min_length=1)
    wins: list[WinRow] = Field(default_factory=list)
    differences: list[DifferenceRow] = Field(default_factory=list)


@dataclass(frozen=True)
class EvaluationFolder:
    """One evaluation, or several joined into one.

    Attributes:
        homes: Policy -> the folder that holds its files.
        settings: The recipe's section, as saved.
        headline: Label of the scorer that comes first; None where nothing was scored.
        policies: Name -> numbers, in the order of the recipe.
        wins: Comparisons, those without a single prompt left out.
        differences: Rewards compared on the same prompts.
    """

    homes: dict[str, Path]
    settings: dict[str, Any]
    headline: str | None
    policies: dict[str, PolicyNumbers]
    wins: list[WinRow]
    differences: list[DifferenceRow]

    def difference(self, policy: str, against: str, label: str) -> Interval | None:
        """How much more reward by a scorer `policy` has than `against`; None where that was not compared."""
        for row in self.differences:
            if (row.policy, row.against) == (policy, against) and label in row.rewards:
                return row.rewards[label].interval()
        return None

    def rewards(self, label: str) -> dict[str, Interval]:
        """Policy -> mean reward by one scorer, where there is one."""
        found = {name: own.rewards[label].interval() for name, own in self.policies.items() if label in own.rewards}
        return {name: interval for name, interval in found.items() if interval is not None}

    def best_of_n(self, label: str) -> dict[str, dict[int, Interval]]:
        """Policy -> n -> reward of the best of n, where it was measured for two n at least."""
        curves = {
            name: {n: value for n, one in sorted(own.best_of_n.get(label, {}).items()) if (value := one.interval())}
            for name, own in self.policies.items()
        }
        return {name: curve for name, curve in curves.items() if len(curve) > 1}

    def labels(self) -> list[str]:
        """All scorers, the headline first."""
        named = dict.fromkeys(label for own in self.policies.values() for label in own.rewards)
        return sorted(named, key=lambda label: label != self.headline)

    def scored_rows(self, policy: str, label: str) -> list[dict[str, Any]] | None:
        """The policy's prompts with its responses and their scores; None where no such file was kept.

        Raises:
            UserError: a line is not a scored row.
        """
        path = self.homes[policy] / "scored" / f"{policy}.{label}.jsonl"
        return list(_scored(path)) if path.is_file() else None

    def response_scores(self, label: str) -> dict[str, list[float]]:
        """Policy -> the finite scores of all its responses, for those whose scored file was kept."""
        found: dict[str, list[float]] = {}
        for name in self.policies:
            rows = self.scored_rows(name, label) or []
            scores = [score for row in rows for score in row["scores"] if score is not None and math.isfinite(score)]
            if scores:
                found[name] = scores
        return found


def read_numbers(path: Path) -> dict[str, Any]:
    """The contents of evaluation.json of a folder.

    Raises:
        UserError: it is not there or not JSON.
    """
    file = path / EVALUATION
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Give the folder of an evaluation.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: this is not JSON ({error}). Evaluate again.") from None
    if not isinstance(numbers, dict):
        raise UserError(f"{file}: this is no evaluation. Evaluate again.")
    return numbers


def read_evaluation(path: Path) -> EvaluationFolder:
    """Read evaluation.json of a folder.

    Raises:
        UserError: it is not there, not JSON, or not what `rrhf-peft evaluate` writes; names file and key.
    """
    try:
        saved = _File.model_validate(read_numbers(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path / EVALUATION}: {key} is not what `rrhf-peft evaluate` of this version writes ({first['msg']}). "
            "Evaluate again."
        ) from None
    wins = [row for row in saved.wins if row.win + row.tie + row.lose > 0]
    homes = dict.fromkeys(saved.policies, path)
    return EvaluationFolder(homes, saved.settings, saved.headline, saved.policies, wins, saved.differences)


def joined(evaluations: Sequence[EvaluationFolder]) -> EvaluationFolder:
    """Evaluations of different policies on the same prompts as one; settings and headline are the first's."""
    first = evaluations[0]
    return EvaluationFolder(
        homes={name: home for one in evaluations for name, home in one.homes.items()},
        settings=first.settings,
        headline=first.headline,
        policies={name: own for one in evaluations for name, own in one.policies.items()},
        wins=[row for one in evaluations for row in one.wins],
        differences=[row for one in evaluations for row in one.differences],
    )


def _scored(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Evaluate again.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            whole = len(row["responses"]) == len(row["scores"]) and "prompt" in row
            numbers = all(score is None or isinstance(score, int | float) for score in row["scores"])
        except (ValueError, KeyError, TypeError):
            whole = numbers = False
        if not (whole and numbers):
            raise UserError(
                f"{path}, line {number}: this is no row with prompt, responses and as many scores. Evaluate again."
            )
        yield row
