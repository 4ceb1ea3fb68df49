"""Read a PEFT adapter folder, and prove that its weights are whole and belong to the model at hand."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from rrhf_peft.modeling.checkpoint_files import tensor_names
from rrhf_peft.modeling.sources import resolve_source
from rrhf_peft.records import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT adapter as read from its folder.

    Attributes:
        folder: Where it was read.
        config: Its LoraConfig.
        weights: Tensor name -> tensor on the CPU, names as PEFT saves them (`base_model.model...`).
    """

    folder: Path
    config: LoraConfig
    weights: dict[str, torch.Tensor]


def read_adapter(name: str | os.PathLike[str]) -> AdapterFiles:
    """Read a LoRA adapter from a folder or hub id.

    Raises:
        UserError: not an adapter folder; another PEFT method; weights missing, pickled, truncated,
            empty or not finite. Names the file.
    """
    source = resolve_source(name, required=(CONFIG_FILE,), what="adapter")
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder / 'adapter_model.bin'}: pickled weights can hide code and are not opened. Save the adapter "
                "as safetensors first."
            )
        raise UserError(f"{path}: the adapter's weights are missing. Copy or download the whole folder.")
    if not tensor_names(path):
        raise UserError(f"{path}: this file holds no tensors. The adapter was saved empty; save it again.")
    weights = load_file(path)
    for key, tensor in weights.items():
        if tensor.numel() == 0:
            raise UserError(
                f"{path}: '{key}' has size zero. A sharded run saved the adapter without gathering it; save it again."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: '{key}' holds values that are not finite. Take an earlier checkpoint.")
    return AdapterFiles(folder, config, weights)


def _read_config(path: Path) -> LoraConfig:
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
        config = PeftConfig.from_pretrained(str(path.parent))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not a usable adapter configuration ({error}). Copy the adapter again.") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: this is a {kind} adapter; only LORA and its variants are supported.")
    return config


def load_adapter_weights(model: PeftModel, files: AdapterFiles) -> None:
    """Put an adapter's weights into the layers that its configuration made in `model`.

    Raises:
        UserError: tensors are missing, left over, or of other shapes: it belongs to another base model.
    """
    base = files.config.base_model_name_or_path
    where = f"{files.folder}: this adapter was trained on {base or 'another model'} and does not fit the base model"
    remedy = "Name the base model that it was trained on."
    try:
        result: Any = set_peft_model_state_dict(model, files.weights)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{where} ({lines[min(1, len(lines) - 1)].rstrip('.')}). {remedy}") from None
    if result.unexpected_keys:
        raise UserError(
            f"{where}: there is no place for {_some(result.unexpected_keys)} of {files.folder / WEIGHTS_FILE}. {remedy}"
        )
    missing = _missing(model, set(result.missing_keys))
    if missing:
        raise UserError(f"{where}: {files.folder / WEIGHTS_FILE} lacks {_some(missing)}. {remedy}")


def _missing(model: PeftModel, keys: set[str]) -> list[str]:
    """Those of the keys that an adapter should have brought: base weights and tied doubles are not among them."""
    markers = (".lora_", ".modules_to_save.", ".trainable_tokens_delta")
    state = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for key, tensor in state.items() if key not in keys}
    return sorted(
        key
        for key in keys
        if any(marker in key for marker in markers) and ".base_layer." not in key and id(state[key]) not in loaded
    )


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
