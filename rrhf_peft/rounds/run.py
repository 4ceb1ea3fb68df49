"""All rounds of a recipe, one stage after the other, from wherever an earlier run of the command was stopped.

recipe.yaml              the resolved recipe, written before anything else
inputs.json              digests of the data, the models and the rules that it names
rounds.json, table.md    the numbers of all finished rounds
base/, round-1/ ...      the stages (`rrhf_peft.rounds.stages`)
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from rrhf_peft.console import terminal
from rrhf_peft.evaluate.run import evaluate_recipe
from rrhf_peft.files import (
    REPORT,
    BegunFolder,
    begun_folder,
    check_output,
    digest_of,
    is_empty_folder,
    read_mark,
    replace_text,
    retired_folder,
)
from rrhf_peft.jobs import Processes, exclusive, fingerprint_of, launched_processes
from rrhf_peft.modeling import weights_fingerprint
from rrhf_peft.recipe import Recipe, recipe_text
from rrhf_peft.recipe.stages import JudgeScorer, PolicyScorer, RewardModelScorer
from rrhf_peft.records import UserError
from rrhf_peft.rounds.stages import RoundFolder, Stages, policy_name, write_slice
from rrhf_peft.rounds.table import Row, read_rows, rows_table, write_tables
from rrhf_peft.sample.run import sample_recipe
from rrhf_peft.score.run import files_of_scorer, score_recipe
from rrhf_peft.train.run import train_recipe, training_config
from rrhf_peft.train.run_folder import HARMLESS_KEYS, HARMLESS_PREFIXES, read_recipe

RECIPE, INPUTS = "recipe.yaml", "inputs.json"
#: What a round writes in its folder, and rounds in theirs. A file of another name is a user's.
_OF_A_ROUND = (
    *("stages.json", "prompts*.jsonl", "candidates.*", "scored.*"),
    *("run/*", "evaluation/*"),  # which have marks that tell more
)
WRITES = (
    *(RECIPE, INPUTS, "rounds.json", "table.md", REPORT),
    *(f"{folder}/{pattern}" for folder in ("base", "round-[0-9]*") for pattern in _OF_A_ROUND),
)
#: May change between two runs of the command: how far to go, and what changes no result.
_HARMLESS = HARMLESS_KEYS | {"rounds.count", "sampling.batch_tokens", "evaluation.batch_tokens"}
_EFFORT = tuple(JudgeScorer.EFFORT | PolicyScorer.EFFORT | RewardModelScorer.EFFORT)


@dataclass(frozen=True)
class RoundsOutcome:
    """What all rounds leave.

    Attributes:
        output: the folder of all rounds.
        rows: one for each policy, the one that the rounds start from first where it was evaluated.
        was_finished: there was nothing left to do.
    """

    output: Path
    rows: list[Row]
    was_finished: bool


def run_rounds(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> RoundsOutcome:
    """Run the rounds that a recipe describes, or finish what an earlier run began; every process calls it.

    Args:
        recipe: with the sections `rounds`, `model`, `data`, `training`, `sampling` and `scoring`; each round is
            evaluated where there is `evaluation`.
        overwrite: remove an existing folder of rounds first, and start again.
        console: where notes, progress and tables go; standard error by default.

    Raises:
        UserError: anything the user can fix. What was finished is kept.
    """
    assert recipe.rounds is not None, "load_recipe(needs=['rounds', ...])"
    stages = Stages(recipe)
    # Opens the launched processes' group as training wants it. There is but one such group in all stages, because
    # a second one would read in the launcher's store what the first left there.
    assert training_config(stages.training(1)).device is not None
    with launched_processes() as processes:
        return _Rounds(recipe, stages, processes, console or terminal(stderr=True)).run(overwrite)


class _Rounds:
    """One run of the command, as each of its processes sees it."""

    def __init__(self, recipe: Recipe, stages: Stages, processes: Processes, console: Console) -> None:
        assert recipe.rounds is not None
        self.recipe, self.stages, self.processes = recipe, stages, processes
        self.console = console if processes.is_main else Console(quiet=True)
        self.output, self.count = Path(recipe.rounds.output), recipe.rounds.count
        self.prompts_per_round = recipe.rounds.prompts_per_round
        self.worked = self.is_begun = False
        self.folder: BegunFolder | None = None  # of the main process

    def run(self, overwrite: bool) -> RoundsOutcome:
        with exclusive(self.output, self.processes), contextlib.ExitStack() as stack:

            def begin() -> None:
                self.folder = stack.enter_context(open_rounds(self.output, self.recipe, overwrite=overwrite))

            self.processes.on_main(begin)
            return self._rounds()

    def _rounds(self) -> RoundsOutcome:
        if self.recipe.evaluation is not None:
            self._stage(0, "evaluate", self._evaluate)
        rows: list[Row] = []
        for number in range(1, self.count + 1):
            worked_before, self.worked = self.worked, False
            self._stage(number, "sample", self._sample)
            self._stage(number, "score", self._score)
            self._stage(number, "train", self._train)
            if self.recipe.evaluation is not None:
                self._stage(number, "evaluate", self._evaluate)
            rows = self._tables(number)
            self.worked |= worked_before
        return RoundsOutcome(self.output, rows, was_finished=not self.worked)

    def _stage(self, number: int, stage: str, work: Callable[[int], None]) -> None:
        """Do a stage that is not finished yet, and free the memory that it took."""
        folder = RoundFolder(self.output, number)
        is_finished, self.is_begun = self.processes.on_main(lambda: (stage in folder.finished(), folder.begun(stage)))
        if is_finished:
            return
        self.worked = True
        self.console.print(f"{policy_name(number)}: {stage}", style="bold", highlight=False)
        began = time.monotonic()
        work(number)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.processes.wait_for_all()
        if self.folder is not None:
            folder.finish(stage, seconds=round(time.monotonic() - began, 1), resumed=self.is_begun)
            self.folder.keep()

    def _sample(self, number: int) -> None:
        folder = RoundFolder(self.output, number).path
        files = None
        if self.prompts_per_round is not None:
            assert self.recipe.sampling is not None
            size, main = self.prompts_per_round, self.processes.is_main
            files = write_slice(folder, self.recipe.sampling, number, size, write=main)
            self.processes.wait_for_all()
        sample_recipe(self.stages.sampling(number, files), console=self.console)

    def _score(self, number: int) -> None:
        score_recipe(self.stages.scoring(number), console=self.console)

    def _train(self, number: int) -> None:
        train_recipe(self.stages.training(number), resume=self.is_begun, console=self.console)

    def _evaluate(self, number: int) -> None:
        evaluate_recipe(self.stages.evaluation(number), console=self.console)

    def _tables(self, number: int) -> list[Row]:
        """Write the tables of all rounds so far, and show them if this round is new."""
        rows = read_rows(self.recipe, self.output, number)
        if self.processes.is_main:
            write_tables(self.output, rows)
            if self.worked:
                self.console.print(rows_table(rows))
        return rows


@contextlib.contextmanager
def open_rounds(output: Path, recipe: Recipe, *, overwrite: bool) -> Iterator[BegunFolder]:
    """Begin, or continue what an earlier run of the same recipe began; main process only, which holds the lock.

    With `overwrite`, the rounds that were there are set aside. They come back if these fail before their first stage
    is finished, and go when these are.

    Raises:
        UserError: the recipe or the data changed, or the folder holds something else.
    """
    inputs = _inputs(recipe)
    is_held = output.is_dir() and not is_empty_folder(output)
    if is_held and read_mark(output) is None and not _is_of_rounds(output):
        raise UserError(
            f"{output}: rounds.output holds files that are not of rounds (no {RECIPE} with a section rounds). Choose "
            "another folder, or remove this one yourself."
        )
    reads = [recipe.model.name, recipe.model.init_adapter, *(path for paths in inputs.values() for path in paths)]
    check_output(output, key="rounds.output", folder=True, reads=reads, overwrite=overwrite, continues=True)
    # A recipe that was refused before its first stage may be fixed.
    if not overwrite and is_held and any(path.is_dir() for path in output.iterdir()):
        _refuse_changes(output, recipe, inputs)
    try:
        with begun_folder(output, verb="rounds", writes=WRITES, overwrite=overwrite, resume=not overwrite) as folder:
            replace_text(output / RECIPE, recipe_text(recipe))
            replace_text(output / INPUTS, json.dumps(inputs, indent=1) + "\n")
            yield folder
    except UserError as error:
        if (retired := retired_folder(output)) is None:
            raise
        raise UserError(
            f"{error} The rounds that these replace are kept in {retired} until these are finished."
        ) from error


def _inputs(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Key of the recipe -> what it names -> digest of its content; of data, hub ids are left out.

    Every round looks at what its own stages read; this is for what has to be the same in all of them.
    """
    evaluation, scoring = recipe.evaluation, recipe.scoring
    named: dict[str, Any] = {"data.eval": recipe.data.eval}
    if recipe.sampling is not None:
        named["sampling.prompts"] = recipe.sampling.prompts
    if evaluation is not None:
        named |= {f"evaluation.{key}": getattr(evaluation, key) for key in ("prompts", "pairs", "references")}
    inputs: dict[str, dict[str, str]] = {}
    for key, value in named.items():
        paths = [value] if isinstance(value, str) else value or []
        digests = {path: _digest(Path(path)) for path in paths if os.path.exists(path)}
        if digests:
            inputs[key] = digests
    entries = recipe.sampling.candidates if recipe.sampling is not None else ()
    models = {"model.name": recipe.model.name, "model.init_adapter": recipe.model.init_adapter}
    for index, entry in enumerate(entries):
        models |= {f"sampling.candidates.{index}.{key}": getattr(entry, key) for key in ("model", "adapter")}
    read = {key: {name: weights_fingerprint(name)} for key, name in models.items() if name is not None}
    if scoring is not None:
        read["scoring.scorer"] = files_of_scorer(scoring.scorer, recipe)
    for label, scorer in (evaluation.scorers if evaluation is not None else {}).items():
        read[f"evaluation.scorers.{label}"] = files_of_scorer(scorer, recipe)
    for key, by_file in read.items():
        if known := {name: digest for name, digest in by_file.items() if digest is not None}:
            inputs[key] = known
    return inputs


def _digest(path: Path) -> str:
    if not path.is_dir():
        return digest_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint_of([[str(file.relative_to(path)), digest_of(file)] for file in files])


def _is_of_rounds(output: Path) -> bool:
    """Whether the first version of this program, which left no mark, made it."""
    try:
        return "rounds" in yaml.safe_load((output / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return False


def _refuse_changes(output: Path, recipe: Recipe, inputs: dict[str, dict[str, str]]) -> None:
    try:
        then = _flat(read_recipe(output / RECIPE)[1])
        inputs_then = json.loads((output / INPUTS).read_text(encoding="utf-8")) if (output / INPUTS).exists() else {}
        held = {key: dict(digests) for key, digests in inputs_then.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{output}: {RECIPE} or {INPUTS} is missing or damaged ({reason}), so nobody knows what these rounds "
            "belong to. Restore it, choose another rounds.output, or pass --overwrite."
        ) from None
    now = _flat(yaml.safe_load(recipe_text(recipe)))
    changed = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key) and not _is_harmless(key)
    ]
    for key, digests in inputs.items():
        changed += [
            f"{key}: {path} has another content"
            for path, digest in digests.items()
            if held.get(key, {}).get(path, digest) != digest
        ]
    if not changed and [key for key in then if key in now] != [key for key in now if key in then]:
        changed = ["keys stand in another order, which counts where patterns are tried in turn"]
    if changed:
        raise UserError(
            f"{output}: holds rounds of another recipe: {'; '.join(changed)}. Undo the change to continue them, choose "
            "another rounds.output, or pass --overwrite to replace them all."
        )


def _is_harmless(key: str) -> bool:
    if key in _HARMLESS or key.startswith(HARMLESS_PREFIXES):
        return True
    return key.startswith(("scoring.scorer", "evaluation.scorers")) and key.endswith(_EFFORT)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, without what is unset."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = {str(index): value for index, value in enumerate(values)}
    if not isinstance(values, dict) or not values:
        return {} if values is None else {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
