"""What is wrong with a recipe, in words: pydantic's findings as sentences that name the key and the remedy."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

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
    "string_pattern_mismatch": "text that is not empty",
}
#: The line of a key that was given after the recipe on the command line.
OVERRIDE = "override"
QUOTE_IT = "; put quotes around it"
#: More choices than this are not listed when one of them is near what was written.
MANY_CHOICES = 12
#: Further findings are only counted.
MOST_FINDINGS = 12


def explain(error: ValidationError, lines: Mapping[Key, str]) -> str:
    """The problems in one paragraph; `lines` says where a key was written, for example "line 12"."""
    findings: dict[Key, list[Any]] = {}
    for item in error.errors():
        key, owner = _follow(item["loc"])
        findings.setdefault(key, []).append({**item, "owner": owner})
    for key in list(findings):  # of a union's members, the one that was meant is the one that was read further
        if all(item["type"].endswith("_type") for item in findings[key]) and any(
            other != key and other[: len(key)] == key for other in findings
        ):
            del findings[key]
    sentences = [_sentence(key, items, lines) for key, items in list(findings.items())[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        sentences.append(f"And {len(findings) - MOST_FINDINGS} more.")
    told = " ".join(sentence if sentence.endswith(("?", ".")) else f"{sentence}." for sentence in sentences)
    return " ".join(told.splitlines())


def key_text(key: Iterable[Any]) -> str:
    """A key as an override takes it: parts with points between them, in quotes where a part has a point itself."""
    parts = map(str, key)
    return ".".join(
        part if re.fullmatch(r"[^\s.\"\[\]=]([^.\"\[\]=]*[^\s.\"\[\]=])?", part) else f'"{part}"' for part in parts
    )


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


def _follow(location: Key) -> tuple[Key, type[BaseModel] | None]:
    """The key that a user wrote, of a location in which pydantic names the tried members of unions as well.

    Returns it with the section that the key's last part is looked up in, where there is one.
    """
    key: list[Any] = []
    owner: type[BaseModel] | None = None
    annotation: Any = Recipe
    rest = list(location)
    while rest:
        annotation, tag = _unwrapped(annotation)
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        origin = typing.get_origin(annotation)
        if origin in (typing.Union, types.UnionType):
            annotation = members[0] if len(members) == 1 else _member(members, str(rest.pop(0)), tag)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            key.append(rest.pop(0))
            field = annotation.model_fields.get(str(key[-1]))
            annotation = None if field is None else Annotated[field.annotation, field]
        elif origin in (list, dict):
            owner = None
            key.append(rest.pop(0))
            annotation = members[-1]
        else:
            rest = [part for part in rest if part != "[key]"]
            break
    return (*key, *rest), owner


def _unwrapped(annotation: Any) -> tuple[Any, str | None]:
    """An annotation without `Annotated`, and the key that tells the members of its union apart, if one does."""
    tag = None
    while typing.get_origin(annotation) is Annotated:
        for item in annotation.__metadata__:
            tag = getattr(item, "discriminator", None) or tag
        annotation = annotation.__origin__
    return annotation, tag


def _member(members: list[Any], label: str, tag: str | None) -> Any:
    """The member of a union that pydantic calls `label` in a location."""
    for member in members:
        inner = _unwrapped(member)[0]
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
        if tag is not None and model is not None and label in typing.get_args(model.model_fields[tag].annotation):
            return inner
        if tag is None and (
            getattr(inner, "__name__", "") == label  # which is function-after[..., Name] where a class has validators
            or (model is not None and label.endswith(f", {model.__name__}]"))
            or label.startswith(f"{typing.get_origin(inner)}[")
        ):
            return inner
        if (
            tag is None
            and typing.get_origin(inner) in (list, dict)
            and label.startswith(typing.get_origin(inner).__name__)
        ):
            return inner
    return None


def _sentence(key: Key, items: list[Any], lines: Mapping[Key, str]) -> str:
    """The findings about one key as `section.key (line 12): what is wrong; the remedy`."""
    first = items[0]
    refused = next((item for item in items if item["type"] == "value_error"), None)
    if refused is not None:  # by `Section.contradictions`, which names a key inside the section
        return ".".join([*([key_text(key)] if key else []), str(refused["ctx"]["error"])])
    if first["type"] == "union_tag_invalid":
        key = (*key, "name")
    dotted, line = key_text(key), _line_of(key, lines)
    return f"{dotted} ({line}): {_problem(key, items, line)}" if line else f"{dotted}: {_problem(key, items, line)}"


def _line_of(key: Key, lines: Mapping[Key, str]) -> str | None:
    """Where the key was written; failing that, where the nearest section around it or key inside it was."""
    key = tuple(str(part) for part in key)
    for end in range(len(key), 0, -1):
        if key[:end] in lines:
            return lines[key[:end]]
    return next((line for inner, line in lines.items() if inner[: len(key)] == key), None)


def _problem(key: Key, items: list[Any], line: str | None) -> str:
    first = items[0]
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden":
        return f"unknown key; {_remedy_for_unknown(key, first['owner'])}"
    if kind == "invalid_key":
        return "a key must be text; put quotes around it"
    if kind == "refused":
        return str(first["msg"])
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
    if remedy == QUOTE_IT and line == OVERRIDE:  # the shell takes one pair of quotes away
        remedy = f"; write '{key_text(key)}=\"{given}\"'"
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
    text = repr(value)
    text = text if len(text) <= 120 else f"{text[:100]}..."
    return text + ("" if isinstance(value, (int, float)) else f" ({kind_of(value)})")


def _remedy_for_type(given: Any, wanted: list[str]) -> str:
    if "text" in wanted and isinstance(given, (int, float)):
        return QUOTE_IT
    if "true or false" in wanted and isinstance(given, str):
        return "; write true or false without quotes"
    if any("number" in want for want in wanted) and isinstance(given, str):
        if re.fullmatch(r"[-+]?0[0-9_]+", given):
            return "; write the number without zeros in front, which some readers take for base 8"
        with_number = re.fullmatch(r"\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*", given)
        return "; write the number without quotes" if with_number else ""
    return ""


def _remedy_for_unknown(key: Key, owner: type[BaseModel] | None) -> str:
    name, section = str(key[-1]), key[:-1]
    if key_text(key) in MOVED_KEYS:
        return MOVED_KEYS[key_text(key)]
    known = [] if owner is None else list(owner.model_fields)
    if near := did_you_mean(name, known):
        return near.removeprefix("; ")
    for other, field in Recipe.model_fields.items():  # the right key in the wrong section
        if (other,) != section and any(name in model.model_fields for model in _models_in(field.annotation)):
            return f"did you mean '{other}.{name}'?"
    if owner is None or len(known) > 20:
        return "`rrhf-peft schema` prints the known keys"
    kind = typing.get_args(owner.model_fields["name"].annotation)[:1] if section and "name" in known else ()
    of_which = f" of {section[-1]} {kind[0]}" if kind else ""
    return f"known keys{of_which}: {', '.join(sorted(known))}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
