"""What every section of a recipe is, and the kinds of text that several of them hold."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A strict mapping: no unknown keys, no silent conversions, no NaN, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _names_something_new(path: str) -> str:
    """`path`, unless it is a folder that everybody has: what is written there would lie among other things."""
    parts = os.path.normpath(path.strip()).split(os.sep)
    if all(part in ("", ".", "..", "~") for part in parts):
        raise PydanticCustomError("refused", "is no path to write to; name a new one inside a folder, as in runs/first")
    return path


#: Text that says something: a path or name that is empty or blank comes from a shell variable that is not set.
Filled = Annotated[str, StringConstraints(pattern=r"\S")]
#: A path that a command writes to.
OutputPath = Annotated[Filled, AfterValidator(_names_something_new)]
#: One place that is read from, or several.
Paths = Filled | Annotated[list[Filled], Field(min_length=1)]
