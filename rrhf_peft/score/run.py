"""Score a recipe's candidates: raw scores unit by unit on all processes, then one scored file.

    candidates.jsonl --scorers--> scored.jsonl.parts/ --combine--> scored.jsonl
                                                                   scored.failures.jsonl
                                                                   scored.report.json

Units and their batches depend on the input and the settings alone, so that a run that was killed and
resumed, on any number of processes, gives what an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rrhf_peft.console import terminal
from rrhf_peft.files import Content, write_files
from rrhf_peft.jobs import Processes, ShardedOutput, exclusive, fingerprint_of, launched_processes, whole_models
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.scoring import CompositeScorer, HumanScorer, RuleScorer, ScoringSection
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.score.candidates import GroupScores, Scorer, read_candidates
from rrhf_peft.score.combine import LEAST_RESPONSES, ScoreReport, finished_rows
from rrhf_peft.score.judge import Judge
from rrhf_peft.score.people import PeopleScores, is_handed_out, key_path, texts_of, write_sheet
from rrhf_peft.score.policy import PolicyGroups
from rrhf_peft.score.progress import group_progress
from rrhf_peft.score.reward_model import RewardModelScores
from rrhf_peft.score.rule import RuleScores, SourceScores, rule_source

#: Name in a recipe -> what makes the scorer from (section, recipe, seed, all groups).
SCORERS: dict[str, Callable[[Any, Recipe, int, Sequence[RankedGroup]], Scorer]] = {
    "reward_model": RewardModelScores,
    "judge": Judge,
    "rule": RuleScores,
    "policy": PolicyGroups,
    "source": SourceScores,
    "human": PeopleScores,
}


@dataclass(frozen=True)
class ScoreOutcome:
    """What scoring leaves.

    Attributes:
        output: the scored file; None where a ranking sheet was written for people to fill.
        report: numbers per source, ties, failures; on the main process, and where there is an output.
        failures: the file of groups with unscored responses and of those without any, where there are such.
        sheet: the ranking sheet that was written.
    """

    output: Path | None = None
    report: ScoreReport | None = None
    failures: Path | None = None
    sheet: Path | None = None


def score_recipe(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    least_responses: int = LEAST_RESPONSES,
) -> ScoreOutcome:
    """Score what a recipe's `scoring:` section describes; under a launcher every process calls it.

    Run again after a kill, it continues. The output has the columns prompt, responses, scores, sources,
    raw_scores (by scorer) and meta, and is ranked data as training reads it.

    Args:
        recipe: checked recipe with a scoring section.
        overwrite: replace an existing output, and start again where one was begun.
        console: where progress goes; standard error by default.
        least_responses: groups with fewer scored responses are failures; 1 where nothing is to be ranked.

    Raises:
        UserError: anything the user can fix. What was finished is kept.
    """
    assert recipe.scoring is not None, "load_recipe(needs=['scoring'])"
    section, console = recipe.scoring, console or terminal(stderr=True)
    with launched_processes() as processes, whole_models():
        return _score(recipe, section, processes, console, overwrite, least_responses)


def _score(
    recipe: Recipe,
    section: ScoringSection,
    processes: Processes,
    console: Console,
    overwrite: bool,
    least_responses: int,
) -> ScoreOutcome:
    groups = read_candidates(section.input, format=section.format, split=section.split, max_groups=section.max_groups)
    _refuse_output_as_input(section)
    if isinstance(section.scorer, HumanScorer) and not section.scorer.annotations:
        return _hand_out(section, section.scorer, groups, main=processes.is_main)

    with_responses = [group for group in groups if group.responses]
    size = section.unit_groups
    units = [with_responses[start : start + size] for start in range(0, len(with_responses), size)]
    scorers = make_scorers(section.scorer, recipe, section.seed, groups)  # before anything is written or removed
    output = Path(section.output)
    shards = ShardedOutput(
        output,
        verb="score",
        fingerprint=fingerprint_of(_fingerprint(recipe, groups), least_responses),
        units=len(units),
        processes=processes,
        beside=_beside(section),
    )
    with exclusive(output, processes):
        if shards.open(overwrite=overwrite, console=console):
            return _finished_before(shards, processes, console)
        _score_units(shards, units, scorers, console if processes.is_main else Console(quiet=True), processes)
        return _merge(shards, section, groups, scorers, least_responses)


def _finished_before(shards: ShardedOutput, processes: Processes, console: Console) -> ScoreOutcome:
    if processes.is_main:
        console.print(f"finished before: {shards.output}", highlight=False, soft_wrap=True)
    failures, report = shards.beside
    values = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
    return ScoreOutcome(
        shards.output, None if values is None else ScoreReport(**values), failures if failures.exists() else None
    )


def make_scorers(section: Any, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> dict[str, Scorer]:
    """Label -> scorer; a scorer that stands alone is labelled by its name.

    Args:
        section: a scorer's section, also a composite's.
        recipe: for scorers that read more of it.
        seed: of a judge's shuffling.
        groups: all that will be scored, or examples that have all of its sources.

    Raises:
        UserError: a model, rule, key or sheet is missing or cannot be used.
    """
    return {label: SCORERS[part.name](part, recipe, seed, groups) for label, part in _parts(section).items()}


def _parts(scorer: Any) -> dict[str, Any]:
    """Label -> section of the single scorers."""
    if isinstance(scorer, CompositeScorer):
        return {label: part.scorer for label, part in scorer.parts.items()}
    return {scorer.name: scorer}


def _score_units(
    shards: ShardedOutput,
    units: Sequence[Sequence[RankedGroup]],
    scorers: Mapping[str, Scorer],
    console: Console,
    processes: Processes,
) -> None:
    """Do this process's share of what is missing."""
    pending = shards.pending()
    share = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    with group_progress(console, f"scoring{share}", sum(len(units[unit]) for unit in pending)) as advance:
        for unit in pending:
            before = _counts(scorers)
            by_label = {label: scorer.score(units[unit]) for label, scorer in scorers.items()}
            used = _counts(scorers)
            used.subtract(before)
            rows: list[dict[str, Any]] = [
                {"scores": {label: _as_json(scores[index]) for label, scores in by_label.items()}}
                for index in range(len(units[unit]))
            ]
            shards.write(unit, [*rows, {"counts": dict(+used)}])
            advance(len(units[unit]))


def _merge(
    shards: ShardedOutput,
    section: ScoringSection,
    groups: Sequence[RankedGroup],
    scorers: Mapping[str, Scorer],
    least_responses: int,
) -> ScoreOutcome:
    """The parts into the scored file, with its failures and its report beside it."""
    output = Path(section.output)
    failures, report_path = _beside(section)
    reports: list[ScoreReport] = []
    contents: dict[Path, Content | None] = {}
    agreement = {
        label: asdict(scorer.agreement) for label, scorer in scorers.items() if isinstance(scorer, PeopleScores)
    }

    def finish(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        counts: Counter[str] = Counter()
        scored = []
        for part in parts:
            counts.update(part.get("counts", {}))
            if "scores" in part:
                scored.append({label: _from_json(values) for label, values in part["scores"].items()})
        following = iter(scored)
        raw = [
            next(following) if group.responses else {label: GroupScores([]) for label in scorers} for group in groups
        ]
        rows, failed, report = finished_rows(groups, raw, section.scorer, counts, agreement, least_responses)
        reports.append(report)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in failed]
        contents[failures] = lines if failed else None
        contents[report_path] = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if not rows:
            write_files(failures, contents, verb="score")
            reasons = "; ".join(f"{count} {reason}" for reason, count in report.failures.items()) or "groups of one"
            wanted = "two scored responses" if least_responses == 2 else "a scored response"
            raise UserError(
                f"{output}: not written, because no group has {wanted} ({reasons}). {failures} holds them "
                "all. Fix the cause and pass --overwrite."
            )
        return rows

    shards.merge(finish, beside=lambda: contents)
    return ScoreOutcome(output, reports[0] if reports else None, failures if failures.exists() else None)


def _hand_out(
    section: ScoringSection, scorer: HumanScorer, groups: Sequence[RankedGroup], *, main: bool
) -> ScoreOutcome:
    """Write the sheet, unless the same one is there already."""
    sheet, texts = Path(scorer.sheet), texts_of(groups)
    if main and not is_handed_out(sheet, texts, section.seed):
        write_sheet(sheet, texts, section.seed)
    return ScoreOutcome(sheet=sheet)


def _fingerprint(recipe: Recipe, groups: Sequence[RankedGroup]) -> str:
    """Of everything the raw scores depend on; not of settings that only change the effort."""
    assert recipe.scoring is not None
    section = recipe.scoring
    parts = list(_parts(section.scorer).values())
    sheets = [Path(file) for part in parts if isinstance(part, HumanScorer) for file in part.annotations]
    settings = {
        "seed": section.seed,
        "unit_groups": section.unit_groups,
        "scorer": _without_effort(section.scorer),
        "model": None if recipe.model is None else recipe.model.model_dump(mode="json"),
        "sheets": [hashlib.sha256(sheet.read_bytes()).hexdigest() for sheet in sheets if sheet.is_file()],
        "rules": [rule_source(part.function) for part in parts if isinstance(part, RuleScorer)],
    }
    digest = hashlib.sha256(json.dumps(settings).encode())  # unsorted: of patterns the first that matches counts
    for group in groups:
        digest.update(json.dumps([group.prompt, group.responses, group.sources, group.columns["raw_scores"]]).encode())
    return digest.hexdigest()


def _without_effort(scorer: Any) -> dict[str, Any]:
    values = scorer.model_dump(mode="json", exclude=set(scorer.EFFORT))
    if isinstance(scorer, CompositeScorer):
        for label, part in scorer.parts.items():
            values["parts"][label]["scorer"] = _without_effort(part.scorer)
    return values


def _beside(section: ScoringSection) -> tuple[Path, Path]:
    """The files of failures and of the report."""
    output = Path(section.output)
    return output.with_suffix(".failures.jsonl"), output.with_suffix(".report.json")


def _refuse_output_as_input(section: ScoringSection) -> None:
    """Nothing that is read may be written to, or removed with an old output."""
    inputs = [section.input] if isinstance(section.input, str) else list(section.input)
    read = {Path(source).resolve(): "scoring.input" for source in inputs}
    for part in _parts(section.scorer).values():
        if isinstance(part, HumanScorer):
            read |= {Path(file).resolve(): "scoring.scorer.annotations" for file in part.annotations}
            read |= {Path(part.sheet).resolve(): "scoring.scorer.sheet"}
            read |= {key_path(Path(part.sheet)).resolve(): "the key of scoring.scorer.sheet"}
    for written in (Path(section.output), *_beside(section)):
        if (key := read.get(written.resolve())) is not None:
            raise UserError(
                f"scoring.output: {section.output} is written with {written}, which is {key} as well. Name another "
                "file."
            )


def _counts(scorers: Mapping[str, Scorer]) -> Counter[str]:
    """The scorers' totals; of several, each under its label."""
    return Counter(
        {
            name if len(scorers) == 1 else f"{label}: {name}": count
            for label, scorer in scorers.items()
            for name, count in scorer.counts().items()
        }
    )


def _as_json(scores: GroupScores) -> dict[str, Any]:
    return {name: value for name, value in asdict(scores).items() if value}


def _from_json(values: Mapping[str, Any]) -> GroupScores:
    failures = {int(index): reason for index, reason in values.get("failures", {}).items()}
    return GroupScores(values["scores"], failures, values.get("aspects", {}))
