"""All rounds of a recipe, one stage after the other, from wherever an earlier run of the command was stopped."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from rrhf_peft.console import terminal
from rrhf_peft.evaluate.folder import TABLE
from rrhf_peft.evaluate.run import evaluate_recipe
from rrhf_peft.jobs import Processes, launched_processes
from rrhf_peft.recipe import Recipe
from rrhf_peft.rounds.folder import RoundFolder, open_rounds
from rrhf_peft.rounds.prompts import write_slice
from rrhf_peft.rounds.stages import Stages, policy_name
from rrhf_peft.rounds.table import Row, read_rows, rows_table, write_tables
from rrhf_peft.sample.run import sample_recipe
from rrhf_peft.score.run import score_recipe
from rrhf_peft.train.run import train_recipe, training_config


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
        UserError: anything the user can mend. What was finished is kept.
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

    def run(self, overwrite: bool) -> RoundsOutcome:
        if self.processes.is_main:
            open_rounds(self.output, self.recipe, overwrite=overwrite)
        self.processes.wait_for_all()
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
        self.processes.wait_for_all()
        is_finished, self.is_begun = stage in folder.finished(), folder.begun(stage)
        self.processes.wait_for_all()  # nobody finishes it while another one still looks
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
        if self.processes.is_main:
            folder.finish(stage, seconds=round(time.monotonic() - began, 1), resumed=self.is_begun)

    def _sample(self, number: int) -> None:
        folder = RoundFolder(self.output, number).path
        files = None
        if self.prompts_per_round is not None:
            assert self.recipe.sampling is not None
            size, main = self.prompts_per_round, self.processes.is_main
            files = write_slice(folder, self.recipe.sampling, number, size, write=main)
            self.processes.wait_for_all()
        recipe = self.stages.sampling(number, files)
        assert recipe.sampling is not None
        self._unless_written(
            Path(recipe.sampling.output), "stages", lambda: sample_recipe(recipe, console=self.console)
        )

    def _score(self, number: int) -> None:
        recipe = self.stages.scoring(number)
        assert recipe.scoring is not None
        output = Path(recipe.scoring.output)
        self._unless_written(output, "parts", lambda: score_recipe(recipe, console=self.console))

    def _unless_written(self, output: Path, leftovers: str, work: Callable[[], object]) -> None:
        """A stage writes its output last and as a whole; a kill can leave the parts that it was made of beside it."""
        is_written = output.exists()
        self.processes.wait_for_all()
        if not is_written:
            work()
        elif self.processes.is_main:
            shutil.rmtree(output.with_name(f"{output.name}.{leftovers}"), ignore_errors=True)

    def _train(self, number: int) -> None:
        train_recipe(self.stages.training(number), resume=self.is_begun, console=self.console)

    def _evaluate(self, number: int) -> None:
        recipe = self.stages.evaluation(number)
        assert recipe.evaluation is not None
        output = Path(recipe.evaluation.output) / TABLE
        self._unless_written(output, "parts", lambda: evaluate_recipe(recipe, console=self.console))

    def _tables(self, number: int) -> list[Row]:
        """Write the tables of all rounds so far, and show them if this round is new."""
        rows = read_rows(self.recipe, self.output, number)
        if self.processes.is_main:
            write_tables(self.output, rows)
            if self.worked:
                self.console.print(rows_table(rows))
        return rows
