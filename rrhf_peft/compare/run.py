"""Train several objectives on the same data, one after the other, and evaluate them all; continues after a kill."""

from __future__ import annotations

import contextlib
import gc
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from rrhf_peft.console import terminal
from rrhf_peft.evaluate.run import Evaluation, evaluate_recipe
from rrhf_peft.files import REPORT, BegunFolder, begun_folder, check_output, read_mark
from rrhf_peft.jobs import exclusive, launched_processes
from rrhf_peft.recipe import Recipe, load_recipe, make_recipe, recipe_text
from rrhf_peft.recipe.schema import compared_run
from rrhf_peft.records import UserError
from rrhf_peft.train.run import train_recipe, training_config

#: What is written last into a run folder; where one of these is, the run is finished.
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
#: Settings that may differ between a finished run and the recipe: they do not touch the weights.
_HARMLESS = ("output_dir", "disable_tqdm", "dataloader_num_workers", "report_to", "run_name")


def compare_recipe(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> Evaluation:
    """Train what `compare.objectives` lists and is not trained yet, and evaluate all; every process calls it.

    Args:
        recipe: with the sections `compare`, `model`, `data`, `training` and `evaluation`.
        overwrite: train and evaluate all again. What was there comes back if this fails before the first objective is
            trained, and goes when all is done.
        console: where notes, progress and tables go; standard error by default.

    Raises:
        UserError: anything the user can fix. What was finished is kept.
    """
    assert recipe.compare is not None, "load_recipe(needs=['compare', ...])"
    output, names = Path(recipe.compare.output), recipe.compare.names
    recipes = {name: objective_recipe(recipe, name) for name in names}
    if not overwrite:
        for name, one in recipes.items():
            _refuse_other_settings(name, one)
    # As in rounds: one process group, opened as training wants it.
    assert training_config(recipes[names[0]]).device is not None
    with launched_processes() as processes, exclusive(output, processes), contextlib.ExitStack() as end:
        shown = (console or terminal(stderr=True)) if processes.is_main else Console(quiet=True)
        opened: list[BegunFolder] = []  # of the main process
        processes.on_main(lambda: opened.append(end.enter_context(_open(output, recipe, overwrite=overwrite))))
        for number, (name, one) in enumerate(recipes.items(), start=1):
            folder = _run_folder(one)
            processes.wait_for_all()
            finished, begun = _is_finished(folder), folder.is_dir() and any(folder.iterdir())
            processes.wait_for_all()  # nobody finishes it while another one still looks
            state = ": trained before" if finished else ""
            shown.print(f"objective {name} ({number} of {len(names)}){state}", style="bold", highlight=False)
            if not finished:
                train_recipe(one, resume=begun, console=shown)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            for main in opened:
                main.keep()
        processes.wait_for_all()
        return evaluate_recipe(evaluation_recipe(recipe), console=shown)


@contextlib.contextmanager
def _open(output: Path, recipe: Recipe, *, overwrite: bool) -> Iterator[BegunFolder]:
    """Begin or continue the folder of all runs; main process only, which holds the lock."""
    assert recipe.compare is not None
    paths = [recipe.model.name, recipe.model.init_adapter]
    for named in (recipe.data.train, recipe.data.eval, recipe.evaluation and recipe.evaluation.prompts):
        paths += [named] if isinstance(named, str) else named or []
    if overwrite:
        check_output(output, key="compare.output", folder=True, reads=paths, overwrite=True)
    mark = read_mark(output)  # of runs that are not compared any more, as well
    writes = [f"{glob.escape(name)}/*" for name in (*recipe.compare.objectives, "evaluation")]
    writes = list(dict.fromkeys([REPORT, *writes, *(mark.writes if mark is not None else ())]))
    with begun_folder(output, verb="compare", writes=writes, overwrite=overwrite, resume=not overwrite) as folder:
        yield folder


def objective_recipe(recipe: Recipe, name: str) -> Recipe:
    """The plain recipe that trains one of the objectives."""
    assert recipe.compare is not None
    values = _values(recipe, leave_out=("compare", "evaluation"))
    values["objective"] = recipe.compare.objectives[name].model_dump(mode="json")
    values["training"]["output_dir"] = compared_run(recipe.compare.output, name)
    return make_recipe(values, f"objective {name} of {recipe.compare.output}")


def evaluation_recipe(recipe: Recipe) -> Recipe:
    """The plain recipe that evaluates them all."""
    assert recipe.compare is not None
    values = _values(recipe, leave_out=("compare", "data", "training", "objective"))
    return make_recipe(values, f"evaluation of {recipe.compare.output}", needs=["evaluation"])


def _values(recipe: Recipe, leave_out: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(recipe_text(recipe))
    return {section: value for section, value in values.items() if section not in leave_out}


def _run_folder(recipe: Recipe) -> Path:
    training: Any = recipe.training
    return Path(training.output_dir)


def _is_finished(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def _refuse_other_settings(name: str, recipe: Recipe) -> None:
    """A finished run is not trained again, so it must be the one that the recipe describes."""
    folder = _run_folder(recipe)
    if not _is_finished(folder):
        return
    then, now = _telling(load_recipe(folder / "recipe.yaml")), _telling(recipe)
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if changed:
        raise UserError(
            f"{folder}: {name} was trained with other settings ({', '.join(changed)}). Undo the change, remove the "
            "folder, name another compare.output, or pass --overwrite to train all again."
        )


def _telling(recipe: Recipe) -> dict[str, Any]:
    """What decides the weights, key by key; `model.dtype` is resolved where a run has begun."""
    values = _values(recipe, leave_out=("compare", "evaluation"))
    return {
        f"{section}.{key}": value
        for section, items in values.items()
        if isinstance(items, dict)
        for key, value in items.items()
        if (section, key) != ("model", "dtype")
        and not (section == "training" and (key in _HARMLESS or key.startswith(("logging", "save", "eval"))))
    }
