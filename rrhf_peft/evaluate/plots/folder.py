"""An evaluation folder read back: evaluation.json and the scored responses beside it, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrhf_peft.evaluate.reward import Interval
from rrhf_peft.records import UserError

#: The file by which an evaluation folder is known.
NUMBERS = "evaluation.json"


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


def read_evaluation(path: Path) -> EvaluationFolder:
    """Read evaluation.json of a folder.

    Raises:
        UserError: it is not there, not JSON, or not what `rrhf-peft evaluate` writes; names file and key.
    """
    file = path / NUMBERS
    try:
        saved = _File.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Give the folder of an evaluation.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{file}: {key} is not what `rrhf-peft evaluate` of this version writes ({first['msg']}). Evaluate again."
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: this is not JSON ({error}). Evaluate again.") from None
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
