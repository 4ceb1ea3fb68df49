"""The `compare:` section: several objectives trained on the same data, and one evaluation of them all."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from rrhf_peft.recipe.objectives import OBJECTIVE_NAMES, ObjectiveSection
from rrhf_peft.recipe.section import OutputPath, Section


class CompareSection(Section):
    """What `rrhf-peft compare` reads, beside `model`, `data`, `training` and `evaluation`.

    Only the objective differs between the runs. The section `objective` and the paths (training.output_dir,
    evaluation.output and policies) are set by the comparison and left out of the recipe.
    """

    output: OutputPath = Field(description="The folder of all runs; each has a folder with its name in it.")
    objectives: dict[str, ObjectiveSection] = Field(
        min_length=1, description="Name in the table -> objective; a name that is an objective's own says the kind."
    )
    only: list[str] | None = Field(None, min_length=1, description="Train and compare only these. Unset: all.")

    @property
    def names(self) -> list[str]:
        """The runs, in the order of the table."""
        return [name for name in self.objectives if self.only is None or name in self.only]

    @model_validator(mode="after")
    def _refuse_unknown_names(self) -> CompareSection:
        for name in self.only or []:
            if name not in self.objectives:
                known = ", ".join(self.objectives)
                raise ValueError(f"compare.only: there is no objective {name!r}; there are {known}")
        return self


def run_folder(output: str, name: str) -> str:
    """Where the run of one objective is."""
    return f"{output.rstrip('/')}/{name}"


def with_compare_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's unchecked values with the first objective and the paths filled in; without `compare`, as they are.

    So the single verbs (`inspect`, `plan`, `train`, `evaluate`) understand the recipe as well.

    Raises:
        ValueError: one of these is set to something else.
    """
    compare = values.get("compare")
    objectives = compare.get("objectives") if isinstance(compare, dict) else None
    output = compare.get("output") if isinstance(compare, dict) else None
    if not isinstance(objectives, dict) or not objectives or not isinstance(output, str):
        return values
    assert isinstance(compare, dict)
    named = {
        name: {"name": name, **item} if isinstance(item, dict) and name in OBJECTIVE_NAMES else item
        for name, item in objectives.items()
    }
    filled = {**values, "compare": {**compare, "objectives": named}}
    only = compare.get("only")
    names = [name for name in named if not isinstance(only, list) or name in only] or list(named)
    first = named[names[0]]
    chosen = values.get("objective")
    if isinstance(chosen, dict) and isinstance(first, dict) and chosen.get("name") != first.get("name"):
        raise ValueError("objective: is set by compare.objectives; remove it")
    filled["objective"] = chosen or first
    weights = "model" if "adapter" in values and values["adapter"] is None else "adapter"
    policies = {"base": {}, **{name: {weights: run_folder(output, name)} for name in names}}
    for section, key, value in (
        ("training", "output_dir", run_folder(output, names[0])),
        ("evaluation", "output", f"{output.rstrip('/')}/evaluation"),
        ("evaluation", "policies", policies),
    ):
        inside = filled.get(section)
        if not isinstance(inside, dict):
            continue
        if _without_nulls(inside.get(key, value)) != value:
            raise ValueError(f"{section}.{key}: is set by compare, in {output}; remove it")
        filled[section] = {**inside, key: value}
    return filled


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
