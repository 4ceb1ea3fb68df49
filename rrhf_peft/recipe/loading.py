"""Recipes in and out: YAML and dotted overrides in, a checked `Recipe`, a snapshot and a JSON schema out."""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rrhf_peft.recipe.messages import OVERRIDE, Key, did_you_mean, explain, key_text, kind_of
from rrhf_peft.recipe.schema import Recipe
from rrhf_peft.records import UserError

#: The sections that training, planning and inspecting cannot do without.
TRAINING_NEEDS = ("model", "data", "training")

#: Beyond these sizes a file is no recipe, and would keep the parser busy for minutes.
MOST_BYTES = 256 * 1024
MOST_VALUES = 20_000
MOST_LEVELS = 32


class _RecipeYaml(yaml.SafeLoader):
    """YAML as people write it, and what they do not write refused.

    1e-4 is a number, 0100 and 1:30 are text and not octal and base 60, dates are text, only true and false are
    booleans; keys are text and none comes twice; no nesting without end and no numbers beyond 64 bits.
    """

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.level += 1
        if self.level > MOST_LEVELS:
            raise _refused(f"more than {MOST_LEVELS} levels of nesting", self.peek_event())
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                written = key.value if isinstance(key, yaml.ScalarNode) else "..."
                raise _refused(f"the key {written} is not text; put quotes around it", key)
            if key.value in seen:
                raise _refused(f"the key {key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?[0-9][0-9_]{0,29}", node.value) or abs(int(node.value)) >= 2**63:
            raise _refused(f"{node.value[:40]!r} is not a whole number below 2**63", node)
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        try:
            return float(super().construct_yaml_float(node))
        except ValueError:
            raise _refused(f"{node.value[:40]!r} is not a number", node) from None

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if re.search("[\x00\ud800-\udfff]", text):
            raise _refused("text with a character that no file can hold", node)
        return text


def _refused(problem: str, where: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


def _set_up(loader: type[_RecipeYaml]) -> None:
    """PyYAML follows YAML 1.1, which takes `no` for a boolean, 0100 for 64 and 1e-4 for text; these do not."""
    loader.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("bool", r"true|True|false|False", "tTfF"),
        ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
        ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("merge", r"<<", "<"),
    ):
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), list(first))
    known = ("null", "bool", "seq", "map")
    loader.yaml_constructors = {None: yaml.SafeLoader.construct_undefined}
    for name in known:
        loader.yaml_constructors[f"tag:yaml.org,2002:{name}"] = yaml.SafeLoader.yaml_constructors[
            f"tag:yaml.org,2002:{name}"
        ]
    for name in ("int", "float", "str"):
        loader.add_constructor(f"tag:yaml.org,2002:{name}", getattr(loader, f"construct_yaml_{name}"))


_set_up(_RecipeYaml)


def load_recipe(
    path: str | os.PathLike[str], overrides: Iterable[str] = (), *, needs: Iterable[str] = TRAINING_NEEDS
) -> Recipe:
    """Read a YAML recipe with what it extends, apply `section.key=value` overrides, and check it.

    Args:
        path: The YAML file.
        overrides: Changes to it, later ones win.
        needs: Sections that the caller reads and the recipe must therefore have.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; names file, line, key and remedy.
    """
    values, lines = _read(Path(path), ())
    return _checked(values, str(path), lines, overrides, needs)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a recipe file merged over those of the recipe that it extends, not yet checked.

    Raises:
        UserError: a file is missing, is not YAML, or extends itself.
    """
    return _read(Path(path), ())[0]


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
    return yaml.dump(ordered, Dumper=_SnapshotDumper, sort_keys=False, allow_unicode=True)


class _SnapshotDumper(yaml.SafeDumper):
    """Puts quotes around text that YAML 1.1, or `_RecipeYaml`, could take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SnapshotDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors: `# yaml-language-server: $schema=recipe.schema.json`.

    A recipe that extends another one, or whose paths `rounds` or `compare` fill in, need not be complete; `null` in it
    removes what it inherits.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    partial = {f"Partial{name}": _partial(item) for name, item in definitions.items()}
    whole = {key: item for key, item in schema.items() if key not in ("title", "description")}
    parts = _partial(whole)
    parts["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe, relative to this one's folder, whose keys hold where this one has none.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": schema["title"],
        "description": schema["description"],
        "$defs": {**definitions, **partial, "Recipe": whole, "PartialRecipe": parts},
        "if": {"anyOf": [{"required": [section]} for section in ("extends", "rounds", "compare")]},
        "then": {"$ref": "#/$defs/PartialRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
    }


def _partial(schema: Any) -> Any:
    """The same schema where nothing is required and everything may be null."""
    if isinstance(schema, list):
        return [_partial(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {}
    for key, item in schema.items():
        if key in ("required", "minProperties", "minItems", "discriminator"):
            continue
        if key == "$ref":
            changed[key] = item.replace("#/$defs/", "#/$defs/Partial")
        elif key == "additionalProperties" and isinstance(item, dict):
            changed[key] = {"anyOf": [_partial(item), {"type": "null"}]}
        elif key == "properties":
            changed[key] = {name: {"anyOf": [_partial(value), {"type": "null"}]} for name, value in item.items()}
        else:  # without its kind, a scorer may fit several
            changed["anyOf" if key == "oneOf" else key] = _partial(item)
    return changed


def _read(path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Key, str]]:
    """The values of a recipe file merged over those of the one it extends, and where each key stands."""
    values, lines = _parse_yaml(_text_of(path), str(path), f" of {path}" if extending else "")
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of sections (model, data, training ...), not {kind_of(values)}."
        )
    if "extends" not in values:
        return values, lines
    line, name = lines[("extends",)], values.pop("extends")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path}: extends ({line}): must be the path of one other recipe, not {kind_of(name)}.")
    base, chain = path.parent / name, (*extending, path.resolve())
    if base.resolve() in chain:
        raise UserError(f"{path}: extends ({line}): {name} extends this recipe in turn; remove one of the two.")
    if not base.exists():
        raise UserError(
            f"{path}: extends ({line}): there is no recipe {base}{_near_file(base)}. The path is relative to the "
            "folder of the recipe that extends it."
        )
    merged, merged_lines = _read(base, chain)
    _merge(merged, values, merged_lines, lines)
    return merged, merged_lines


def _merge(
    base: dict[str, Any], changes: dict[str, Any], base_lines: dict[Key, str], lines: dict[Key, str], at: Key = ()
) -> None:
    """Change `base` and its lines in place: mappings are merged, null removes, anything else replaces.

    A scorer or an objective of another kind replaces as well. `adapter: null` stays, for it means all weights.
    """
    for name, value in changes.items():
        key, old = (*at, name), base.get(name)
        of_a_kind = name in ("objective", "scorer") or at[-1:] == ("scorers",)
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and not (of_a_kind and value.get("name", old.get("name")) != old.get("name"))
        ):
            _merge(old, value, base_lines, lines, key)
            continue
        for inner in [inner for inner in base_lines if inner[: len(key)] == key]:
            del base_lines[inner]
        if value is None and key != ("adapter",):
            base.pop(name, None)
            continue
        base[name] = value
        base_lines.update({inner: line for inner, line in lines.items() if inner[: len(key)] == key})


def _text_of(path: Path) -> str:
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "not a regular file"
            raise UserError(f"{path}: cannot read this recipe (it is {what}). Name a YAML file.")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path}: is larger than {MOST_BYTES // 1024} KiB, so it is no recipe. Check the path.")
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: cannot read this recipe (it is UTF-16 text). Save it as UTF-8.")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe{_near_file(path)}. Check the path.") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: cannot read this recipe (it is not UTF-8 text, line {line}). Save it as UTF-8."
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot read this recipe ({reason}). Check the path.") from None


def _checked(
    values: dict[str, Any],
    where: str,
    lines: dict[Key, str],
    overrides: Iterable[str],
    needs: Iterable[str],
) -> Recipe:
    for override in overrides:
        key = _apply_override(values, override)
        lines = {other: line for other, line in lines.items() if other[: len(key)] != key}
        lines[key] = OVERRIDE
    missing = "".join(f" {name}: this key is required." for name in needs if name not in values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, lines)}{missing}") from None
    if missing:
        raise UserError(f"{where}:{missing} It is a section of the recipe that this command reads.")
    return recipe


def _parse_yaml(text: str, where: str, of_file: str = "") -> tuple[Any, dict[Key, str]]:
    """The values in a YAML document, and the line of every key in it."""
    try:
        loader = _RecipeYaml(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _measure(node, {}, ())
        values = _unshared(loader.construct_document(node))
        return values, {key: f"{line}{of_file}" for key, line in _lines(node)}
    except yaml.YAMLError as error:
        mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
        number = mark.line + 1 if mark else None if position is None else text.count("\n", 0, position) + 1
        line = "" if number is None else f", line {number}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(f"{where}{line}: this is not valid YAML ({' '.join(problem.split())}). Fix it there.") from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], inside: tuple[yaml.Node, ...]) -> tuple[int, int]:
    """Values and levels of a node with its aliases written out, which may be very many more than the file has."""
    if any(node is outer for outer in inside):
        raise _refused("this value contains itself, through an alias", node)
    if id(node) not in known:
        count, levels = 1, 0
        for child in _children(node):
            values, depth = _measure(child, known, (*inside, node))
            count, levels = count + values, max(levels, depth)
        known[id(node)] = count, levels + 1
    count, levels = known[id(node)]
    if count > MOST_VALUES or levels > MOST_LEVELS:
        raise _refused(f"more than {MOST_VALUES} values or {MOST_LEVELS} levels, with aliases written out", node)
    return count, levels


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _unshared(values: Any) -> Any:
    """The same values with a copy at each alias, so that a change of one is not a change of all."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _lines(node: yaml.Node, inside: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*inside, key.value), f"line {key.start_mark.line + 1}"
            yield from _lines(value, (*inside, key.value))
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*inside, str(index)), f"line {value.start_mark.line + 1}"
            yield from _lines(value, (*inside, str(index)))


def _apply_override(values: dict[str, Any], override: str) -> Key:
    """Set one value in the nested mapping, and return its key."""
    parts, text = _key_and_value(override)
    target: Any = values
    for depth, part in enumerate(parts):
        if isinstance(target, list):
            if not part.isdigit() or len(part) > 9 or int(part) >= len(target):
                inner = key_text(parts[:depth])
                raise UserError(
                    f"override {override!r}: {inner} is a list of {len(target)}, so that {part} is no index of it."
                )
            place: Any = int(part)
        elif isinstance(target, dict):
            place = part
        else:
            inner = key_text(parts[:depth])
            raise UserError(f"override {override!r}: {inner} is {kind_of(target)}, not a section, so it has no keys.")
        if depth == len(parts) - 1:
            target[place] = _override_value(text, override)
        else:
            if (target[place] if isinstance(target, list) else target.get(place)) is None:
                target[place] = {}
            target = target[place]
    return parts


def _key_and_value(override: str) -> tuple[tuple[str, ...], str]:
    """`a.b.0.c=value` or `a.b[0]."c.d"=value`, taken apart."""
    part = r'"[^"]+"|[^\s."\[\]=](?:[^."\[\]=]*[^\s."\[\]=])?'
    match = re.fullmatch(rf"\s*((?:{part})(?:\.(?:{part})|\[[0-9]+\])*)\s*=(.*)", override, flags=re.DOTALL)
    parts = re.findall(rf"{part}", match[1].replace("[", ".").replace("]", "")) if match else []
    if match is None or len(parts) > MOST_LEVELS:
        raise UserError(
            f"{override!r} is not an override. Write section.key=value, for example training.learning_rate=1e-4."
        )
    return tuple(item.strip('"') for item in parts), match[2]


def _override_value(text: str, override: str) -> Any:
    if not text.strip():
        return text
    try:
        return _parse_yaml(text, "")[0]
    except UserError as error:
        problem = str(error).partition("(")[2].rpartition(")")[0]
        raise UserError(
            f"override {override!r}: the value is not valid YAML ({problem}). Put quotes around text that holds "
            "brackets, colons or commas."
        ) from None


def _near_file(path: Path) -> str:
    try:
        siblings = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    except (OSError, ValueError):
        return ""
    return did_you_mean(str(path), siblings).removesuffix("?")
