"""Files that are either whole or not there: write to a temporary sibling, rename at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rrhf_peft.records import UserError


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds the old content or the new, never a part.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}). Choose a writable place.") from None


@contextlib.contextmanager
def staged_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `target` when the block ends well, and is removed when not.

    What a killed process left behind is cleared, or put back, by the next one. With `overwrite` an
    existing target is replaced at the very end.

    Raises:
        UserError: the target exists and `overwrite` is false, or its parent cannot be written to.
    """
    target = Path(target)
    staging, retired = (target.with_name(f".{target.name}.{state}") for state in ("partial", "retired"))
    if retired.exists() and not target.exists():  # killed between the two renames at the end
        retired.rename(target)
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: already exists. Choose another folder, remove it, or pass --overwrite.")
    try:
        for leftover in (staging, retired):
            _remove(leftover)
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}). Choose a writable place.") from None
    try:
        yield staging
        if target.exists():
            target.rename(retired)
        staging.rename(target)
        _remove(retired)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
