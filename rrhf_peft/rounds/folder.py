"""The folder of all rounds: what belongs to which recipe, and which stages are finished.

    recipe.yaml              the resolved recipe, written before anything else
    rounds.json, table.md    the numbers of all finished rounds
    base/, round-1/ ...      stages.json and the stages' own files

A stage is finished when it stands in its round's `stages.json`, which is replaced as a whole; a stage that was
killed before that is called again, and continues or ends at once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from rrhf_peft.files import replace_text
from rrhf_peft.recipe import Recipe, recipe_text
from rrhf_peft.recipe.scoring import JudgeScorer, PolicyScorer, RewardModelScorer
from rrhf_peft.records import UserError
from rrhf_peft.rounds.stages import policy_name
from rrhf_peft.train.run_folder import HARMLESS_KEYS, HARMLESS_PREFIXES

RECIPE = "recipe.yaml"
#: Stage -> what it leaves in the round's folder, whole or in parts.
_LEAVES = {"sample": "candidates.jsonl*", "score": "scored.jsonl*", "train": "run", "evaluate": "evaluation*"}

#: May change between two runs of the command: how far to go, and what changes no result.
_HARMLESS = HARMLESS_KEYS | {"rounds.count", "sampling.batch_tokens", "evaluation.batch_tokens"}
_EFFORT = tuple(JudgeScorer.EFFORT | PolicyScorer.EFFORT | RewardModelScorer.EFFORT)


class RoundFolder:
    """The folder of one round; number 0 holds the evaluation of the policy that the rounds start from."""

    def __init__(self, output: Path, number: int) -> None:
        self.path = output / policy_name(number)
        self._stages = self.path / "stages.json"

    def finished(self) -> dict[str, dict[str, Any]]:
        """Stage -> how long it took; those that are finished."""
        return json.loads(self._stages.read_text(encoding="utf-8")) if self._stages.exists() else {}

    def begun(self, stage: str) -> bool:
        """Whether an earlier run of the command has left something of a stage."""
        return any(self.path.glob(_LEAVES[stage]))

    def finish(self, stage: str, **facts: Any) -> None:
        """Note that a stage is finished; once this returns, a kill or a power cut does not undo it."""
        replace_text(self._stages, json.dumps({**self.finished(), stage: facts}, indent=2) + "\n")


def open_rounds(output: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Begin, or continue what an earlier run of the same recipe began; main process only.

    Raises:
        UserError: the recipe changed, or the folder holds something else.
    """
    retired = output.with_name(f".{output.name}.retired")
    if retired.exists():  # killed while it was being removed
        shutil.rmtree(retired)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: rounds.output is a file. Choose a folder.")
    held = [path for path in output.iterdir() if path.name != f".{RECIPE}.partial"] if output.exists() else []
    if held and not _is_of_rounds(output):
        raise UserError(
            f"{output}: rounds.output holds files that are not of rounds (no {RECIPE} with a section rounds). Choose "
            "another folder, or remove this one yourself."
        )
    if held and overwrite:
        output.rename(retired)
        shutil.rmtree(retired)
    elif any(path.name != RECIPE for path in held):  # else it was refused before its first stage, and mended since
        _refuse_changes(output, recipe)
    try:
        replace_text(output / RECIPE, recipe_text(recipe))
    except OSError as error:
        raise UserError(f"{output}: rounds.output cannot be made ({error.strerror}). Choose another folder.") from None


def _is_of_rounds(output: Path) -> bool:
    try:
        return "rounds" in yaml.safe_load((output / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return False


def _refuse_changes(output: Path, recipe: Recipe) -> None:
    then = _flat(yaml.safe_load((output / RECIPE).read_text(encoding="utf-8")))
    now = _flat(yaml.safe_load(recipe_text(recipe)))
    changed = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key) and not _is_harmless(key)
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
        values = {str(place): value for place, value in enumerate(values)}
    if not isinstance(values, dict) or not values:
        return {} if values is None else {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
