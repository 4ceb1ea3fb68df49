"""What is wrong with a recipe, in words: pydantic's findings as sentences that name the key and the remedy."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rrhf_peft.recipe.objectives import OBJECTIVE_NAMES
from rrhf_peft.recipe.schema import MOVED_KEYS, Recipe

Key = tuple[Any, ...]

#: pydantic's error type -> what was wanted instead.
WANTED = {
    "string_type": "text",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "union_tag_not_found": "a section with keys of its own",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}
#: The place of a key that was given after the recipe on the command line.
OVERRIDE = "override"
QUOTE_IT = "; put quotes around it"
#: More choices than this are not listed when one of them is near what was written.
MANY_CHOICES = 12


def explain(error: ValidationError, places: Mapping[Key, str]) -> str:
    """All problems in one paragraph; `places` says where a key was written, for example "line 12"."""
    findings: dict[Key, list[Any]] = {}
    for item in error.errors():
        location = item["loc"]
        key = tuple(part for place, part in enumerate(location) if not _is_union_branch(part, place, location))
        findings.setdefault(key, []).append(item)
    sentences = [_sentence(key, items, places) for key, items in findings.items()]
    return " ".join(sentence if sentence.endswith("?") else f"{sentence}." for sentence in sentences)


def kind_of(value: Any) -> str:
    """A value's type in the words of someone who writes YAML."""
    names: dict[type, str] = {
        type(None): "nothing",
        str: "text",
        bool: "true/false",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), type(value).__name__)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the nearest known name, or nothing."""
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _sentence(key: Key, items: list[Any], places: Mapping[Key, str]) -> str:
    """The findings about one key as `section.key (line 12): what is wrong; the remedy`."""
    first = items[0]
    if first["type"] == "value_error":  # a contradiction of the schema's own, which names its keys
        return str(first["ctx"]["error"])
    if first["type"] == "union_tag_invalid":
        key = (*key, "name")
    dotted, place = ".".join(str(part) for part in key), _place_of(key, places)
    return f"{dotted} ({place}): {_problem(key, items, place)}" if place else f"{dotted}: {_problem(key, items, place)}"


def _place_of(key: Key, places: Mapping[Key, str]) -> str | None:
    """Where the key was written; failing that, where the nearest section around it or key inside it was."""
    key = tuple(str(part) for part in key)
    for end in range(len(key), 0, -1):
        if key[:end] in places:
            return places[key[:end]]
    return next((place for inner, place in places.items() if inner[: len(key)] == key), None)


def _problem(key: Key, items: list[Any], place: str | None) -> str:
    first = items[0]
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden":
        return f"unknown key; {_remedy_for_unknown(key, first['loc'])}"
    if kind == "invalid_key":
        return "a key must be text; put quotes around it"
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_not_found" and isinstance(given, dict):
        return "its key 'name' is required, which says the kind"
    if kind == "union_tag_invalid":
        return _not_one_of(first["ctx"]["tag"], first["ctx"]["expected_tags"])
    if [item["type"] for item in items] == ["literal_error"]:
        return _not_one_of(given, first["ctx"]["expected"])
    wanted = list(dict.fromkeys(_wanted(item) for item in items))
    if "a number" in wanted and "a whole number" in wanted:
        wanted.remove("a whole number")
    remedy = _remedy_for_type(given, wanted)
    if remedy == QUOTE_IT and place == OVERRIDE:  # the shell takes one pair of quotes away
        remedy = f"; write '{'.'.join(map(str, key))}=\"{given}\"'"
    return f"must be {' or '.join(wanted)}, not {_shown(given)}{remedy}"


def _wanted(item: Any) -> str:
    if item["type"] in WANTED:
        return WANTED[item["type"]]
    if item["type"] == "literal_error":
        return str(item["ctx"]["expected"])
    message = re.sub(r"^(Input|Value|List|String|Dictionary) should (be )?", "", item["msg"])
    return message[0].lower() + message[1:]


def _not_one_of(given: Any, expected: str) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    near = did_you_mean(str(given), choices)
    if near and len(choices) > MANY_CHOICES:
        return f"{given!r} is not one of the known values{near}"
    return f"{given!r} is not one of {expected}{near}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r}" + ("" if isinstance(value, (int, float)) else f" ({kind_of(value)})")


def _remedy_for_type(given: Any, wanted: list[str]) -> str:
    if "text" in wanted and isinstance(given, (int, float)):
        return QUOTE_IT
    if "true or false" in wanted and isinstance(given, str):
        return "; write true or false without quotes"
    if any("number" in want for want in wanted) and isinstance(given, str):
        with_number = re.fullmatch(r"\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*", given)
        return "; write the number without quotes" if with_number else ""
    return ""


def _is_union_branch(part: Any, place: int, location: Key) -> bool:
    """Pydantic puts the tried member of a union into the location; users never wrote it."""
    if not isinstance(part, str):
        return False
    return (
        (location[0] == "objective" and part in OBJECTIVE_NAMES and part == location[1])
        or (location[0] == "scoring" and place > 0 and location[place - 1] == "scorer" and part != "name")
        or part in {"int", "float", "str", "bool", "dict", "list"}
        or part.startswith(("literal[", "list[", "constrained", "dict["))
    )


def _remedy_for_unknown(key: Key, location: Key) -> str:
    name, section = str(key[-1]), key[:-1]
    dotted = ".".join(str(part) for part in key)
    if dotted in MOVED_KEYS:
        return MOVED_KEYS[dotted]
    known = _known_keys(section, location)
    if near := did_you_mean(name, known):
        return near.removeprefix("; ")
    for other in Recipe.model_fields:  # the right key in the wrong section
        if (other,) != section and name in _known_keys((other,), (other,)):
            return f"did you mean '{other}.{name}'?"
    if len(known) > 20 or not known:
        return "`rrhf-peft schema` prints the known keys"
    of_which = f" of objective {location[1]}" if section == ("objective",) else ""
    return f"known keys{of_which}: {', '.join(sorted(known))}"


def _known_keys(section: Key, location: Key) -> list[str]:
    """The keys of a section; where it comes in several versions, of the one that `name` chose."""
    if not section:
        return list(Recipe.model_fields)
    annotation = Recipe.model_fields[section[0]].annotation if section[0] in Recipe.model_fields else None
    models = _models_in(annotation)
    for part in section[1:]:  # into nested sections; a number is a place in a list of them
        if isinstance(part, str):
            models = [
                inner
                for model in models
                if part in model.model_fields
                for inner in _models_in(model.model_fields[part].annotation)
            ]
    if len(models) > 1 and len(location) > 1:
        chosen = {part for part in location if isinstance(part, str)}
        models = [model for model in models if chosen & set(typing.get_args(model.model_fields["name"].annotation))]
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
