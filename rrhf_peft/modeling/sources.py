"""Where a model comes from: a local folder or a hub id, checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rrhf_peft.records import UserError


def resolve_source(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    required: Sequence[str] = ("config.json",),
    what: str = "model",
) -> str:
    """Check that `name` is a folder that holds a `required` file, or a hub id that is cached or can be reached.

    A hub id is asked for once and without retries, so that a misspelt name or a machine without
    network is told at once.

    Args:
        name: Local folder or hub id.
        revision: Branch, tag or commit of a hub id.
        required: Files of which every such source has at least one.
        what: How error messages call it.

    Returns:
        The folder as text, or the hub id, unchanged.

    Raises:
        UserError: nothing of that name; names near folders or the hub's reason.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return _checked_folder(path, required, what)
    if path.is_file():
        raise UserError(f"{text}: a {what} is a folder in Hugging Face format, and this is a file. Give its folder.")
    if _looks_like_a_path(text):
        raise UserError(f"{text}: there is no such {what} folder{_near_folders(path)}. Check the path.")
    _check_hub(text, revision, required, what)
    return text


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


def _check_hub(name: str, revision: str | None, required: Sequence[str], what: str) -> None:
    where = f"{name}@{revision}" if revision else name
    near = _near_folders(Path(name)) if "/" not in name else ""
    try:
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in required):
            return
        if constants.is_offline_mode():
            raise UserError(
                f"{where}: there is no such folder{near} here, the hub cache does not hold it, and HF_HUB_OFFLINE is "
                f"set. Give the {what}'s local folder, or unset HF_HUB_OFFLINE to download it."
            )
        HfApi().model_info(name, revision=revision, timeout=10)
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
