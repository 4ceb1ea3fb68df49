"""The stages of every round: their recipes, derived from the one that the user wrote, and which are finished.

    rounds.output/base/, round-1/ ...      stages.json and the stages' own files

A stage is finished when it stands in its round's `stages.json`, which is replaced as a whole; a stage that was
killed before that is called again, and continues or ends at once.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from rrhf_peft.data import read_groups
from rrhf_peft.files import replace_text
from rrhf_peft.recipe import Recipe, SamplingSection, make_recipe, recipe_text
from rrhf_peft.recipe.stages import is_current_policy, round_paths
from rrhf_peft.records import RankedGroup, UserError

#: What training reads; the rest may change without making a run another one.
_TRAINING = ("model", "adapter", "data", "objective", "engine", "training", "online")
#: Stage -> what it leaves in the round's folder, whole or in parts.
_LEAVES = {"sample": "candidates.jsonl*", "score": "scored.jsonl*", "train": "run", "evaluate": "evaluation*"}


def policy_name(number: int) -> str:
    """How tables and sources call the policy after round `number`; 0 is the one that the rounds start from."""
    return f"round-{number}" if number else "base"


class Stages:
    """Recipes by round number, from 1; each is a plain recipe that the single verb would run as well."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.rounds is not None, "load_recipe(needs=['rounds', ...])"
        self.recipe, self.rounds = recipe, recipe.rounds
        self._values: dict[str, Any] = yaml.safe_load(recipe_text(recipe))

    def sampling(self, number: int, prompts: Sequence[str] | None = None) -> Recipe:
        """Sample with the policy of the round before; `prompts` are this round's files, if not the recipe's own."""
        values = self._with_paths(number, "model", "sampling")
        values["model"] = self._model(number - 1)
        sampling = values["sampling"]
        sampling["seed"] += number - 1
        assert self.recipe.sampling is not None
        for entry, given in zip(sampling["candidates"], self.recipe.sampling.candidates, strict=True):
            if is_current_policy(given):
                entry["source"] = source_of(given, number)
            elif given.model is None and given.endpoint is None:  # an adapter on the recipe's model
                entry["model"] = self.recipe.model.name
        if prompts is not None:
            sampling.update(prompts=list(prompts), format="auto", max_prompts=None)
        return self._made(values, number, ["sampling"])

    def scoring(self, number: int) -> Recipe:
        """Score with the recipe's own scorer, which is the same in all rounds."""
        return self._made(self._with_paths(number, "model", "scoring"), number, ["scoring"])

    def training(self, number: int) -> Recipe:
        """Train the policy of the round before further, or with `start_from: base` the recipe's model anew."""
        values = self._with_paths(number, *_TRAINING)
        if self.rounds.start_from == "last" and number > 1:
            values["model"] = self._model(number - 1)
            if values["model"]["init_adapter"] is not None:
                del values["adapter"]  # the adapter brings its settings
        seed = values["training"].get("seed")
        values["training"]["seed"] = (TrainingArguments.seed if seed is None else seed) + number - 1
        return self._made(values, number, ["model", "data", "training"])

    def evaluation(self, number: int) -> Recipe:
        """Measure one policy, the one after round `number`; 0 is the one that the rounds start from."""
        values = self._with_paths(number, "model", "evaluation")
        run = self._run(number)
        policy = {} if number == 0 else {"model": run} if self.recipe.adapter is None else {"adapter": run}
        values["evaluation"]["policies"] = {policy_name(number): policy}
        return self._made(values, number, ["evaluation"])

    def _model(self, number: int) -> dict[str, Any]:
        """The section `model` of the policy after round `number`."""
        model = copy.deepcopy(self._values["model"])
        if number == 0:
            return model
        if self.recipe.adapter is None:
            return {**model, "name": self._run(number), "revision": None}
        return {**model, "init_adapter": self._run(number)}

    def _run(self, number: int) -> str:
        return round_paths(self.rounds.output, number)["training"]["output_dir"]

    def _with_paths(self, number: int, *sections: str) -> dict[str, Any]:
        values = {name: copy.deepcopy(self._values[name]) for name in sections if name in self._values}
        paths = round_paths(self.rounds.output, number)
        if number == 0:
            paths = {"evaluation": {"output": f"{self.rounds.output.rstrip('/')}/base/evaluation"}}
        for section, keys in paths.items():
            if section in values:
                values[section].update(keys)
        return values

    def _made(self, values: dict[str, Any], number: int, needs: Iterable[str]) -> Recipe:
        return make_recipe(values, f"{policy_name(number)} of {self.rounds.output}", needs=needs)


def source_of(entry: Any, number: int) -> str:
    """The source of what the current policy answers in round `number`: ``top_p:base``, ``top_p:round-1`` ..."""
    return entry.source or f"{entry.strategy}:{policy_name(number - 1)}"


def slice_of(prompts: Sequence[Any], number: int, size: int) -> list[Any]:
    """What round `number` (from 1) takes: the next `size`, from the start again at the end; none of them twice."""
    size = min(size, len(prompts))
    start = (number - 1) * size
    return [prompts[index % len(prompts)] for index in range(start, start + size)]


def write_slice(folder: Path, sampling: SamplingSection, number: int, size: int, *, write: bool = True) -> list[str]:
    """Write the round's prompts, with the responses that they came with, unless another process does (`write`).

    Returns:
        The files, in order: one, or several where prompts with, without and with scored responses are mixed,
        since a file is read as its first row is.
    """
    everything = read_groups(
        sampling.prompts, format=sampling.format, split=sampling.split, max_groups=sampling.max_prompts, needs="prompt"
    )
    files = []
    for part, (_, rows) in enumerate(itertools.groupby(slice_of(everything, number, size), _kind), start=1):
        path = folder / f"prompts{f'-{part}' if part > 1 else ''}.jsonl"
        if write:
            replace_text(path, "".join(json.dumps(_row(prompt), ensure_ascii=False) + "\n" for prompt in rows))
        files.append(str(path))
    return files


def _kind(prompt: RankedGroup) -> str:
    if not prompt.responses:
        return "bare"
    return "unscored" if None in prompt.scores else "ranked"


def _row(prompt: RankedGroup) -> dict[str, Any]:
    return {**prompt.row(), "origin": {**prompt.columns, **prompt.origin}}


class RoundFolder:
    """The folder of one round; number 0 holds the evaluation of the policy that the rounds start from."""

    def __init__(self, output: Path, number: int) -> None:
        self.path = output / policy_name(number)
        self._stages = self.path / "stages.json"

    def finished(self) -> dict[str, dict[str, Any]]:
        """Stage -> how long it took; those that are finished.

        Raises:
            UserError: the note of them is damaged.
        """
        if not self._stages.exists():
            return {}
        try:
            finished = json.loads(self._stages.read_text(encoding="utf-8"))
            assert all(isinstance(facts, dict) for facts in finished.values())
        except (OSError, ValueError, AttributeError, AssertionError, RecursionError):
            raise UserError(
                f"{self._stages}: is damaged, so nobody knows which stages are finished. Remove it: every stage looks "
                "at what it has written, and continues there."
            ) from None
        return dict(finished)

    def begun(self, stage: str) -> bool:
        """Whether an earlier run of the command has left something of a stage."""
        return any(self.path.glob(_LEAVES[stage]))

    def finish(self, stage: str, **facts: Any) -> None:
        """Note that a stage is finished; once this returns, a kill or a power cut does not undo it."""
        replace_text(self._stages, json.dumps({**self.finished(), stage: facts}, indent=2) + "\n")
