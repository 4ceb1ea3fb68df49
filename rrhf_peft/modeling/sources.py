"""Where a model's files are: a local folder, or the hub's as this machine holds them; and whether they are whole."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from rrhf_peft.records import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: Everything small that comes with a model.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.py", "*.jinja", "*.tiktoken")

#: The hub is asked once, and answers within this many seconds or counts as out of reach.
SECONDS_FOR_THE_HUB = 10.0


def resolve_source(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    required: Sequence[str] = ("config.json",),
    what: str = "model",
    weights: Sequence[str] | None = None,
) -> str:
    """The folder of a model, adapter or tokenizer on this machine; a hub id's files are downloaded where missing.

    The hub is asked once and without retries, so that a misspelt name or a machine without network is told at
    once. Where it does not answer, what its cache holds is used.

    Args:
        name: Local folder or hub id.
        revision: Branch, tag or commit of a hub id.
        required: Files of which every such source has at least one.
        what: How error messages call it.
        weights: Patterns of the weight files that are wanted as well; None for small files only.

    Raises:
        UserError: nothing of that name; names near folders or the hub's reason.
    """
    text = os.fspath(name)
    if not text.strip():
        raise UserError(f"the name of a {what} is empty. Give its folder or hub id.")
    path = Path(text).expanduser()
    with _readable(text, what):
        if path.is_dir():
            return _checked_folder(path, required, what)
        if path.exists():
            raise UserError(
                f"{text}: a {what} is a folder in Hugging Face format, and this is a file. Give its folder."
            )
        if _looks_like_a_path(text):
            raise UserError(f"{text}: there is no such {what} folder{_near_folders(path)}. Check the path.")
        return str(_hub_folder(text, revision, required, what, weights))


@contextmanager
def _readable(text: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{text[:200]!r}: this {what} cannot be read ({reason}). Check the path.") from error


def _checked_folder(path: Path, required: Sequence[str], what: str) -> str:
    if _holds(path, required):
        return str(path)
    if "config.json" in required and (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: this is an adapter, not a {what}. Name its base model here, and the adapter as "
            "model.init_adapter."
        )
    inner = [child.name for child in path.iterdir() if child.is_dir() and _holds(child, required)]
    inner.sort(key=lambda name: (len(name), name))  # checkpoint-10 comes after checkpoint-9
    hint = f" Did you mean '{path / inner[-1]}'?" if inner else " Check the path."
    raise UserError(f"{path}: this folder holds no {' or '.join(required)}, so it is no {what}.{hint}")


def _holds(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / file).is_file() for file in files)


def _looks_like_a_path(text: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else, or a name below an existing folder, means a path."""
    if text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1 or text.endswith("/"):
        return True
    return "/" in text and Path(text).parent.is_dir()


def _near_folders(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor its parent '{path.parent}'"
    siblings = [child.name for child in path.parent.iterdir() if child.is_dir() and not child.name.startswith(".")]
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _hub_folder(
    name: str, revision: str | None, required: Sequence[str], what: str, weights: Sequence[str] | None
) -> Path:
    """A hub id's snapshot in the local cache, completed from the hub where that answers."""
    where = f"{name}@{revision}" if revision else name
    near = _near_folders(Path(name)) if "/" not in name else ""
    try:
        cached = _cached(name, revision, required)
        if constants.is_offline_mode():
            if cached is not None:
                return cached
            raise UserError(
                f"{where}: there is no such folder{near} here, the hub cache does not hold it, and HF_HUB_OFFLINE is "
                f"set. Give the {what}'s local folder, or unset HF_HUB_OFFLINE to download it."
            )
        try:
            HfApi().model_info(name, revision=revision, timeout=SECONDS_FOR_THE_HUB)
        except (OSError, HTTPError) as error:
            if cached is not None and not isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
                return cached
            raise
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL_FILES]))
        if weights is not None:
            snapshot_download(name, revision=revision, allow_patterns=_weight_files(folder, weights))
    except HFValidationError:
        raise UserError(f"{name}: this is neither a folder{near} nor a possible hub id. Check the name.") from None
    except GatedRepoError:
        raise UserError(
            f"{where}: this {what} is gated. Accept its licence on huggingface.co and log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision '{revision}' of this {what}. Check model.revision.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where}: there is no such folder{near}, and the hub has no such {what}, or it is private. "
            "Check the name, or log in with `hf auth login`."
        ) from None
    except (OSError, HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{where}: there is no such folder{near} here, the hub cache does not hold it, and the hub cannot be "
            f"reached ({reason}). Check the name and the network, or give the {what}'s local folder."
        ) from None
    return Path(_checked_folder(folder, required, what))


def _cached(name: str, revision: str | None, required: Sequence[str]) -> Path | None:
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _holds(folder, required) else None


def _weight_files(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files that the index names; a repository may hold the same weights a second time in another form."""
    try:
        return sorted(set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return list(patterns)


#: What a model, adapter or tokenizer is read from: weights, configuration, tokenizer, and code.
_WEIGHTS, _CONFIGS = ("*.safetensors", "*model*.bin", "hf_ckpt.pt"), ("*config.json", "*.index.json", "*.py")
_TOKENIZER = ("token*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_temp*")

#: Bytes; longer files are told apart by their length and by equally spaced pieces of this much in all.
_READ_WHOLE = 2**26


def weights_fingerprint(name: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """What tells a model, an adapter or a tokenizer from another one of the same name; None where it is not here.

    Of a folder or a file, SHA-256 of names and contents: names, sizes and times of files alone change by copying, and
    stay when a run is repeated. Of files beyond 64 MiB 256 pieces are read, because training moves all of the
    weights: another model takes seconds to notice and not minutes. Of a hub id, the commit that the cache holds.
    """
    path, digest = Path(name).expanduser(), hashlib.sha256()
    if not path.exists():
        with suppress(LocalEntryNotFoundError, HFValidationError, OSError):
            return Path(snapshot_download(os.fspath(name), revision=revision, local_files_only=True)).name
        return None
    patterns = (*_WEIGHTS, *_CONFIGS, *_TOKENIZER)
    files = {file for pattern in patterns for file in path.glob(pattern)} if path.is_dir() else {path}
    for file in sorted(file for file in files if file.is_file()):
        size = file.stat().st_size
        pieces = 1 if size <= _READ_WHOLE else 256
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for piece in range(pieces):
                opened.seek(size // pieces * piece)
                digest.update(opened.read(_READ_WHOLE // pieces))
    return digest.hexdigest()


def checkpoint_tensors(folder: Path) -> dict[str, Path]:
    """Map each tensor name of a checkpoint to its file, files in the order of the index.

    Raises:
        UserError: no safetensors weights, or a file is missing, truncated or not safetensors; names the file.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(tensor_names(folder / SINGLE_FILE), folder / SINGLE_FILE)
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise UserError(
                f"{folder}: the weights are pickled ({pickled[0]}), which can hide code; only safetensors are opened. "
                "Convert them: load the model with transformers and call save_pretrained on a new folder. If you trust "
                "where they come from, all but merge read them as they are with model.allow_pickle: true."
            )
        raise UserError(f"{folder}: there are no weights here, neither {SINGLE_FILE} nor {INDEX_FILE}. Download them.")
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        assert all(isinstance(file, str) for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{index}: not a readable index of weight files. Download it again.") from None
    names = {file: set(tensor_names(folder / file)) for file in dict.fromkeys(weight_map.values())}
    for tensor, file in weight_map.items():
        if tensor not in names[file]:
            raise UserError(f"{folder / file}: the index promises '{tensor}' in this file. Download the weights again.")
    return {tensor: folder / file for tensor, file in weight_map.items()}


def tensor_names(path: Path) -> list[str]:
    """The names in one safetensors file. Opening it checks that its header and its length agree.

    Raises:
        UserError: the file is missing, empty, truncated, or something else than safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise UserError(f"{path}: this weight file is missing. Download it again.") from None
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise UserError(f"{path}: this is no file, where a weight file should be. Download it again.") from None
        with path.open("rb") as raw:
            start = raw.read(40)
        if not start:
            problem = "it is empty"
        elif start.startswith(b"version https://git-lfs"):
            problem = "it is a git-lfs pointer, not the weights; run `git lfs pull`"
        else:
            problem = f"it is truncated or not safetensors: {error}"
        raise UserError(f"{path}: this weight file cannot be read ({problem}). Download or save it again.") from None
