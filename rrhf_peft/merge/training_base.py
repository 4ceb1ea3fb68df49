"""Which base model an adapter was trained on, and how that run held its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from rrhf_peft.modeling import AdapterFiles, resolve_dtype, resolve_source
from rrhf_peft.recipe import Recipe, load_recipe
from rrhf_peft.records import UserError

#: What a merge reads of a hub repository: weights as safetensors, and everything small.
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.py", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class TrainingBase:
    """The base model of a training run.

    Attributes:
        name: Hub id or folder, as the run named it.
        folder: Where its files are on this machine.
        quantization: none, int8, nf4 or fp4.
        double_quant: Whether the 4-bit blocks' scales were quantised too.
        dtype: What the unquantised weights were held in.
        trust_remote_code: Whether the model's own code may run.
    """

    name: str
    folder: Path
    quantization: str
    double_quant: bool
    dtype: torch.dtype
    trust_remote_code: bool


def find_training_base(
    files: AdapterFiles,
    *,
    base_model: str | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
) -> TrainingBase:
    """Read it from the run's recipe.yaml, from the adapter's configuration, and from the arguments.

    A base model or quantisation given by the caller wins over what the files say.

    Raises:
        UserError: the base model is unknown or not to be found, or nothing says how it was quantised.
    """
    recipe = find_recipe(files.folder)
    model = recipe.model if recipe else None
    if quantization is None and model is None:
        raise UserError(
            f"{files.folder}: there is no recipe.yaml here or in the parent folder, so nothing says how training held "
            "the base weights. Pass --quantization none, int8, nf4 or fp4."
        )
    name = base_model or files.config.base_model_name_or_path or (model.name if model else None)
    if not name:
        raise UserError(f"{files.folder}: neither adapter nor recipe names a base model. Pass --base-model.")
    revision = None if base_model else files.config.revision or (model.revision if model else None)
    try:
        source = resolve_source(name, revision=revision)
    except UserError as error:
        hint = "" if base_model else f" {files.folder} names it as its base; pass --base-model if it is elsewhere now."
        raise UserError(f"{error}{hint}") from None
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES))
    return TrainingBase(
        name=name,
        folder=folder,
        quantization=quantization or (model.quantization if model else "none"),
        double_quant=double_quant if double_quant is not None else (model.double_quant if model else True),
        dtype=resolve_dtype(model.dtype if model else "auto"),
        trust_remote_code=model.trust_remote_code if model else False,
    )


def find_recipe(adapter: Path) -> Recipe | None:
    """The recipe of the run that made an adapter: beside it, or one level up from a checkpoint."""
    for folder in (adapter, adapter.resolve().parent):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")
    return None


def run_folders(adapter: Path) -> list[Path]:
    """Where a run keeps what belongs to its adapter, nearest first: `checkpoint-N` lies in the run folder."""
    folders = [adapter]
    if re.fullmatch(r"checkpoint-\d+", adapter.resolve().name):
        folders.append(adapter.resolve().parent)
    return folders
