"""Where data lies: a file, a folder of files, a folder saved by `datasets`, or a hub id; and its splits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rrhf_peft.data.row_readers import READERS, file_type, is_data_file, rows_of_file
from rrhf_peft.data.rows import Row
from rrhf_peft.records import UserError

#: Words in file and folder names that tell the split, as `datasets` has them.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def rows_of(where: str, *, split: str, revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of one place.

    `split` chooses among the splits of hub ids and folders; a single file, or a folder saved as one
    data set, is read whole. `revision` is for hub ids.

    Raises:
        UserError: nothing is there, it cannot be read, it is empty, or it has no such split.
    """
    path = Path(where).expanduser()
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
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", where) and file_type(path) not in READERS:
        return rows_of_hub(where, split=split, revision=revision)
    raise UserError(f"{where}: there is no such file or folder{_did_you_mean(path)}. Check the path.")


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
    import datasets  # here, because local files should not wait for it

    path, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(path, config or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{name}: there is no such file or folder, and as a hub data set it cannot be loaded ({reason}). Check "
            "the spelling, the split and the network; a private or gated data set needs HF_TOKEN."
        ) from None
    return _rows_of_dataset(data, name)


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
