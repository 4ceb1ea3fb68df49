"""Places into rows: a file, a folder of files, a folder saved by `datasets`, or a hub id; and typed access to a row.

JSON Lines, JSON and CSV are read here and not by `datasets`, because only then a malformed record can be
reported with its line, and a CSV cell that says ``NA`` or ``007`` stays the text it is. Parquet goes
through `datasets`, which also undoes its own feature encodings. Every complaint about a row is made by `Row`, so that
each names file, line and field in the same way.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_peft.records import LARGEST_SCORE, Message, RankedGroup, UserError

#: Bytes of a line of JSON Lines; a record that is larger is none.
_LONGEST_LINE = 2**28
#: Text packs to a fifth or a tenth. More than so many times, beyond so many bytes, is a bomb and no text.
_MOST_UNPACKED, _UNPACKED_FREELY = 200, 2**26

#: Words in file and folder names that tell the split, as `datasets` has them.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

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


# ---- Places ----


def rows_of(where: str, *, split: str, revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of one place.

    `split` chooses among the splits of hub ids and folders; a single file, or a folder saved as one
    data set, is read whole. `revision` is for hub ids.

    Raises:
        UserError: nothing is there, it cannot be read, it is empty, or it has no such split.
    """
    path = data_path(where)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}). Check the path.") from None
    if is_file:
        return rows_of_file(path)
    if is_folder and _is_saved(path):
        return _rows_of_saved(path, split)
    if is_folder:
        return (row for file in files_of_split(path, split) for row in rows_of_file(file))
    if path.exists():
        raise UserError(f"{where}: is neither a file nor a folder (a pipe or a device). Name a file that holds data.")
    if _is_hub_id(where):
        return rows_of_hub(where, split=split, revision=revision)
    raise UserError(f"{where}: there is no such file or folder{_did_you_mean(path)}. Check the path.")


def size_and_origin(where: str, *, split: str, revision: str | None = None) -> tuple[int, list[Path] | str]:
    """About how many bytes of text a place holds, and its files, or the fingerprint of a hub data set."""
    path = data_path(where)
    if not path.exists() and _is_hub_id(where):
        data = _hub_dataset(where, split, revision)
        return data.data.nbytes, str(data._fingerprint)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size * (8 if file.suffix in (".gz", ".parquet") else 1) for file in files), files


def _is_hub_id(where: str) -> bool:
    shape = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", where)
    return shape is not None and file_type(Path(where)) not in (*READERS, ".txt")


def data_path(where: str) -> Path:
    """The path that a user wrote.

    Raises:
        UserError: it is empty, as an unset variable of the shell leaves it, and would mean the working folder.
    """
    if not where.strip():
        raise UserError("a path of the data is empty. Name a file, a folder or a hub id; is a variable unset?")
    return Path(where).expanduser()


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files under `folder` that belong to `split`, sorted.

    The words train, validation, dev, test, eval ... in the names of files and folders tell the split, as
    on the hub. A file without such a word belongs to train.

    Raises:
        UserError: no data files, or none of this split.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if is_data_file(file) and not any(part.startswith(".") for part in inside.parts):
            files.setdefault(split_of(inside), []).append(file)
    if not files:
        raise UserError(f"{folder}: no data files here. Known endings: {', '.join(READERS)}.")
    if split not in files:
        raise _no_such_split(str(folder), split, files)
    return files[split]


def split_of(file: Path) -> str:
    """The split that a file's name, or else the nearest folder's name, tells; train where none does."""
    for part in reversed(file.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def rows_of_hub(name: str, *, split: str, revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of a hub data set, ``owner/name`` or ``owner/name:config``, through its local cache.

    Raises:
        UserError: the hub or the data set cannot be reached, or it has no such split.
    """
    return _rows_of_dataset(_hub_dataset(name, split, revision), name)


def _hub_dataset(name: str, split: str, revision: str | None) -> Any:
    import datasets  # here, because local files should not wait for it

    path, _, config = name.partition(":")
    try:
        with _offline_unless_the_hub_answers(path, revision):
            data = datasets.load_dataset(path, config or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{name}: there is no such file or folder, and as a hub data set it cannot be loaded ({reason}). Check "
            "the spelling, the split and the network; a private or gated data set needs HF_TOKEN."
        ) from None
    return data


@contextlib.contextmanager
def _offline_unless_the_hub_answers(name: str, revision: str | None) -> Iterator[None]:
    """The hub is asked once: `datasets` would ask six times, with pauses, before it looks into its cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    before = constants.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        pass  # an answer, of which `datasets` makes its own error
    except (OSError, HTTPError, OfflineModeIsEnabled):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder: several splits, or a single data set."""
    names = {file.name for file in folder.iterdir()}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def _rows_of_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets  # here, because local files should not wait for it

    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: this saved data set cannot be loaded ({error}). Save it again.") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise _no_such_split(str(folder), split, data)
        data = data[split]
    return _rows_of_dataset(data, str(folder))


def _rows_of_dataset(data: Any, name: str) -> Iterator[Row]:
    if len(data) == 0:
        raise UserError(f"{name}: this data set holds no rows. Remove it from the data, or write it again.")
    return (Row(dict(values), name, index=index) for index, values in enumerate(data))


def _no_such_split(where: str, split: str, known: Iterable[str]) -> UserError:
    return UserError(
        f"{where}: has no split {split!r}, only {', '.join(sorted(known))}. Ask for one of these, or name the files."
    )


def _did_you_mean(path: Path) -> str:
    """The nearest name beside the one that is missing."""
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    return f" (did you mean {path.parent / nearest[0]}?)" if nearest else ""


# ---- One file ----


def rows_of_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file; the ending of its name says how it is read.

    Raises:
        UserError: unknown ending, unreadable or empty file, or a malformed record.
    """
    reader = READERS.get(file_type(path))
    if reader is None:
        raise UserError(
            f"{path}: cannot tell how to read this file. Known endings: {', '.join(READERS)}; rename or convert it."
        )
    found = False
    try:
        for row in reader(path):
            found = True
            yield row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}). Check the file and its permissions.") from None
    if not found:
        raise UserError(f"{path}: this file holds no rows. Remove it from the data, or write it again.")


def file_type(path: Path) -> str:
    """The ending that decides the reader: the last suffix, or the last two where the last is ``.gz``."""
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    return "".join(suffixes).lower()


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, text in _lines(path):
        if text.strip():
            yield Row(_record(_parse(text, path, number), f"{path}:{number}"), str(path), line=number)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of records, one record per line, or one record over many lines: all are named .json."""
    first = next((line.strip() for _, line in _lines(path) if line.strip()), "")
    if not first.startswith("[") and not (first.startswith("{") and not first.endswith("}")):
        yield from _read_jsonl(path)
        return
    whole = _parse("".join(line for _, line in _lines(path)), path)
    for index, value in enumerate(whole if isinstance(whole, list) else [whole]):
        yield Row(_record(value, f"{path}: row {index} (from 0)"), str(path), index=index)


def _read_csv(path: Path) -> Iterator[Row]:
    with _wide_csv_fields():
        reader = csv.reader((text for _, text in _lines(path)), strict=True)
        header: list[str] = []
        line = 1
        try:
            for cells in reader:
                if not header:
                    header = _checked_header(cells, path)
                elif cells:
                    if len(cells) != len(header):
                        raise UserError(
                            f"{path}:{line}: {len(cells)} cells under {len(header)} column names. "
                            "Quote cells that hold commas or line breaks."
                        )
                    yield Row(dict(zip(header, cells, strict=True)), str(path), line=line, is_csv=True)
                line = reader.line_num + 1  # where the next record begins
        except csv.Error as error:
            raise UserError(f"{path}:{line}: this is not valid CSV ({error}). Fix that record.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import datasets  # here, because JSON and CSV should not wait for it
    from pyarrow import ArrowException

    with _silent_datasets():
        try:
            data = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            for index, values in enumerate(data):
                yield Row(dict(values), str(path), index=index)
        except (ArrowException, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read as Parquet ({reason}). Write or download it again.") from None


#: Ending of the file name -> reader.
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number from 1, and the line with its end. Split at line feeds only: JSON strings may hold U+2028."""
    packed, total = path.stat().st_size, 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
            total += len(line)
            if len(line) > _LONGEST_LINE:
                raise UserError(
                    f"{path}:{number}: this line is longer than {_LONGEST_LINE // 2**20} MiB, so it is no record. "
                    "Write one record on each line."
                )
            if total > _UNPACKED_FREELY and total > _MOST_UNPACKED * packed:
                raise UserError(
                    f"{path}: unpacks to more than {_MOST_UNPACKED} times its size, which no text does. Unpack it, "
                    "look at it, and name the unpacked file if it is data."
                )
            try:
                # Windows tools begin a UTF-8 file with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: byte {line[error.start]:#04x} at position {error.start} of the line is not "
                    "UTF-8. Save the file as UTF-8, or remove that line."
                ) from None


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """JSON text as a value; `line` is the text's line in the file, None where the text is the whole file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise UserError(
            f"{path}:{at}: this is not valid JSON ({error.msg}, column {error.colno}). Fix or remove that line; "
            "JSON Lines has one whole record on each line."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; thousands of nested brackets
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}:{line or 1}: this JSON cannot be read ({reason}). Fix or remove it.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} stands there twice, and only one of its values could count")
    return values


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f'{where}: a record is an object such as {{"prompt": ..., "responses": [...], "scores": [...]}}, '
            f"not {json.dumps(value)[:40]}. Fix or remove it."
        )
    return value


def _checked_header(cells: list[str], path: Path) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(set(header)) != len(header) or not all(header):
        raise UserError(
            f"{path}:1: the first line must hold the column names, each once; it holds {', '.join(map(repr, header))}."
        )
    return header


@contextlib.contextmanager
def _wide_csv_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB per cell, which a list of k responses passes."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


@contextlib.contextmanager
def _silent_datasets() -> Iterator[None]:
    """Keep `datasets` from logging an error that is about to be raised in our own words."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def is_data_file(path: Path) -> bool:
    """Whether a folder's file is data: a known ending, and not one of the files that describe a data set."""
    described = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
    return file_type(path) in READERS and path.name not in described and path.is_file()
