"""Score a recipe's candidates: raw scores unit by unit on all processes, then one scored file.

    candidates.jsonl --scorers--> scored.jsonl.parts/ --combine--> scored.jsonl
                                                                   scored.failures.jsonl
                                                                   scored.report.json

Units and their batches depend on the input and the settings alone, so that a run that was killed and
resumed, on any number of processes, gives what an uninterrupted one gives.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat, zip_longest
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from rrhf_peft.console import terminal
from rrhf_peft.files import Content, is_finished, remove_work_folder, replace_text, write_files
from rrhf_peft.jobs import (
    MADE_FROM,
    Processes,
    ShardedOutput,
    exclusive,
    fingerprint_of,
    launched_processes,
    whole_models,
)
from rrhf_peft.modeling import weights_fingerprint
from rrhf_peft.progress import progress
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.stages import (
    CompositeScorer,
    HumanScorer,
    PolicyScorer,
    RewardModelScorer,
    RuleScorer,
    ScoringSection,
)
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.score.combine import LEAST_RESPONSES, GroupScores, ScoreReport, finished_rows, read_candidates
from rrhf_peft.score.judge import Judge
from rrhf_peft.score.people import PeopleScores, is_handed_out, key_path, texts_of, write_sheet
from rrhf_peft.score.policy import PolicyGroups, policy_of
from rrhf_peft.score.reward_model import RewardModelScores
from rrhf_peft.score.rule import RuleScores, SourceScores, rule_source


class Scorer(Protocol):
    """Scores groups; made from (its section of the recipe, the recipe, a seed, all groups)."""

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """One `GroupScores` for each group, in order."""


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
        return _hand_out(section, section.scorer, groups, processes)

    with_responses = [group for group in groups if group.responses]
    size = section.unit_groups
    units = [with_responses[start : start + size] for start in range(0, len(with_responses), size)]
    output, beside = Path(section.output), _beside(section)
    with exclusive(output, processes):
        made_from = processes.on_main(lambda: _made_from(recipe, groups, least_responses))
        fingerprint = fingerprint_of(made_from)
        shards = ShardedOutput(
            output, verb="score", fingerprint=fingerprint, units=len(units), processes=processes, beside=beside
        )
        is_done = not overwrite and processes.on_main(lambda: is_finished(output, shards.fingerprint, beside))
        # Before anything is written or removed: what is missing or damaged costs nothing that was there.
        scorers = {} if is_done else make_scorers(section.scorer, recipe, section.seed, groups)
        if not overwrite:
            processes.on_main(lambda: _refuse_changes(shards, made_from))
        if shards.open(overwrite=overwrite, console=console):
            return _finished_before(shards, console if processes.is_main else None)
        processes.on_main(lambda: replace_text(shards.parts / MADE_FROM, json.dumps(made_from, indent=1) + "\n"))
        _score_units(shards, units, scorers, console if processes.is_main else None, processes)
        return _merge(shards, section, groups, scorers, least_responses)


def _finished_before(shards: ShardedOutput, console: Console | None) -> ScoreOutcome:
    if console is not None:
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
    console: Console | None,
    processes: Processes,
) -> None:
    """Do this process's share of what is missing."""
    pending = shards.pending()
    if len(pending) < len(units[processes.index :: processes.count]):
        for scorer in scorers.values():
            if isinstance(scorer, Judge):
                scorer.client.answered_before()
    share = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    with progress(console, f"scoring{share}", sum(len(units[unit]) for unit in pending)) as advance:
        for unit, judged in _judged(units, pending, scorers):
            by_label = {label: judged.get(label) or scorer.score(units[unit]) for label, scorer in scorers.items()}
            rows: list[dict[str, Any]] = [
                {"scores": {label: _as_json(scores[index]) for label, scores in by_label.items()}}
                for index in range(len(units[unit]))
            ]
            shards.write(unit, [*rows, {"counts": _counts(by_label)}])
            advance(len(units[unit]))


def _judged(
    units: Sequence[Sequence[RankedGroup]], pending: Sequence[int], scorers: Mapping[str, Scorer]
) -> Iterator[tuple[int, dict[str, list[GroupScores]]]]:
    """Every pending unit with what judges say of it: their requests of all units are under way together."""
    groups = [(unit, group) for unit in pending for group in units[unit]]
    streams = [
        zip(repeat(label), scorer.each([group for _, group in groups]), strict=False)
        for label, scorer in scorers.items()
        if isinstance(scorer, Judge)
    ]
    if not streams:
        yield from ((unit, {}) for unit in pending)
        return
    said: dict[int, dict[str, dict[int, GroupScores]]] = {unit: {} for unit in pending}
    for answer in filter(None, chain.from_iterable(zip_longest(*streams))):
        label, (index, scores) = answer
        unit = groups[index][0]
        said[unit].setdefault(label, {})[index] = scores
        if sum(map(len, said[unit].values())) == len(units[unit]) * len(streams):
            yield unit, {label: [part[at] for at in sorted(part)] for label, part in said.pop(unit).items()}


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
            write_files(output, contents, verb="score")  # with the mark of the output, which will replace them
            remedy = "Fix the cause and pass --overwrite."
            if all(isinstance(scorer, (PeopleScores, SourceScores)) for scorer in scorers.values()):
                remove_work_folder(shards.parts)  # costs nothing to make again
                remedy = "Fill the sheets, and run the same command again."
            reasons = "; ".join(f"{count} {reason}" for reason, count in report.failures.items()) or "groups of one"
            wanted = "two scored responses" if least_responses == 2 else "a scored response"
            raise UserError(
                f"{output}: not written, because no group has {wanted} ({reasons}). {failures} holds them all. {remedy}"
            )
        return rows

    shards.merge(finish, beside=lambda: contents)
    return ScoreOutcome(output, reports[0] if reports else None, failures if failures.exists() else None)


def _hand_out(
    section: ScoringSection, scorer: HumanScorer, groups: Sequence[RankedGroup], processes: Processes
) -> ScoreOutcome:
    """Write the sheet, unless the same one is there already: it may hold answers, and is never replaced."""
    sheet, texts = Path(scorer.sheet), texts_of(groups)

    def write() -> None:
        if not is_handed_out(sheet, texts, section.seed):
            write_sheet(sheet, texts, section.seed)

    processes.on_main(write)
    return ScoreOutcome(sheet=sheet)


#: In the folder of unfinished parts: what these were made from, by name.


def _made_from(recipe: Recipe, groups: Sequence[RankedGroup], least_responses: int) -> dict[str, str | None]:
    """A digest of each thing that the scores depend on, by what a user calls it; no settings of mere effort."""
    assert recipe.scoring is not None
    section = recipe.scoring
    texts = ([group.prompt, group.responses, group.sources, group.columns["raw_scores"]] for group in groups)
    settings = [_without_effort(section.scorer), section.seed, section.unit_groups, least_responses]
    return {
        "the settings of the scorer": fingerprint_of(settings),
        "scoring.input": fingerprint_of(*texts),
        **files_of_scorer(section.scorer, recipe),
    }


def files_of_scorer(scorer: Any, recipe: Recipe) -> dict[str, str | None]:
    """A digest of each file or model that a scorer's scores depend on, by what a user calls it.

    Args:
        scorer: any scorer's section.
        recipe: for scorers that read more of it.
    """
    digests: dict[str, str | None] = {}
    for part in _parts(scorer).values():
        if isinstance(part, RuleScorer):
            digests[f"the code of the rule {part.function}"] = rule_source(part.function)
        elif isinstance(part, RewardModelScorer):
            for name in filter(None, (part.model, part.base, part.tokenizer)):
                revision = part.revision if name == part.model else None
                digests[f"the reward model's files in {name}"] = weights_fingerprint(name, revision)
        elif isinstance(part, PolicyScorer):
            model, adapter = policy_of(part, recipe)
            digests["the settings of the policy"] = fingerprint_of(model.model_dump(mode="json"), adapter)
            digests[f"the policy's weights in {model.name}"] = weights_fingerprint(model.name, model.revision)
            if adapter is not None:
                digests[f"the adapter in {adapter}"] = weights_fingerprint(adapter)
        elif isinstance(part, HumanScorer):
            for sheet in part.annotations:
                digests[f"the ranks in {sheet}"] = weights_fingerprint(sheet)
    return digests


def _refuse_changes(shards: ShardedOutput, made_from: Mapping[str, str | None]) -> None:
    """Say what is not as it was when unfinished parts were made; the parts stay."""
    try:
        before = json.loads((shards.parts / MADE_FROM).read_text(encoding="utf-8"))
        changed = [name for name, digest in made_from.items() if name in before and before[name] != digest]
    except (OSError, ValueError, TypeError, AttributeError):
        return  # `ShardedOutput.open` knows that something changed, if not what
    if changed and any(part.stat().st_size for part in shards.parts.glob("part-*.jsonl")):
        raise UserError(
            f"{shards.parts}: holds the unfinished parts of other work, before a change of {', '.join(changed)}. Undo "
            "the change to continue, or pass --overwrite to start again."
        )


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


def _counts(by_label: Mapping[str, Sequence[GroupScores]]) -> dict[str, int]:
    """What scoring a unit took; of several scorers, each under its label."""
    counts: Counter[str] = Counter()
    for label, scored in by_label.items():
        for scores in scored:
            counts.update({name if len(by_label) == 1 else f"{label}: {name}": n for name, n in scores.counts.items()})
    return dict(counts)


def _as_json(scores: GroupScores) -> dict[str, Any]:
    return {name: value for name, value in asdict(scores).items() if value and name != "counts"}


def _from_json(values: Mapping[str, Any]) -> GroupScores:
    failures = {int(index): reason for index, reason in values.get("failures", {}).items()}
    return GroupScores(values["scores"], failures, values.get("aspects", {}))
