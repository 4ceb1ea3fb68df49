"""Write tensors as safetensors shards with an index, holding one shard in memory at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rrhf_peft.modeling.sources import INDEX_FILE, SINGLE_FILE
from rrhf_peft.records import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written: its name on disk, shape and dtype, known before its values."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or a plain number.

    Raises:
        UserError: not a size above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UserError(f"--shard-size: {text!r} is not a size. Write it like 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * unit)


def plan_shards(tensors: Sequence[PlannedTensor], shard_size: int) -> list[list[PlannedTensor]]:
    """Cut a sequence of tensors into shards of at most `shard_size` bytes; a larger tensor gets its own."""
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.size > room:
            shards.append([])
            room = shard_size
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[PlannedTensor]],
    produce: Callable[[str], torch.Tensor],
    on_tensor: Callable[[PlannedTensor], None],
) -> None:
    """Write each shard's tensors, made one after the other by `produce(key)`, and the index.

    Named as `save_pretrained` does: `model.safetensors`, or `model-00001-of-00003.safetensors` and an index.

    Raises:
        UserError: the disk refuses.
    """
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for planned in shard:
            tensor = produce(planned.key).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (planned.shape, planned.dtype), planned.key
            tensors[planned.key] = tensor
            index[planned.key] = name
            on_tensor(planned)
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
            # safetensors makes files that only their owner may read; the folder knows what the umask allows.
            (folder / name).chmod(folder.stat().st_mode & 0o666)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder.parent}: {name} cannot be written ({error}). Make room, or choose another disk."
            ) from None
    if len(shards) > 1:
        total = sum(tensor.size for shard in shards for tensor in shard)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
