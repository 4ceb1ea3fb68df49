"""Recipes in and out: YAML and dotted overrides in, a checked `Recipe`, a snapshot and a JSON schema out."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rrhf_peft.recipe.explain import OVERRIDE, Key, did_you_mean, explain, kind_of
from rrhf_peft.recipe.schema import Recipe
from rrhf_peft.records import UserError

#: The sections that training, planning and inspecting cannot do without.
TRAINING_NEEDS = ("model", "data", "training")


class _RecipeYaml(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, only true and false are booleans, no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, which takes "no" (as in eval_strategy: no) for a boolean, and 1e-4 for
# text because it has no point.
_RecipeYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_RecipeYaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))


def load_recipe(
    path: str | os.PathLike[str], overrides: Iterable[str] = (), *, needs: Iterable[str] = TRAINING_NEEDS
) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides, and check it.

    Args:
        path: The YAML file.
        overrides: Changes to it, later ones win.
        needs: Sections that the caller reads and the recipe must therefore have.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; names file, line, key and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe{_near_file(path)}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot read this recipe ({reason}). Check the path.") from None
    values, places = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of sections (model, data, training ...), not {kind_of(values)}."
        )
    return _checked(values, str(path), places, overrides, needs)


def make_recipe(
    values: Mapping[str, Any],
    where: str = "recipe",
    overrides: Iterable[str] = (),
    *,
    needs: Iterable[str] = TRAINING_NEEDS,
) -> Recipe:
    """Apply overrides to a mapping of sections and check it; `where` names its origin in error messages.

    `needs` are the sections that the caller reads, as for `load_recipe`.

    Raises:
        UserError: one paragraph that lists every wrong key with its remedy.
    """
    return _checked(copy.deepcopy(dict(values)), where, {}, overrides, needs)


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML: our sections in full, pass-through sections as far as they were set.

    `load_recipe` reads it back to an equal recipe.
    """
    absent = {name for name in Recipe.model_fields if getattr(recipe, name) is None}
    values = recipe.model_dump(mode="json", exclude=absent | {"adapter", "training"})
    values["adapter"] = None if recipe.adapter is None else recipe.adapter.model_dump(mode="json", exclude_none=True)
    if recipe.training is not None:
        values["training"] = recipe.training.model_dump(mode="json", exclude_none=True)
    ordered = {name: values[name] for name in Recipe.model_fields if name in values}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors: `# yaml-language-server: $schema=recipe.schema.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _checked(
    values: dict[str, Any],
    where: str,
    places: dict[Key, str],
    overrides: Iterable[str],
    needs: Iterable[str],
) -> Recipe:
    for override in overrides:
        key = _apply_override(values, override)
        places = {other: place for other, place in places.items() if other[: len(key)] != key}
        places[key] = OVERRIDE
    missing = "".join(f" {name}: this key is required." for name in needs if name not in values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, places)}{missing}") from None
    if missing:
        raise UserError(f"{where}:{missing} It is a section of the recipe that this command reads.")
    return recipe


def _parse_yaml(text: str, where: str) -> tuple[Any, dict[Key, str]]:
    """The values in a YAML document, and the line of every key in it."""
    try:
        loader = _RecipeYaml(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), dict(_places(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise UserError(f"{where}{line}: this is not valid YAML ({problem}). Mend it there.") from None


def _places(node: yaml.Node | None, inside: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(node, yaml.MappingNode) and len(inside) < 4:  # an alias may point back to its parent
        for key, value in node.value:
            yield (*inside, key.value), f"line {key.start_mark.line + 1}"
            yield from _places(value, (*inside, key.value))


def _apply_override(values: dict[str, Any], override: str) -> Key:
    """Set one value in the nested mapping, and return its key."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"{override!r} is not an override. Write section.key=value, for example training.learning_rate=1e-4."
        )
    target: Any = values
    for depth, part in enumerate(parts[:-1]):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            inner = ".".join(parts[: depth + 1])
            raise UserError(f"override {override!r}: {inner} is {kind_of(target)}, not a section, so it has no keys.")
    target[parts[-1]] = _override_value(text, override)
    return tuple(parts)


def _override_value(text: str, override: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeYaml) if text.strip() else text
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(
            f"override {override!r}: the value is not valid YAML ({problem}). Put quotes around text that holds "
            "brackets, colons or commas."
        ) from None


def _near_file(path: Path) -> str:
    siblings = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return did_you_mean(str(path), siblings).removesuffix("?")
