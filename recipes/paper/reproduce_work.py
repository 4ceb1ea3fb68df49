"""One row of one seed, from its recipe to its numbers, in whichever process; done once, continued after a kill.

A row's recipe is the YAML of `small/` and what it extends, with three changes: the folder `runs/reproduce/seed-0`
becomes that of the seed, the model's name becomes the one given, and every `seed` becomes the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from reproduce_rows import ROWS, Row
from rich.console import Console

from rrhf_peft.files import replace_text
from rrhf_peft.recipe import Recipe, make_recipe, read_recipe, recipe_text

#: What recipes in `small/` write into.
OUTPUT_IN_RECIPES = "runs/reproduce"
DONE, BEGUN = "done.json", "begun.json"


@dataclass(frozen=True)
class Setup:
    """What all rows share.

    Attributes:
        model: hub id or folder.
        output: the folder of stories and seeds.
        overrides: `section.key=value`, each for the recipes that have the section.
    """

    model: str
    output: Path
    overrides: tuple[str, ...] = ()

    def folder(self, seed: int, name: str) -> Path:
        """Where a row of a seed writes."""
        return self.output / f"seed-{seed}" / name

    def recipe(self, row: Row, seed: int) -> Recipe:
        """The row's recipe as it is run for this seed."""
        text = yaml.safe_dump(read_recipe(row.recipe), sort_keys=False)
        text = text.replace(f"{OUTPUT_IN_RECIPES}/seed-0/", f"{self.output}/seed-{seed}/")
        values = yaml.safe_load(text.replace(f"{OUTPUT_IN_RECIPES}/", f"{self.output}/"))
        values["model"]["name"] = self.model
        for section in values.values():
            if isinstance(section, dict) and "seed" in section:
                section["seed"] = seed
        overrides = [override for override in self.overrides if override.partition(".")[0] in values]
        return make_recipe(values, str(row.recipe), overrides, needs=())

    def fingerprint(self, row: Row, seed: int) -> str:
        """Of the row's recipe, the stories, and the rows that it reads: who has the same has the same result."""
        digest = hashlib.sha256(recipe_text(self.recipe(row, seed)).encode())
        for path in sorted((self.output / "stories").glob("*.jsonl")):
            digest.update(path.read_bytes())
        for name in row.needs:
            digest.update(self.fingerprint(ROWS[name], seed).encode())
        return digest.hexdigest()

    def done(self, row: Row, seed: int) -> dict[str, Any] | None:
        """What was noted of this very row when it was finished; None where it is not, or was with another recipe."""
        record = self.folder(seed, row.name) / DONE
        if not record.is_file():
            return None
        done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return done if done["fingerprint"] == self.fingerprint(row, seed) else None


def start_worker() -> None:
    """Once in each worker process: one thread, and a quiet end at Ctrl-C, of which the driver speaks for all.

    All that any row needs is imported now, so that a row's seconds hold none of it.
    """
    import torch

    import rrhf_peft.evaluate.run
    import rrhf_peft.rounds.run  # noqa: F401

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    torch.set_num_threads(1)


def run_row(setup: Setup, name: str, seed: int) -> dict[str, float]:
    """Do what the row's recipe has sections for, and return the seconds that each verb took.

    Noted are also the processor's seconds: on a machine that has other work to do they say what the row costs.

    Raises:
        UserError: anything the user can fix.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    row = ROWS[name]
    folder, fingerprint = setup.folder(seed, name), setup.fingerprint(row, seed)
    begun = folder / BEGUN
    if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)  # made from another recipe, or not by this script
        replace_text(begun, json.dumps({"fingerprint": fingerprint}) + "\n")
    recipe, seconds, processor = setup.recipe(row, seed), {}, time.process_time()
    for verb, work in _verbs(recipe):
        began = time.monotonic()
        work(recipe)
        seconds[verb] = round(time.monotonic() - began, 1)
    done = {
        "fingerprint": fingerprint,
        "seconds": seconds,
        "processor_seconds": round(time.process_time() - processor, 1),
    }
    replace_text(folder / DONE, json.dumps(done) + "\n")
    return seconds


def _verbs(recipe: Recipe) -> Sequence[tuple[str, Callable[[Recipe], Any]]]:
    """The verbs that a user would type for this recipe; each continues what a kill has left of it."""
    if recipe.rounds is not None:
        return [("rounds", _rounds)]
    wanted = [
        ("sample", _sample, recipe.sampling),
        ("score", _score, recipe.scoring),
        ("train", _train, recipe.training),
        ("evaluate", _evaluate, recipe.evaluation),
    ]
    return [(verb, work) for verb, work, section in wanted if section is not None]


def _quiet() -> Console:
    return Console(quiet=True)


def _sample(recipe: Recipe) -> None:
    from rrhf_peft.sample.run import sample_recipe

    assert recipe.sampling is not None
    if _is_missing(recipe.sampling.output):
        sample_recipe(recipe, console=_quiet())


def _score(recipe: Recipe) -> None:
    from rrhf_peft.score.run import score_recipe

    assert recipe.scoring is not None
    if _is_missing(recipe.scoring.output):
        score_recipe(recipe, console=_quiet())


def _train(recipe: Recipe) -> None:
    from rrhf_peft.train.run import train_recipe

    train_recipe(recipe, resume=True, console=_quiet())


def _evaluate(recipe: Recipe) -> None:
    from rrhf_peft.evaluate.folder import TABLE
    from rrhf_peft.evaluate.run import evaluate_recipe

    assert recipe.evaluation is not None
    if _is_missing(Path(recipe.evaluation.output) / TABLE):
        evaluate_recipe(recipe, console=_quiet())


def _rounds(recipe: Recipe) -> None:
    from rrhf_peft.rounds.run import run_rounds

    run_rounds(recipe, console=_quiet())


def _is_missing(path: str | Path) -> bool:
    """Whether a file that is written last and as a whole is not there."""
    return not Path(path).exists()
