"""Recipes in and out: YAML and dotted overrides in, a checked `Recipe`, a snapshot and a JSON schema out.

Left to others: what a recipe may hold (`recipe.schema`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rrhf_peft.recipe.schema import MOVED_KEYS, Recipe
from rrhf_peft.records import UserError


class _RecipeYaml(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # YAML 1.1, which PyYAML follows, reads 1e-4 as a string because it has no point.
    re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides, and check it.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; names file, key and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this recipe ({_reason(error)}). Check the path.") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections (model, data, training ...), not {_kind(values)}.")
    for override in overrides:
        _apply_override(values, override)
    return make_recipe(values, where=str(path))


def make_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check a mapping of sections; `where` names its origin in error messages.

    Raises:
        UserError: one paragraph that lists every wrong key with its remedy.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_explain(item) for item in error.errors()))
        raise UserError(f"{where}: {problems}.") from None


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML: our sections in full, pass-through sections as far as they were set."""
    values = recipe.model_dump(mode="json", exclude={"adapter", "training"})
    values["adapter"] = None if recipe.adapter is None else recipe.adapter.model_dump(mode="json", exclude_none=True)
    values["training"] = recipe.training.model_dump(mode="json", exclude_none=True)  # type: ignore[attr-defined]
    ordered = {name: values[name] for name in Recipe.model_fields}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors: `# yaml-language-server: $schema=recipe.schema.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeYaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: this is not valid YAML ({problem}). Mend that line.") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"{override!r} is not an override. Write section.key=value, for example training.learning_rate=1e-4."
        )
    target: Any = values
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {part!r} is a value, not a section, so it has no keys.")
    target[parts[-1]] = _parse_yaml(text, f"override {override!r}") if text.strip() else text


def _explain(item: Any) -> str:
    """One pydantic error as `section.key: what is wrong, and the remedy`."""
    location = [part for part in item["loc"] if not _is_union_branch(part)]
    key = ".".join(str(part) for part in location)
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_remedy_for_unknown(location)}"
    if kind == "missing":
        return f"{key}: this key is required"
    if kind == "literal_error":
        expected = item["ctx"]["expected"]
        choices = re.findall(r"'([^']*)'", expected)
        return f"{key}: {given!r} is not one of {expected}{_did_you_mean(str(given), choices)}"
    if kind == "union_tag_invalid":
        expected = item["ctx"]["expected_tags"]
        return f"{key}.name: {item['ctx']['tag']!r} is not one of {expected}"
    if kind == "value_error":  # our own contradictions, which name their keys
        return str(item["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}: this is a section with keys of its own, not {_kind(given)}"
    message = item["msg"].removeprefix("Input ")
    return f"{key}: the value {given!r} ({_kind(given)}) {message}"


def _is_union_branch(part: Any) -> bool:
    """Pydantic puts the tried member of a union into the location; users never wrote it."""
    return isinstance(part, str) and (
        part in {"rrhf", "sft", "int", "float", "str", "bool", "dict", "list"}
        or part.startswith(("literal[", "list[", "constrained", "dict["))
    )


def _remedy_for_unknown(location: list[Any]) -> str:
    key = ".".join(str(part) for part in location)
    if key in MOVED_KEYS:
        return MOVED_KEYS[key]
    for section in Recipe.model_fields:  # the right key in the wrong section
        if location[-1] in _known_keys([section]):
            return f"did you mean '{section}.{location[-1]}'?"
    known = _known_keys(location[:-1])
    if near := _did_you_mean(str(location[-1]), known):
        return near.removeprefix("; ")
    return f"known keys: {', '.join(sorted(known))}" if len(known) <= 20 else "see the recipe schema for known keys"


def _known_keys(section: list[Any]) -> list[str]:
    if not section:
        return list(Recipe.model_fields)
    annotation = Recipe.model_fields[section[0]].annotation if section[0] in Recipe.model_fields else None
    return [name for model in _models_in(annotation) for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _did_you_mean(given: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _kind(value: Any) -> str:
    names = {type(None): "nothing", str: "text", bool: "true/false", int: "an integer", float: "a number"}
    return names.get(type(value)) or {list: "a list", dict: "a mapping"}.get(type(value), type(value).__name__)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def write_json_schema(path: str | os.PathLike[str]) -> None:
    """Write `json_schema()` to a file."""
    Path(path).write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
