"""The run folder: what is written where, when a checkpoint is whole, and whether a run may be resumed.

recipe.yaml        the resolved recipe        data_report.json   what the data was
metrics.jsonl      one line per log           README.md          the adapter's card
checkpoint-N/      to resume from             adapter_model.safetensors, tokenizer files ...
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from rrhf_peft.files import replace_text
from rrhf_peft.recipe import Recipe, recipe_text
from rrhf_peft.records import UserError

RECIPE, DATA_REPORT, METRICS = "recipe.yaml", "data_report.json", "metrics.jsonl"

#: Settings that may change between a run and its resumption: they do not touch the weights.
HARMLESS_PREFIXES = ("training.logging", "training.report_to", "training.save", "training.eval", "training.run_name")
HARMLESS_KEYS = frozenset({"training.output_dir", "training.disable_tqdm", "training.dataloader_num_workers"})


def refuse_occupied(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder; changes nothing.

    Raises:
        UserError: the folder holds something and neither `resume` nor `overwrite` was asked for, or it
            is to be overwritten but is not a run folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: training.output_dir is a file. Choose a folder.")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{folder}: training.output_dir cannot be made in {above}. Choose a writable folder.")
    if not folder.is_dir() or not any(folder.iterdir()) or resume:
        return
    if not overwrite:
        raise UserError(
            f"{folder}: training.output_dir already holds files. Pass --resume to continue that run, --overwrite to "
            "replace it, or choose another folder."
        )
    missing = [name for name in (RECIPE, DATA_REPORT) if not (folder / name).is_file()]
    if missing:  # a folder with a recipe.yaml alone may be where the user works
        raise UserError(
            f"{folder}: --overwrite replaces run folders only, and this one has no {missing[0]}. "
            "Choose another training.output_dir, or remove the folder yourself."
        )


def open_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the run folder, in place of an old one with `overwrite`.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: training.output_dir cannot be written to ({error.strerror}). Choose a writable folder."
        ) from None


def refuse_changes(folder: Path, recipe: Recipe, fingerprint: str) -> None:
    """Compare a run to resume with what would be trained now.

    Raises:
        UserError: the recipe or the data changed; names what did.
    """
    if not (folder / RECIPE).is_file():
        return  # killed before its first line: nothing to differ from
    then = _flat(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")))
    now = _flat(yaml.safe_load(recipe_text(recipe)))
    changed = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key not in HARMLESS_KEYS and not key.startswith(HARMLESS_PREFIXES)
    ]
    report = folder / DATA_REPORT
    if report.is_file() and json.loads(report.read_text(encoding="utf-8"))["train"]["fingerprint"] != fingerprint:
        changed.append("the training data gives other tokens or scores")
    if changed:
        raise UserError(
            f"{folder}: cannot resume, because {'; '.join(changed)}. Undo the change, choose another "
            "training.output_dir, or pass --ignore-changes to continue all the same."
        )


def describe_run(folder: Path, recipe: Recipe, reports: dict[str, Any]) -> None:
    """Write the recipe's and the data's snapshot."""
    replace_text(folder / RECIPE, recipe_text(recipe))
    replace_text(folder / DATA_REPORT, json.dumps(reports, indent=2, ensure_ascii=False) + "\n")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None.

    The trainer's state is written last, after every process's share, so a checkpoint without a
    readable one was cut short; it is passed over, and written anew when training gets there again.
    """
    numbered = sorted(
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    )
    for step, path in reversed(numbered):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if state.get("global_step") == step:
            return path
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
