"""The files beside the weights: configuration, tokenizer, chat template, generation settings, model code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)


def write_config(base: Path, target: Path, *, dtype: torch.dtype, untie: bool) -> None:
    """Copy config.json with the new dtype, and untied where the tensors differ.

    There is no quantisation to take out: a base checkpoint that is quantised on disk is refused.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "torch_dtype" in section or "dtype" in section or section is config:
            section.pop("torch_dtype", None)
            section["dtype"] = str(dtype).removeprefix("torch.")
        if untie and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(adapter: Sequence[Path], base: Path, target: Path) -> bool:
    """Copy everything else that a model folder needs.

    The tokenizer comes whole from the first folder that has one, the generation settings likewise: the
    adapter's folders first, then the base. Python files come with models that bring their own code.

    Returns:
        Whether there was a tokenizer.
    """
    folders = [*adapter, base]
    tokenizer = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    tokenizer = tokenizer or next((folder for folder in folders if _has_tokenizer(folder)), None)
    if tokenizer:
        for name in _TOKENIZER_FILES:
            _copy(tokenizer / name, target)
        for path in tokenizer.glob("*.tiktoken"):
            _copy(path, target)
        if (tokenizer / "additional_chat_templates").is_dir():
            shutil.copytree(tokenizer / "additional_chat_templates", target / "additional_chat_templates")
    generation = next((folder for folder in folders if (folder / "generation_config.json").is_file()), None)
    if generation:
        _copy(generation / "generation_config.json", target)
    if "auto_map" in json.loads((base / "config.json").read_text(encoding="utf-8")):
        for path in base.glob("*.py"):
            _copy(path, target)
    return tokenizer is not None


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def _copy(path: Path, target: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, target / path.name)
