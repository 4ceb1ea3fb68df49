"""The merged tensors, in the base checkpoint's own order, written as safetensors shards with an index.

One shard is in memory at a time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rrhf_peft.merge.adapter_edits import AdapterEdits
from rrhf_peft.merge.base_weights import BaseWeights, TrainingBase
from rrhf_peft.modeling import AdapterFiles, load_config
from rrhf_peft.modeling.sources import INDEX_FILE, SINGLE_FILE
from rrhf_peft.progress import size_text
from rrhf_peft.records import UserError

#: Called with what is being done, bytes done, and bytes in all (0 when that is not known).
OnProgress = Callable[[str, int, int], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` rather than `torch.float32`."""
    return str(dtype).removeprefix("torch.")


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


class MergedWeights:
    """One merge under way: what is to be written, and what the adapter changed so far.

    Attributes:
        weights: The base model.
        plan: Every tensor to write, in the base checkpoint's order.
        untied: Whether tied embeddings have come to differ.
        vocab_size: Rows of the embedding.
        main_dtype: The dtype that most bytes are written in.
        changed: Tensors written so far that the adapter changed.
        delta_norm: Sum of the Frobenius norms of the changes so far.
    """

    def __init__(self, files: AdapterFiles, trained: TrainingBase, *, as_trained: bool, dtype: str) -> None:
        config = load_config(str(trained.folder), trust_remote_code=trained.trust_remote_code)
        self._files = files
        self.vocab_size: int = config.get_text_config().vocab_size
        self._dtype = DTYPES.get(dtype)
        self.weights = BaseWeights(trained, config, as_trained=as_trained)
        tied = dict(self.weights.model.all_tied_weights_keys)
        self._edits = AdapterEdits(self.weights.model, files)
        self._check_places()
        self._check_base_copies()
        self.untied = any(self._differ(target, source) for target, source in tied.items())
        self._parameter_of = dict(self.weights.parameter_of)
        keys = list(self.weights.keys)
        if self.untied:
            for name in sorted({*tied, *tied.values()} - set(self._parameter_of.values())):
                keys.append(name)
                self._parameter_of[name] = name
        self.plan = [self._planned(key) for key in keys]
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.plan:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        self.main_dtype = max(sizes, key=lambda kind: sizes[kind])
        self.changed = 0
        self.delta_norm = 0.0

    def write(self, folder: Path, shards: Sequence[Sequence[PlannedTensor]], on_progress: OnProgress | None) -> None:
        """Write all weights.

        Raises:
            UserError: the disk is too small, or the adapter changes nothing.
        """
        total = sum(tensor.size for tensor in self.plan)
        free = shutil.disk_usage(folder).free
        if free < total:
            raise UserError(
                f"{folder.parent}: the merged model needs {size_text(total)} and only {size_text(free)} are free. "
                "Make room, or choose another disk or --dtype bfloat16."
            )
        planned = {tensor.key: tensor for tensor in self.plan}
        done = 0

        def count(tensor: PlannedTensor) -> None:
            nonlocal done
            done += tensor.size
            if on_progress:
                on_progress("merging", done, total)

        write_shards(folder, shards, lambda key: self._merged(key, planned[key].dtype), count)
        if not self.changed:
            raise UserError(
                f"{self._files.folder}: merging this adapter changes nothing"
                + (f" in {dtype_name(self.main_dtype)}" if self.main_dtype != torch.float32 else "")
                + ". Its weights are zero or too small: it was not trained, or needs --dtype float32."
            )

    def _merged(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        parameter = self._parameter_of.get(key)
        if parameter is None:
            return self.weights.read_key(key).to(dtype)
        base = self.weights.read(parameter)
        if parameter not in self._edits.parameters:
            return base.to(dtype)
        merged = self._edit(parameter, base)
        if not torch.equal(merged.to(dtype), base.to(dtype)):
            self.changed += 1
            self.delta_norm += (merged - base.float()).norm().item()
        return merged.to(dtype)

    def _edit(self, parameter: str, base: torch.Tensor) -> torch.Tensor:
        partner = self._edits.needs_bias(parameter)
        return self._edits.apply(parameter, base, self.weights.read(partner) if partner else None)

    def _final(self, parameter: str) -> torch.Tensor:
        base = self.weights.read(parameter)
        return self._edit(parameter, base) if parameter in self._edits.parameters else base.float()

    def _differ(self, target: str, source: str) -> bool:
        """Whether two tied parameters have come apart; without an edit they cannot."""
        if not {target, source} & self._edits.parameters:
            return False
        return not torch.equal(self._final(target), self._final(source))

    def _planned(self, key: str) -> PlannedTensor:
        parameter = self._parameter_of.get(key)
        shape, dtype = self.weights.stored_like(self.weights.key_of(parameter) if parameter else key)
        if dtype.is_floating_point and self._dtype is not None and not self.weights.in_float32(parameter or key):
            dtype = self._dtype
        return PlannedTensor(key, tuple(shape), dtype)

    def _check_places(self) -> None:
        """Every parameter that the adapter changes must be one tensor of the checkpoint."""
        for parameter in sorted(self._edits.parameters):
            partner = self._edits.needs_bias(parameter)
            for name in (parameter, partner) if partner else (parameter,):
                if name in self.weights.converted:
                    raise UserError(
                        f"{self._files.folder}: '{name}' is stored in another form in the base checkpoint than in the "
                        "model, so it cannot be merged file by file. Load the base with transformers, save it with "
                        "save_pretrained, and pass that folder as --base-model."
                    )
                if partner and not self.weights.holds(name):
                    raise UserError(
                        f"{self._files.folder}: lora_bias trained a bias for '{name.removesuffix('.bias')}', a layer "
                        "that has none, so it cannot be merged. Use the adapter unmerged."
                    )
                if not self.weights.holds(name):
                    raise UserError(
                        f"{self._files.folder}: the adapter changes '{name}', which the base checkpoint does not hold. "
                        "Name the base model that it was trained on."
                    )

    def _check_base_copies(self) -> None:
        """PEFT saves the base embeddings along with an adapter on them: they prove that the base is the same."""
        for parameter, copy in self._edits.base_copies.items():
            here = self.weights.read(parameter) if self.weights.holds(parameter) else torch.empty(0)
            if here.shape != copy.shape:
                raise UserError(
                    f"{self._files.folder}: the adapter comes with a '{parameter}' of {list(copy.shape)}, and the base "
                    f"model's is {list(here.shape)}: it was trained with a resized vocabulary. Save the base with the "
                    "vocabulary resized and pass that folder as --base-model."
                )
            if not self._edits.changes_base and not torch.equal(here.to(copy.dtype), copy):
                raise UserError(
                    f"{self._files.folder}: the '{parameter}' that the adapter was trained with differs from the base "
                    "model's. Name the base model that it was trained on."
                )
