"""The recipe of every stage of every round, derived from the one that the user wrote."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from transformers import TrainingArguments

from rrhf_peft.recipe import Recipe, make_recipe, recipe_text
from rrhf_peft.recipe.rounds import is_current_policy, round_paths

#: What training reads; the rest may change without making a run another one.
_TRAINING = ("model", "adapter", "data", "objective", "engine", "training", "online")


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
        for entry, own in zip(sampling["candidates"], self.recipe.sampling.candidates, strict=True):
            if is_current_policy(own):
                entry["source"] = source_of(own, number)
            elif own.model is None and own.endpoint is None:  # an adapter on the recipe's model
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
        for section, own in paths.items():
            if section in values:
                values[section].update(own)
        return values

    def _made(self, values: dict[str, Any], number: int, needs: Iterable[str]) -> Recipe:
        return make_recipe(values, f"{policy_name(number)} of {self.rounds.output}", needs=needs)


def source_of(entry: Any, number: int) -> str:
    """The source of what the current policy answers in round `number`: ``top_p:base``, ``top_p:round-1`` ..."""
    return entry.source or f"{entry.strategy}:{policy_name(number - 1)}"
