"""One row of a source file, where it stands, and typed access to its fields.

Every complaint about a row is made here, so that each names file, line and field in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf_peft.records import LARGEST_SCORE, Message, RankedGroup, UserError

#: Key of `RankedGroup.columns` under which the responses without a rating are kept.
UNRATED = "unrated"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as the file has it.

    Attributes:
        values: Column name -> value.
        file: The file, or the hub id, that the row comes from.
        line: Line of the file where the record begins, from 1; None where the file has no lines.
        index: Position in the data set, from 0, as in ``dataset[index]``; None where `line` is known.
        is_csv: Every value is text, and a list is written as JSON inside its cell.
        prefix: Where inside the record an object stands, such as ``completions[2].``; empty for the record.
    """

    values: dict[str, Any]
    file: str
    line: int | None = None
    index: int | None = None
    is_csv: bool = False
    prefix: str = ""

    @property
    def where(self) -> str:
        """Where the row stands, as error messages write it."""
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file}: row {self.index} (from 0)"

    def problem(self, text: str) -> UserError:
        """A `UserError` about this row; `text` says what is wrong and what to do."""
        return UserError(f"{self.where}: {text}")

    def has(self, name: str) -> bool:
        """Whether the column is there and filled. Arrow fills columns that a record lacks with None."""
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """A field that must be a string."""
        return self.as_text(self.values.get(name), name)

    def texts(self, name: str, *, may_be_empty: bool = False) -> list[str]:
        """A field that must be a list of strings, and not an empty one unless it may."""
        if may_be_empty and self.values.get(name) == []:
            return []
        return [self.as_text(value, f"{name}[{index}]") for index, value in enumerate(self.items(name))]

    def scores(self, name: str, count: int, *, may_lack: bool = False) -> list[Any]:
        """A field that must be a list of `count` finite numbers, one for each response; None only where it may."""
        values = self.items(name)
        if len(values) != count:
            raise self.problem(
                f"{self.prefix}{name} has {len(values)} entries for {count} responses. Give every response exactly one "
                "score."
            )
        return [
            None if may_lack and value is None else self._score(value, f"{name}[{index}]")
            for index, value in enumerate(values)
        ]

    def number(self, name: str) -> float:
        """A field that must be a finite number."""
        value = self.values.get(name)
        if self.is_csv and isinstance(value, str):
            value = _parsed(value, value)
        return self._score(value, name)

    def rating(self, name: str) -> float | None:
        """A number, or a number written as text; None where there is no rating: null, "N/A" or any other text."""
        value = self.values.get(name)
        if isinstance(value, str):
            value = _parsed(value)
            value = value if value is not None and math.isfinite(value) else None  # "nan" is no rating either
        return None if value is None else self._score(value, name)

    def position(self, name: str, count: int) -> int:
        """A field that must be a position among `count` things, from 0."""
        number = self.number(name)
        if number not in range(count):
            raise self.problem(
                f"{self.prefix}{name} is {number:g}, not a whole number from 0 to {count - 1}. Fix or remove that "
                f"{self._unit}."
            )
        return int(number)

    def object(self, name: str) -> Row:
        """A field that must be an object, as a row of its own."""
        return self._nested(self.values.get(name), name)

    def objects(self, name: str) -> list[Row]:
        """A field that must be a list of objects, each as a row of its own; the list may be empty."""
        if self.values.get(name) == []:
            return []
        return [self._nested(value, f"{name}[{index}]") for index, value in enumerate(self.items(name))]

    def prompt(self, name: str) -> str | list[Message]:
        """A field that must be a string or a list of chat messages."""
        return self.messages(name) if isinstance(self.values.get(name), list) else self.text(name)

    def messages(self, name: str) -> list[Message]:
        """A field that must be a non-empty list of ``{"role": ..., "content": ...}``.

        All other keys that are filled stay (``tool_calls``, ``name``, ``reasoning_content`` ...): a template reads
        them, or refuses them. A message of tool calls alone may have no content.
        """
        messages = []
        for index, value in enumerate(self.items(name)):
            field = f"{name}[{index}]"
            calls = isinstance(value, dict) and value.get("tool_calls")
            if not isinstance(value, dict) or "role" not in value or not ("content" in value or calls):
                found = ", ".join(map(repr, value)) if isinstance(value, dict) else _kind(value)
                raise self.problem(
                    f'{self.prefix}{field} is not a chat message ({found}). Write {{"role": "user", "content": "..."}}.'
                )
            content = value.get("content")
            message = {
                "role": self.as_text(value["role"], f"{field}.role"),
                "content": "" if calls and content is None else self.as_text(content, f"{field}.content"),
            }
            # Arrow fills keys that a message lacks with None.
            rest = {key: own for key, own in value.items() if key not in message and own not in (None, [], {})}
            messages.append({**message, **rest})
        return messages

    def items(self, name: str) -> list[Any]:
        """A field that must be a non-empty list; what is in it is not looked at."""
        value = self.values.get(name)
        if self.is_csv and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise self.problem(
                    f"{self.prefix}{name} is not a JSON list. In CSV write lists as json.dumps does, for example "
                    '["a", "b"].'
                ) from None
        if not isinstance(value, list):
            raise self.problem(f"{self.prefix}{name} is {_kind(value)}, not a list. Fix or remove that {self._unit}.")
        if not value:
            raise self.problem(f"{self.prefix}{name} is an empty list. Fix or remove that {self._unit}.")
        return value

    def as_text(self, value: Any, field: str) -> str:
        """`value`, found at `field`, which must be a string that can be tokenised."""
        if not isinstance(value, str):
            raise self.problem(f"{self.prefix}{field} is {_kind(value)}, not text. Fix or remove that {self._unit}.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            broken = value[error.start].encode("unicode_escape").decode()
            raise self.problem(
                f"{self.prefix}{field} holds half a character ({broken} at position {error.start}), which no tokenizer "
                f"can read. Fix or remove that {self._unit}."
            ) from None
        return value

    @property
    def origin(self) -> dict[str, Any]:
        """Where the row was read: `file`, and `line` or `row`."""
        return {"file": self.file, **({"line": self.line} if self.line is not None else {"row": self.index})}

    def rest(self, used: Iterable[str]) -> dict[str, Any]:
        """The columns not in `used` that are filled; half a character becomes U+FFFD, so that it can be written."""
        used = set(used)
        rest = {name: value for name, value in self.values.items() if name not in used and value is not None}
        try:
            return {_unicode(name): _unicode(value) for name, value in rest.items()}
        except RecursionError:
            raise self.problem(
                f"its columns are nested too deeply to be kept. Remove them from that {self._unit}."
            ) from None

    def group(
        self,
        prompt: str | list[Message],
        responses: Sequence[str],
        ratings: Sequence[float | None],
        sources: Sequence[str],
        columns: dict[str, Any],
    ) -> RankedGroup:
        """The group of those responses that have a rating, which is their score.

        The others are not made up a number for: they stand in ``columns["unrated"]``, each with `response` and
        `source`. A group may so have a single response, or none.
        """
        entries = list(zip(responses, ratings, sources, strict=True))
        rated = [(response, rating, source) for response, rating, source in entries if rating is not None]
        unrated = [{"response": response, "source": source} for response, rating, source in entries if rating is None]
        if unrated:
            columns = {**columns, UNRATED: unrated}
        return RankedGroup(
            prompt,
            [response for response, _, _ in rated],
            [rating for _, rating, _ in rated],
            [source for _, _, source in rated],
            columns,
            self.origin,
        )

    def _score(self, value: Any, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.problem(
                f"{self.prefix}{field} is {_kind(value)}, not a number. Fix or remove that {self._unit}."
            )
        try:
            score = float(value)
        except OverflowError:  # JSON integers know no limit
            score = math.inf
        if not math.isfinite(score):
            raise self.problem(
                f"{self.prefix}{field} is {score}. Scores must be finite, higher is better; fix or remove that "
                f"{self._unit}."
            )
        if abs(score) > LARGEST_SCORE:
            raise self.problem(
                f"{self.prefix}{field} is {score:g}, beyond {LARGEST_SCORE:g}: its mean and spread cannot be computed. "
                f"Fix or remove that {self._unit}."
            )
        return score

    def _nested(self, value: Any, field: str) -> Row:
        if not isinstance(value, dict):
            raise self.problem(
                f"{self.prefix}{field} is {_kind(value)}, not an object. Fix or remove that {self._unit}."
            )
        return Row(value, self.file, self.line, self.index, prefix=f"{self.prefix}{field}.")

    @property
    def _unit(self) -> str:
        return "line" if self.line is not None else "row"


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null or missing"
    if isinstance(value, bool):
        return "true/false"
    for kind, name in ((str, "text"), ((int, float), "a number"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"


def _parsed(text: str, otherwise: Any = None) -> Any:
    """The number that a text writes, or `otherwise`."""
    try:
        return float(text)
    except ValueError:
        return otherwise


def _unicode(value: Any) -> Any:
    """The same value with U+FFFD for lone surrogates, which JSON can spell and UTF-8 cannot."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_unicode(name): _unicode(inner) for name, inner in value.items()}
    return [_unicode(inner) for inner in value] if isinstance(value, list) else value
