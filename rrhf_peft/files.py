"""Files that are whole or not there, made by one run at a time, and never in place of anybody else's.

Beside an output NAME, all of them hidden, so that no loader of data or models reads them:

    .NAME.rrhf-peft.json       the mark of a file: which verb made it, from what, and the digest of its content
    NAME/.rrhf-peft.json       the mark of a folder: which verb made it, and the names that it writes there
    .NAME.rrhf-peft.lock       held by the run that works on NAME
    .NAME.rrhf-peft.partial    what is being written
    .NAME.rrhf-peft.retired    the folder that was at NAME before, until the new one is whole
    .NAME.rrhf-peft.trash      what is being removed

A verb asks `check_output` before it touches anything, holds `lock` while it works, and writes with `write_files`
(files with a mark), `staged_folder` (folders that appear at the end), `begun_folder` (folders that a long run fills
where they are) or `replace_text` (files inside a folder of its own). Whatever the moment of a kill, the next run finds
the old output or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are not kept apart there
    fcntl = None  # type: ignore[assignment]

from rrhf_peft.records import UserError

AnyPath = str | os.PathLike[str]
#: The content of a file: at once, or piece by piece.
Content = str | bytes | Iterable[str]

MARK = ".rrhf-peft.json"
#: What `rrhf-peft report` writes into the folder that it reports on, if no other place is named.
REPORT = "report.html"
_SIBLINGS = ".*.rrhf-peft.*"
#: Writing failed for a reason outside of the program -> how a user says it.
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file system does not hold files of this size",
    errno.EIO: "the disk reports an error",
}
_DENIED = (errno.EACCES, errno.EPERM)
_GIVE_ROOM = "Make room, and run the same command again."
_CHOOSE = "Choose a writable place."
#: What locking answers where it does not exist.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Mark:
    """What the program notes about an output of its own.

    Attributes:
        verb: which one made it.
        version: of rrhf-peft.
        fingerprint: of everything that the output depends on, where the verb knows it.
        digests: of a file's mark: file name -> SHA-256 of the contents that the program wrote, the newest first.
        writes: of a folder's mark: patterns of the paths in it that the program writes.
        may_replace: of a folder of intermediate results: the output may be replaced when they are whole.
        state: of a folder's mark: `begun` until there is something worth keeping, then `working`, at last `whole`.
    """

    verb: str = ""
    version: str = ""
    fingerprint: str | None = None
    digests: dict[str, list[str]] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    may_replace: bool = False
    state: Literal["begun", "working", "whole"] = "whole"


# ---------------------------------------------------------------------------------------------- whole or not there


def replace_text(path: AnyPath, content: Content) -> None:
    """Write a file, as UTF-8, so that `path` holds the old content or the new, never a part; also after a power cut.

    It replaces what is there: for files inside a folder of the program's. Outputs that a user names are written by
    `write_files`.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    with writing(path, partial=_sibling(path, "partial")):
        partial, _ = _write_partial(path, content)
        partial.replace(path)
        _sync_folder(path.parent)


def _write_partial(path: Path, content: Content) -> tuple[Path, str]:
    """Write the content beside where it will be; that file, and the content's digest."""
    partial, digest = _sibling(path, "partial"), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        # A lone surrogate, which UTF-8 does not have, becomes what JSON writes for it.
        for piece in [content] if isinstance(content, (str, bytes)) else content:
            data = piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace")
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return partial, digest.hexdigest()


@contextlib.contextmanager
def writing(path: AnyPath, *, kept: str = "", partial: Path | None = None) -> Iterator[None]:
    """Say in one paragraph that `path` could not be written, and why: a full or read-only disk, no permission.

    Args:
        path: what is written in the block.
        kept: a sentence that says what was kept.
        partial: removed when the block fails, to give its room back.

    Raises:
        UserError: instead of the block's `OSError`.
    """
    try:
        yield
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise UserError(_cannot_write(Path(path), error, kept)) from None


def disk_trouble(error: BaseException, path: AnyPath) -> str | None:
    """One paragraph where an error says that the disk below `path` took no more, whoever raised it; else None.

    Libraries in C++ and Rust wrap the system's error in their own words, or lose it: then a disk without room counts.
    """
    path, text = Path(path), str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        return _cannot_write(path, error)
    if isinstance(error, OSError) and error.errno in _DENIED and str(error.filename or "").startswith(str(path)):
        return _cannot_write(path, error)
    for number, words in (
        (errno.ENOSPC, "No space left"),
        (errno.EDQUOT, "quota exceeded"),
        (errno.EROFS, "Read-only"),
    ):
        if words in text:
            return _cannot_write(path, OSError(number, words))
    if type(error).__name__ in ("RuntimeError", "SafetensorError") and ("writ" in text or "unexpected pos" in text):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(_nearest(path)).free < 2**20:
                return _cannot_write(path, OSError(errno.ENOSPC, ""))
    return None


def _cannot_write(path: Path, error: OSError, kept: str = "") -> str:
    reason = _DISK.get(error.errno or 0) or error.strerror or str(error)
    remedy = _GIVE_ROOM if error.errno in (errno.ENOSPC, errno.EDQUOT) else _CHOOSE
    return " ".join(part for part in (f"{path}: cannot be written ({reason}).", kept, remedy) if part)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the file system knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ marks


def write_files(
    output: AnyPath,
    contents: Mapping[Path, Content | None],
    *,
    verb: str,
    fingerprint: str | None = None,
    beside: Callable[[], Mapping[Path, Content | None]] | None = None,
) -> None:
    """Write an output of one file or several, with the mark that says so; all are ours or absent, the output is last.

    Args:
        output: the file that says, by being there, that the work is done; one of `contents`.
        contents: file, in the folder of `output` -> its content, or None where there is to be none.
        verb: which one writes.
        fingerprint: of everything that the content depends on.
        beside: called after these contents were written: those that are known only then.

    Raises:
        UserError: one of them cannot be written, or is not of this program.
    """
    output = Path(output)
    mark = read_mark(output)
    partials: dict[Path, Path | None] = {}
    digests = dict(mark.digests) if mark is not None else {}

    def write(contents: Mapping[Path, Content | None]) -> None:
        for path, content in contents.items():
            assert path.parent == output.parent, path
            if reason := _why_not_ours_file(path, mark):
                raise UserError(f"{path}: {reason}, so it is not replaced. Move it away, or choose another output.")
            partials[path] = None
            if content is not None:
                with writing(path):
                    partials[path], digest = _write_partial(path, content)
                # The mark tells of what is there and of what will be, and is written before either is touched: a
                # kill between two renames leaves nothing that looks like a user's.
                digests[path.name] = [digest, *([digest_of(path)] if path.exists() else [])]

    try:
        write(contents)
        if beside is not None:
            write(beside())
        _write_mark(_sibling(output, "json"), Mark(verb, fingerprint=fingerprint, digests=digests))
        for path in sorted(partials, key=lambda path: path == output):
            with writing(path):
                partial = partials[path]
                if partial is not None:
                    partial.replace(path)
                else:
                    path.unlink(missing_ok=True)
        _sync_folder(output.parent)
    finally:
        for path in {*contents, *partials}:
            with contextlib.suppress(OSError):
                _sibling(path, "partial").unlink(missing_ok=True)


def read_mark(output: AnyPath) -> Mark | None:
    """The mark of a file or a folder that this program made; None where there is none, or a damaged one."""
    output = Path(output)
    path = output / MARK if output.is_dir() else _sibling(output, "json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("made_by") != "rrhf-peft":
            return None
        mark = Mark(**values)
        is_sound = isinstance(mark.digests, dict) and isinstance(mark.writes, list)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return mark if is_sound else None


def is_empty_folder(path: AnyPath) -> bool:
    """Whether a folder holds no file but what a kill leaves of this program's very first, its mark."""
    return all(fnmatch.fnmatchcase(file, _SIBLINGS) for file in _files_in(Path(path)))


def is_as_written(output: AnyPath, mark: Mark | None) -> bool:
    """Whether a file holds what the newest run that its mark tells of wrote."""
    path = Path(output)
    digests = [] if mark is None else mark.digests.get(path.name, [])
    return bool(digests) and path.is_file() and digest_of(path) == digests[0]


def is_finished(output: AnyPath, fingerprint: str, beside: Iterable[AnyPath] = ()) -> bool:
    """Whether the same work was finished before, and its files are still what was written then."""
    mark = read_mark(output)
    return (
        mark is not None
        and mark.fingerprint == fingerprint
        and is_as_written(output, mark)
        and all(is_as_written(path, mark) for path in beside if os.path.exists(path))
    )


def refuse_finished(output: AnyPath, fingerprint: str) -> None:
    """Refuse an output file that is there, and may not be replaced.

    Raises:
        UserError: it is there; says why it does not pass for this work's.
    """
    output = Path(output)
    if not os.path.lexists(output):
        return
    mark = read_mark(output)
    if mark is None:
        why = "already exists"
    elif mark.fingerprint != fingerprint:
        why = "already exists, and was made from other input or with other settings"
    else:
        why = "already exists, and was changed since it was made"
    raise UserError(f"{output}: {why}. Choose another output, remove it, or pass --overwrite.")


def digest_of(path: AnyPath) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _write_mark(path: Path, mark: Mark) -> None:
    from rrhf_peft import __version__

    values = {key: value for key, value in asdict(replace(mark, version=__version__)).items() if value}
    replace_text(path, json.dumps({"made_by": "rrhf-peft", **values}, indent=1) + "\n")


def _why_not_ours_file(path: Path, mark: Mark | None) -> str | None:
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        return f"is {_kind(path)}"
    digests = [
        digest for one in (mark, read_mark(path)) if one is not None for digest in one.digests.get(path.name, [])
    ]
    if not digests:
        return "has no mark of rrhf-peft (the first version left none)"
    return None if digest_of(path) in digests else "was changed since rrhf-peft made it"


def _why_not_ours_folder(path: Path) -> str | None:
    """Why a folder is not to be replaced: the first file in it that this program does not write."""
    if path.is_symlink() or not path.is_dir():
        return f"is {_kind(path)}"
    mark = read_mark(path)
    if mark is None:
        return None if is_empty_folder(path) else "has no mark of rrhf-peft (the first version left none)"
    foreign = next(_foreign_files(path, {}), None)
    return None if foreign is None else f"holds {foreign.relative_to(path)}, which rrhf-peft {mark.verb} did not write"


def _foreign_files(folder: Path, marks: Mapping[Path, Mark]) -> Iterator[Path]:
    """The files below a folder that one of the marks above them does not tell of; `marks` are those above the folder.

    A folder inside of a marked one may have a mark as well, which says more exactly what was written there.
    """
    mark = read_mark(folder)
    marks = marks if mark is None else {**marks, folder: mark}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _foreign_files(path, marks)
        elif path.name != MARK and not fnmatch.fnmatchcase(path.name, _SIBLINGS):
            for above, mark in marks.items():
                name = path.relative_to(above).as_posix()
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in mark.writes):
                    yield path
                    break


def _files_in(folder: Path) -> Iterator[str]:
    """All files below a folder, links to folders among them, relative to it."""
    for above, folders, files in os.walk(folder):
        for name in sorted([*files, *(one for one in folders if os.path.islink(os.path.join(above, one)))]):
            yield Path(above, name).relative_to(folder).as_posix()


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "no ordinary file"


def _sibling(path: Path, state: str) -> Path:
    path = Path(os.path.abspath(path)) if path.name in ("", "..") else path
    return path.with_name(f".{path.name}.rrhf-peft.{state}")


# --------------------------------------------------------------------------------------------------- before the work


def check_output(
    target: AnyPath,
    *,
    key: str = "",
    folder: bool = False,
    reads: Iterable[AnyPath | None] = (),
    overwrite: bool = False,
    continues: bool = False,
    beside: Iterable[AnyPath] = (),
) -> None:
    """Refuse an output that would cost the user a file; changes nothing. Call it before anything is touched.

    Args:
        target: the file, or with `folder` the folder, to make.
        key: how the user names it, `sampling.output` or `--output`, for the message.
        folder: which of the two it is.
        reads: files and folders that the run reads: data, prompts, models, adapters, recipes. What is not there is
            passed over, as hub ids are; None too.
        overwrite: what is there may be replaced, if this program made it and nobody else has added to it.
        continues: what is there is for the caller to judge, because an unfinished run may be continued.
        beside: files that are written beside a file, such as its report.

    Raises:
        UserError: the target or a hidden sibling is not this program's, is, holds or lies in something that is read,
            cannot be made where it is, or is there and neither `overwrite` nor `continues`.
    """
    target = Path(target)
    start = f"{key}: {target}" if key else f"{target}"
    wanted = "folder" if folder else "file"
    if target.is_symlink():
        raise UserError(f"{start}: is a link. Name the {wanted} itself.")
    if target.exists() and not (target.is_dir() if folder else target.is_file()):
        raise UserError(f"{start}: is {_kind(target)}. Name a {wanted}.")
    _refuse_what_is_read(target, start, reads)
    above = _nearest(target.parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "no folder" if not above.is_dir() else "not writable"
        raise UserError(f"{start}: cannot be written ({above} is {reason}). {_CHOOSE}")
    mark = read_mark(target)
    for path in map(Path, beside):
        _refuse_what_is_read(path, f"{path}, which is written beside {target}", reads)
        if why := _why_not_ours_file(path, mark):
            raise UserError(f"{path}: {why}, and is written beside {target}. Move it away, or choose another name.")
    if folder:
        for state in ("partial", "retired"):
            sibling = _sibling(target, state)
            if os.path.lexists(sibling) and (why := _why_not_ours_folder(sibling)):
                raise UserError(f"{sibling}: {why}, and stands where {target} is made. Move it away.")
    if not target.exists() or (folder and is_empty_folder(target)):
        return
    if continues and not overwrite:
        return
    if not overwrite:
        raise UserError(f"{start}: already exists. Choose another {wanted}, remove it, or pass --overwrite.")
    if folder and (home := _within(target)):
        raise UserError(f"{start}: is or holds {home}, so it is not replaced. Choose another folder.")
    if why := _why_not_ours_folder(target) if folder else _why_not_ours_file(target, mark):
        raise UserError(f"{start}: {why}, so --overwrite leaves it. Choose another {wanted}, or remove it yourself.")


def _refuse_what_is_read(target: Path, start: str, reads: Iterable[AnyPath | None]) -> None:
    """Nothing may be written over, or into, what the run reads; but beside the files of a model is no harm."""
    real = Path(os.path.realpath(target))
    for path in reads:
        if path is None or not str(path) or not os.path.exists(path):
            continue
        read = Path(os.path.realpath(path))
        if real == read or (real.exists() and real.samefile(read)):
            raise UserError(f"{start}: is what this run reads. Choose another output.")
        if real in read.parents:
            raise UserError(f"{start}: holds {path}, which this run reads. Choose another output.")
        is_model = any((read / name).exists() for name in ("config.json", "adapter_config.json"))
        if read in real.parents and not is_model:
            raise UserError(f"{start}: lies in {path}, which this run reads. Choose another output.")


def _within(target: Path) -> str | None:
    """Whether the working folder or the home folder is in a folder, in words."""
    real = Path(os.path.realpath(target))
    for path, name in ((Path.cwd(), "the working folder"), (Path.home(), "your home folder")):
        inner = Path(os.path.realpath(path))
        if real == inner or real in inner.parents:
            return name
    return None


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = Path(os.path.abspath(path))
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


# ------------------------------------------------------------------------------------------------- one run at a time

_held: set[tuple[int, int]] = set()
_warned: set[str] = set()


@contextlib.contextmanager
def lock(target: AnyPath) -> Iterator[None]:
    """Hold an output for this process; the kernel lets go of it when the process ends, however it does.

    A POSIX record lock on a file beside the output, so that it holds between hosts as well, where their shared file
    system passes locks on (NFS 4, Lustre with `flock`, GPFS, CephFS); on one without locks, standard error says so
    once, and nothing keeps two runs apart. Children of the process do not inherit it. Folders above the output are
    made, and removed again if they stay empty.

    Raises:
        UserError: another run holds it, or it cannot be written there.
    """
    target = Path(os.path.abspath(target))
    path = _sibling(target, "lock")
    made = [folder for folder in target.parents if not folder.exists()]  # the innermost first
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, target)
    if descriptor is None:
        yield
        return
    identity = _identity(descriptor)
    assert identity is not None
    _held.add(identity)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who waits for it looks whether it is still the same file
        _held.discard(identity)
        os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(path: Path, target: Path) -> int | None:
    """The descriptor that holds the lock; None where the file system has none."""
    while True:
        if _identity(path) in _held:  # asked before it is opened: closing a second descriptor would let go of the lock
            raise UserError(f"{target}: this process is working on it already.")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _identity(path) == _identity(descriptor):
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
                return descriptor
            os.close(descriptor)  # its holder removed it in this moment: again, with the new one
        except OSError as error:
            text = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{target}: another run is working on it ({_holder(text)}). Wait for it or end it, or choose "
                    "another output."
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                path.unlink()
            if str(path.parent) not in _warned:
                _warned.add(str(path.parent))
                print(f"{path.parent}: has no file locks, so start no second run on {target.name}.", file=sys.stderr)
            return None


def _identity(file: Path | int) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return "it has just begun"


# ------------------------------------------------------------------------------------------------------------ folders


@contextlib.contextmanager
def staged_folder(
    target: AnyPath,
    *,
    verb: str = "",
    key: str = "",
    reads: Iterable[AnyPath | None] = (),
    overwrite: bool = False,
    fingerprint: str | None = None,
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and is removed when not; one run at a time.

    What a killed process left behind is cleared, or put back, by the next one. With `overwrite` an
    existing target is replaced at the very end.

    Args:
        target: the folder to make.
        verb: which one makes it.
        key, reads: as in `check_output`.
        overwrite: replace a folder that this program made.
        fingerprint: of everything that the content depends on, for `is_finished_folder`.

    Raises:
        UserError: see `check_output` and `lock`; or the disk is full.
    """
    target = Path(target)
    with lock(target):
        check_output(target, key=key, folder=True, reads=reads, continues=True)  # the siblings are ours
        _recover(target)
        check_output(target, key=key, folder=True, reads=reads, overwrite=overwrite)
        staging = _sibling(target, "partial")
        try:
            with writing(target):
                staging.mkdir(parents=True)
            _write_mark(staging / MARK, Mark(verb, writes=["*"], state="begun"))
            yield staging
            written = [glob.escape(file) for file in _files_in(staging) if file != MARK]
            _write_mark(staging / MARK, Mark(verb, fingerprint=fingerprint, writes=[*written, REPORT]))
            with writing(target):
                if target.exists():
                    target.rename(_sibling(target, "retired"))
                staging.rename(target)
                _sync_folder(target.parent)
        except Exception as error:
            if (text := disk_trouble(error, target)) and not isinstance(error, UserError):
                raise UserError(text) from error
            raise
        finally:
            if staging.exists():
                remove(staging)
        _recover(target)


def is_finished_folder(target: AnyPath, fingerprint: str) -> bool:
    """Whether a `staged_folder` of the same work is there, with all of its files; clears what a kill left beside it."""
    target = Path(target)
    mark = read_mark(target) if target.is_dir() else None
    if mark is None or mark.fingerprint != fingerprint:
        return False
    if not {*map(glob.escape, _files_in(target))} >= {*mark.writes} - {REPORT}:
        return False
    with lock(target):
        _recover(target)
    return True


def work_folder(
    path: AnyPath, *, verb: str, writes: Sequence[str], fingerprint: str | None = None, overwrite: bool = False
) -> Mark:
    """Make or continue a folder of intermediate results beside an output; the caller holds the output's `lock`.

    Args:
        path: the folder.
        verb: which one fills it.
        writes: as for `begun_folder`.
        fingerprint: of what the results depend on, for the mark of a folder that is made here.
        overwrite: remove what is there, and note that the output may be replaced at the end.

    Returns:
        The folder's mark. Its fingerprint is that of the run that made the folder.

    Raises:
        UserError: the folder is not this program's, or cannot be made.
    """
    path = Path(path)
    if os.path.lexists(path) and (reason := _why_not_ours_folder(path)):
        raise UserError(f"{path}: {reason}, and stands where intermediate results are collected. Move it away.")
    if overwrite:
        remove(path)
    mark = read_mark(path)
    if mark is None:
        mark = Mark(verb, fingerprint=fingerprint, writes=list(writes), may_replace=overwrite)
        _write_mark(path / MARK, mark)
    return mark


def remove_work_folder(path: AnyPath) -> None:
    """Remove a folder of intermediate results, but leave one that holds a file of somebody else's."""
    if not os.path.lexists(path) or _why_not_ours_folder(Path(path)) is None:
        remove(path)


class BegunFolder:
    """A folder that a long run fills where it is."""

    def __init__(self, path: Path, mark: Mark) -> None:
        self.path, self._mark = path, mark

    @property
    def state(self) -> str:
        """`begun`, `working` or `whole`."""
        return self._mark.state

    def keep(self, made: AnyPath | None = None) -> None:
        """There is something now that is worth more than the folder that was here before; may be called again.

        Args:
            made: a folder in it that is whole now, with nothing but what the verb wrote: a file that somebody puts
                there later keeps the whole folder from being replaced.
        """
        if made is not None and Path(made).is_dir():
            _write_mark(Path(made) / MARK, Mark(self._mark.verb, writes=[*map(glob.escape, _files_in(Path(made)))]))
        if self._mark.state == "begun":
            self.set_state("working")

    def set_state(self, state: Literal["begun", "working", "whole"]) -> None:
        """Note how far the run is."""
        self._mark = replace(self._mark, state=state)
        _write_mark(self.path / MARK, self._mark)


@contextlib.contextmanager
def begun_folder(
    target: AnyPath, *, verb: str, writes: Sequence[str], overwrite: bool = False, resume: bool = False
) -> Iterator[BegunFolder]:
    """Make or continue a folder that a long run fills where it is; the caller holds `lock`, and has checked all it can.

    With `overwrite` the folder that was there is set aside. It comes back when the block fails before
    `BegunFolder.keep`, also by a kill, which the next run finds; it goes when the block ends well.

    Args:
        target: the folder.
        verb: which one fills it.
        writes: patterns of the paths in it that the verb writes, relative to it; ``*`` matches ``/`` as well. Files
            that match none are a user's, and keep the folder from being replaced; so do files in a folder inside, if
            that has a mark which does not tell of them.
        overwrite: replace a folder that this program made.
        resume: go on in the folder that is there.

    Raises:
        UserError: see `check_output`; or the folder cannot be written to.
    """
    target = Path(target)
    _recover(target, resume=resume)
    check_output(target, folder=True, overwrite=overwrite, continues=resume)
    retired = _sibling(target, "retired")
    if overwrite and target.exists():
        if retired.exists():  # and whole, while the one that was to replace it is not
            remove(target)
        else:
            with writing(target):
                target.rename(retired)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    mark = read_mark(target)
    held = any(_files_in(target)) if mark is None else mark.state != "begun"
    begun = BegunFolder(target, Mark(verb, writes=list(writes)))
    begun.set_state("working" if held else "begun")
    try:
        yield begun
    except BaseException:
        if begun.state == "begun" and retired.exists():
            remove(target)
            retired.rename(target)
        raise
    begun.set_state("whole")
    _recover(target)


def retired_folder(target: AnyPath) -> Path | None:
    """The folder that was at `target` before the unfinished run that is there now; None if there is none."""
    retired = _sibling(Path(target), "retired")
    return retired if retired.exists() else None


def remove(path: AnyPath) -> None:
    """Remove what this program made so that no kill leaves a part of it: it changes its name first."""
    path = Path(path)
    trash = _sibling(path, "trash")
    _delete(trash)
    if os.path.lexists(path):
        with writing(path):
            path.rename(trash)
        _delete(trash)


def _recover(target: Path, *, resume: bool = False) -> None:
    """Bring to its end what a kill interrupted; the caller holds the lock, and `check_output` has seen the siblings."""
    retired, staging = _sibling(target, "retired"), _sibling(target, "partial")
    for path in (target, staging, retired):
        _delete(_sibling(path, "trash"))
    if staging.is_dir():
        remove(staging)
    if not retired.exists():
        return
    mark = read_mark(target)
    is_begun = target.is_dir() and (mark.state == "begun" if mark is not None else _why_not_ours_folder(target) is None)
    if is_begun and not resume:
        remove(target)
    if not target.exists():
        with writing(target):
            retired.rename(target)
    elif mark is not None and mark.state == "whole":
        remove(retired)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # what stays is hidden, and removed by the next run
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
