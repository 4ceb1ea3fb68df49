"""The numbers of an evaluation: what `evaluation.json` says, how each of them is made, and reading them back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console, ConsoleOptions

from rrhf_peft.evaluate.statistics import (
    Interval,
    PreferenceFigures,
    distinct_n,
    expected_best,
    mean_repetition,
    mean_reward,
    mean_words,
    preference_figures,
    reward_verdicts,
    win_shares,
)
from rrhf_peft.evaluate.table import markdown_table, terminal_tables
from rrhf_peft.records import UserError

if TYPE_CHECKING:
    from rrhf_peft.evaluate.folder import OutputFolder
    from rrhf_peft.evaluate.inputs import Plan

EVALUATION = "evaluation.json"

Row = dict[str, Any]
#: For each prompt the reward of each response; None where the scorer gave none.
Rewards = Sequence[Sequence[float | None]]


class _Record(BaseModel):
    """Keys that are not known here are passed over: a newer version may say more."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class TrainNumbers(_Record):
    """What training a policy took: wall time, the most memory of a device, optimizer steps, the loss's name."""

    seconds: float | None = None
    peak_memory_gib: float | None = None
    steps: int | None = None
    objective: str | None = None


class PolicyNumbers(_Record):
    """Everything that was measured of one policy, over all k responses to every prompt, empty ones included.

    None, or no entry, where something was not measured.

    Attributes:
        model, adapter, responses: what it is, and how many responses it gave.
        template, quantization: as it was evaluated; `differs_from_training` says where that is not as it was trained.
        train: of the run in the adapter's (or model's) folder.
        rewards: label -> mean over prompts of the mean reward, with a bootstrap interval over prompts.
        unrewarded: label -> responses that the scorer gave no reward; they do not count.
        best_of_n: label -> n -> expected reward of the best of n (`statistics.expected_best`), over the prompts with
            as many rewards.
        perplexity: of the responses under the judge, every token alike, EOS not counted.
        reference_perplexity: of the reference answers under the policy, tokenised as training does, EOS included.
        preference: how p_i orders the labelled groups.
        distinct_1, distinct_2, repetition, words: of the texts.
        tokens, unfinished: mean tokens, and the share cut at max_new_tokens.
    """

    model: str | None = None
    adapter: str | None = None
    template: str | None = None
    quantization: str | None = None
    differs_from_training: list[str] = Field(default_factory=list)
    responses: int | None = None
    train: TrainNumbers | None = None
    rewards: dict[str, Interval] = Field(default_factory=dict)
    unrewarded: dict[str, int] = Field(default_factory=dict)
    best_of_n: dict[str, dict[str, Interval]] = Field(default_factory=dict)
    perplexity: float | None = None
    reference_perplexity: float | None = None
    preference: PreferenceFigures | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None
    words: float | None = None
    tokens: float | None = None
    unfinished: float | None = None


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A mean difference over the `prompts` that both policies were rewarded on; the interval resamples these."""

    prompts: int = 0


class DifferenceRow(_Record):
    """Label -> how much more reward one policy has than another on the same prompts.

    The policies answer the same prompts, so that these intervals are narrower than those of the two means.
    """

    policy: str
    against: str
    rewards: dict[str, PairedDifference] = Field(default_factory=dict)


class WinRow(_Record):
    """One policy against another.

    Attributes:
        policy, against, by: who is compared with whom, by a scorer's label or a judge's name.
        win, tie, lose: shares of answer pairs (response i against response i), every prompt weighing the same.
        prompts: with a comparison.
        length_controlled_win_rate: what the win rate would be at equal length.
        win_rate: a tie counts half; with an interval over prompts.
        failures: pairs without a verdict.
    """

    policy: str
    against: str
    by: str
    win: float = Field(ge=0)
    tie: float = Field(ge=0)
    lose: float = Field(ge=0)
    prompts: int | None = None
    length_controlled_win_rate: float | None = None
    win_rate: Interval | None = None
    failures: int = 0

    @property
    def shares(self) -> tuple[float, float, float]:
        """Won, tied and lost, of their sum; zeros where nothing was compared."""
        total = (self.win + self.tie + self.lose) or 1.0
        return self.win / total, self.tie / total, self.lose / total


class Numbers(_Record):
    """The contents of `evaluation.json`.

    Attributes:
        settings: what the recipe's section says of decoding, template and statistics.
        headline: label of the scorer that comes first; None where nothing was scored.
        policies: name -> numbers, in the order of the recipe.
        differences: of each policy but the one compared with.
        wins: the same, where wins were asked for.
    """

    version: Literal[1] = 1
    settings: dict[str, Any] = Field(default_factory=dict)
    headline: str | None = None
    policies: dict[str, PolicyNumbers] = Field(min_length=1)
    differences: list[DifferenceRow] = Field(default_factory=list)
    wins: list[WinRow] = Field(default_factory=list)


# ---- From the files of an evaluation to its numbers ----


def make_numbers(plan: Plan, folder: OutputFolder) -> Numbers:
    """Read samples, rewards, log-probs and verdicts, and make all numbers of them.

    Raises:
        UserError: files of the folder do not fit together.
    """
    section = plan.section
    samples = {name: folder.rows("samples", name) for name in plan.policies}
    rewards = {
        name: {label: _rewards(folder, name, label, samples[name]) for label in section.scorers}
        for name in plan.policies
    }
    against = section.wins.against if section.wins is not None else next(iter(plan.policies))
    others = [name for name in plan.policies if name != against]
    judge = section.perplexity
    names = {"decoding", "template", "stop", "max_prompt_tokens", "seed", "confidence", "resamples", "examples"}
    return Numbers(
        settings={
            "prompts": len(plan.prompts),
            "references": len(plan.references),
            "pairs": len(plan.pairs),
            "perplexity_judge": None if judge is None else judge.model or plan.recipe.model.name,
            "best_of": section.best_of_sizes,
            **section.model_dump(mode="json", include=names),
        },
        headline=next(iter(section.scorers), None),
        policies={name: _policy(plan, folder, name, samples[name], rewards[name]) for name in plan.policies},
        differences=[
            DifferenceRow(policy=name, against=against, rewards=_differences(plan, rewards[name], rewards[against]))
            for name in others
        ],
        wins=[_wins(plan, folder, name, samples, rewards) for name in others] if section.wins is not None else [],
    )


def _rewards(folder: OutputFolder, name: str, label: str, samples: Sequence[Row]) -> Rewards:
    """In the order of the samples."""
    rewards: list[list[float | None]] = [[None] * len(row["responses"]) for row in samples]
    line_of = {row["meta"]["prompt_index"]: line for line, row in enumerate(samples)}
    for row in folder.rows("scored", name, label):
        line = line_of.get(row["meta"]["prompt_index"], -1)
        kept = row["meta"].get("kept") or range(len(row["responses"]))
        if line < 0 or [samples[line]["responses"][index] for index in kept] != row["responses"]:
            raise UserError(
                f"{folder.file('scored', name, label)}: rewards other responses than those of "
                f"{folder.file('samples', name)}. Remove it and run the same command again."
            )
        for index, score in zip(kept, row["scores"], strict=True):
            rewards[line][index] = score
    return rewards


def _policy(
    plan: Plan, folder: OutputFolder, name: str, rows: Sequence[Row], rewards: dict[str, Rewards]
) -> PolicyNumbers:
    policy = plan.policies[name]
    texts = [text for row in rows for text in row["responses"]]
    details = [response for row in rows for response in row["meta"]["candidates"]]
    known = {label: list(map(_known, groups)) for label, groups in rewards.items()}
    return PolicyNumbers(
        model=policy.model.name,
        adapter=policy.stage.adapter,
        template=policy.template,
        quantization=policy.model.quantization,
        differs_from_training=policy.differences,
        responses=len(texts),
        train=None if policy.training is None else TrainNumbers(**policy.training),
        rewards={label: _interval(plan, groups) for label, groups in known.items() if any(groups)},
        unrewarded={label: sum(reward is None for group in rewards[label] for reward in group) for label in rewards},
        best_of_n={label: _best_of(plan, groups) for label, groups in known.items() if any(groups)},
        perplexity=_perplexity(folder, "perplexity", name) if plan.section.perplexity is not None else None,
        reference_perplexity=_perplexity(folder, "references", name) if plan.references else None,
        preference=_preference(plan, folder, name) if plan.pairs else None,
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        repetition=mean_repetition(texts),
        words=mean_words(texts),
        tokens=sum(response["num_tokens"] for response in details) / len(details),
        unfinished=sum(response["finish_reason"] == "length" for response in details) / len(details),
    )


def _known(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]


def _interval(plan: Plan, per_prompt: Sequence[Sequence[float]]) -> Interval:
    section = plan.section
    groups = [group for group in per_prompt if group]
    return mean_reward(groups, confidence=section.confidence, resamples=section.resamples, seed=section.seed)


def _best_of(plan: Plan, per_prompt: Sequence[Sequence[float]]) -> dict[str, Interval]:
    bests = {
        str(size): [[expected_best(group, size)] for group in per_prompt if len(group) >= size]
        for size in plan.section.best_of_sizes
    }
    return {size: _interval(plan, groups) for size, groups in bests.items() if groups}


def _perplexity(folder: OutputFolder, stage: str, name: str) -> float | None:
    """Of all tokens of all texts; None where there is none."""
    log_probs = [pair for row in folder.rows(stage, name) for pair in row["log_probs"] if pair is not None]
    tokens = sum(count for _, count in log_probs)
    if not tokens:
        return None
    return math.exp(min(-math.fsum(total for total, _ in log_probs) / tokens, 700.0))


def _preference(plan: Plan, folder: OutputFolder, name: str) -> PreferenceFigures | None:
    section = plan.section
    preferences, scores = [], []
    for group, row in zip(plan.pairs, folder.rows("pairs", name), strict=True):
        known = [
            (log_prob[0] / log_prob[1], score)
            for log_prob, score in zip(row["log_probs"], group.known_scores, strict=True)
            if log_prob is not None  # a response without text has no p_i
        ]
        preferences.append([p for p, _ in known])
        scores.append([score for _, score in known])
    return preference_figures(
        preferences, scores, confidence=section.confidence, resamples=section.resamples, seed=section.seed
    )


def _differences(plan: Plan, rewards: dict[str, Rewards], others: dict[str, Rewards]) -> dict[str, PairedDifference]:
    """Label -> mean difference of the two policies' mean rewards over the prompts that both were rewarded on."""
    differences = {}
    for label in rewards:
        both = [(_known(group), _known(other)) for group, other in zip(rewards[label], others[label], strict=True)]
        apart = [[float(np.mean(group) - np.mean(other))] for group, other in both if group and other]
        if apart:
            differences[label] = PairedDifference(**asdict(_interval(plan, apart)), prompts=len(apart))
    return differences


def _wins(
    plan: Plan,
    folder: OutputFolder,
    name: str,
    samples: dict[str, list[Row]],
    rewards: dict[str, dict[str, Rewards]],
) -> WinRow:
    wins = plan.section.wins
    assert wins is not None
    if isinstance(wins.by, str):
        groups = zip(rewards[name][wins.by], rewards[wins.against][wins.by], strict=True)
        verdicts = [reward_verdicts(group, other, wins.tie_margin) for group, other in groups]
    else:
        verdicts = [row["verdicts"] for row in folder.rows("wins", name)]
    longer = [
        [float(len(text) - len(other)) for text, other in zip(row["responses"], theirs["responses"])]  # noqa: B905 - as many as both have
        for row, theirs in zip(samples[name], samples[wins.against], strict=True)
    ]
    pairs = [
        [(verdict, more) for verdict, more in zip(group, lengths, strict=True) if verdict is not None]
        for group, lengths in zip(verdicts, longer, strict=True)
    ]
    shares = win_shares(
        [[verdict for verdict, _ in group] for group in pairs], [[x for _, x in group] for group in pairs]
    )
    rates = [[(verdict + 1) / 2 for verdict, _ in group] for group in pairs]  # a win counts 1, a tie half
    return WinRow(
        policy=name,
        against=wins.against,
        by=wins.by if isinstance(wins.by, str) else wins.by.model,
        **asdict(shares),
        win_rate=_interval(plan, rates) if any(rates) else None,
        failures=sum(verdict is None for group in verdicts for verdict in group),
    )


# ---- Reading them back ----


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, or several of different policies joined into one.

    Attributes:
        numbers: the contents of `evaluation.json`.
        folders: policy -> the folder that holds its files.
        was_finished: it was finished before this run, which had nothing to do.
    """

    numbers: Numbers
    folders: dict[str, Path]
    was_finished: bool = False
    _scored: dict[tuple[str, str], list[Row]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return next(iter(self.folders.values()))

    def to_dict(self) -> dict[str, Any]:
        """The contents of `evaluation.json`."""
        return self.numbers.model_dump()

    def markdown(self) -> str:
        """The table in the paper's form, one row for each policy."""
        return markdown_table(self.numbers)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield from terminal_tables(self.numbers, options.max_width)

    def difference(self, policy: str, against: str, label: str) -> Interval | None:
        """How much more reward by a scorer `policy` has than `against`; None where that was not compared."""
        for row in self.numbers.differences:
            if (row.policy, row.against) == (policy, against) and label in row.rewards:
                return row.rewards[label]
        return None

    def rewards(self, label: str) -> dict[str, Interval]:
        """Policy -> mean reward by one scorer, where there is a finite one."""
        rewards = {name: policy.rewards.get(label) for name, policy in self.numbers.policies.items()}
        return {name: reward for name, reward in rewards.items() if reward is not None and math.isfinite(reward.mean)}

    def best_of_n(self, label: str) -> dict[str, dict[int, Interval]]:
        """Policy -> n -> reward of the best of n, where it was measured for two n at least."""
        curves = {
            name: {int(n): policy.best_of_n[label][n] for n in sorted(policy.best_of_n.get(label, {}), key=int)}
            for name, policy in self.numbers.policies.items()
        }
        known = {
            name: {n: value for n, value in curve.items() if math.isfinite(value.mean)}
            for name, curve in curves.items()
        }
        return {name: curve for name, curve in known.items() if len(curve) > 1}

    def scored_rows(self, policy: str, label: str) -> list[Row]:
        """The policy's prompts with its responses and their scores; none where no such file was kept.

        Raises:
            UserError: a line is not a scored row.
        """
        if (policy, label) not in self._scored:
            path = self.folders[policy] / "scored" / f"{policy}.{label}.jsonl"
            self._scored[policy, label] = list(_scored_rows(path)) if path.is_file() else []
        return self._scored[policy, label]

    def response_scores(self, label: str) -> dict[str, list[float]]:
        """Policy -> the finite scores of all its responses, for those whose scored file was kept."""
        scores = {
            name: [
                score
                for row in self.scored_rows(name, label)
                for score in row["scores"]
                if score is not None and math.isfinite(score)
            ]
            for name in self.numbers.policies
        }
        return {name: values for name, values in scores.items() if values}


def read_evaluation(path: Path, *, was_finished: bool = False) -> Evaluation:
    """Read `evaluation.json` of a folder.

    Raises:
        UserError: it is not there, not JSON, or not what `rrhf-peft evaluate` writes; names file and key.
    """
    file = path / EVALUATION
    try:
        numbers = Numbers.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Give the folder of an evaluation.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{file}: {key} is not what `rrhf-peft evaluate` of this version writes ({first['msg']}). Evaluate again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: this is not JSON ({error}). Evaluate again.") from None
    return Evaluation(numbers, dict.fromkeys(numbers.policies, path), was_finished)


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of different policies on the same prompts as one; settings and headline are the first's."""
    first, every = evaluations[0].numbers, [one.numbers for one in evaluations]
    numbers = first.model_copy(
        update={
            "policies": {name: policy for one in every for name, policy in one.policies.items()},
            "differences": [row for one in every for row in one.differences],
            "wins": [row for one in every for row in one.wins],
        }
    )
    return Evaluation(numbers, {name: folder for one in evaluations for name, folder in one.folders.items()})


def _scored_rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Evaluate again.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            is_whole = len(row["responses"]) == len(row["scores"]) and "prompt" in row
            is_whole &= all(score is None or isinstance(score, int | float) for score in row["scores"])
        except (ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{path}, line {number}: this is no row with prompt, responses and as many scores. Evaluate again."
            )
        yield row
