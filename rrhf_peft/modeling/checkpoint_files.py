"""The safetensors files of a checkpoint folder: which tensor lies where, proved readable and complete."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rrhf_peft.records import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
                f"{folder}: the weights are pickled ({pickled[0]}), which can hide code. Convert them to safetensors "
                "first: load the model with transformers and call save_pretrained on a new folder."
            )
        raise UserError(f"{folder}: there are no weights here, neither {SINGLE_FILE} nor {INDEX_FILE}. Download them.")
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
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
        with path.open("rb") as raw:
            start = raw.read(40)
        if not start:
            problem = "it is empty"
        elif start.startswith(b"version https://git-lfs"):
            problem = "it is a git-lfs pointer, not the weights; run `git lfs pull`"
        else:
            problem = f"it is truncated or not safetensors: {error}"
        raise UserError(f"{path}: this weight file cannot be read ({problem}). Download or save it again.") from None
