"""The base checkpoint's tensors read one at a time, and the merged ones written as shards in the same order.

`find_training_base` says which checkpoint an adapter was trained on and how training held it; `BaseWeights` reads it as
training held it or as it is on disk; `MergedWeights` plans and writes safetensors files with an index. One shard is in
memory at a time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from rrhf_peft.merge.adapter_edits import AdapterEdits
from rrhf_peft.modeling import (
    AdapterFiles,
    checkpoint_tensors,
    dequantized_weight,
    load_config,
    quantization_config,
    quantized_modules,
    resolve_dtype,
    resolve_source,
)
from rrhf_peft.modeling.base_model import DTYPES
from rrhf_peft.modeling.sources import INDEX_FILE, SINGLE_FILE
from rrhf_peft.progress import size_text
from rrhf_peft.recipe import Recipe, load_recipe
from rrhf_peft.records import UserError


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
    trust_remote_code: bool = False,
) -> TrainingBase:
    """Read it from the run's recipe.yaml, from the adapter's configuration, and from the arguments.

    A base model or quantisation given by the caller wins over what the files say. Whether the base's own code may run
    is for the caller alone to say: an adapter folder comes from anywhere, its recipe.yaml too.

    Raises:
        UserError: the base model is unknown or not to be found, or nothing says how it was quantised.
    """
    recipe = _recipe_of_run(files.folder)
    model = recipe.model if recipe else None
    if quantization is None and model is None:
        raise UserError(
            f"{files.folder}: there is no recipe.yaml of a run here, so nothing says how training held the base "
            "weights. Pass --quantization none, int8, nf4 or fp4."
        )
    name = base_model or files.config.base_model_name_or_path or (model.name if model else None)
    if not name:
        raise UserError(f"{files.folder}: neither adapter nor recipe names a base model. Pass --base-model.")
    revision = None if base_model else files.config.revision or (model.revision if model else None)
    try:
        folder = Path(resolve_source(name, revision=revision, weights=["model*.safetensors"]))
    except UserError as error:
        hint = "" if base_model else f" {files.folder} names it as its base; pass --base-model if it is elsewhere now."
        raise UserError(f"{error}{hint}") from None
    return TrainingBase(
        name=name,
        folder=folder,
        quantization=quantization or (model.quantization if model else "none"),
        double_quant=double_quant if double_quant is not None else (model.double_quant if model else True),
        dtype=resolve_dtype(model.dtype if model else "auto"),
        trust_remote_code=trust_remote_code,
    )


def run_folders(adapter: Path) -> list[Path]:
    """Where a run keeps what belongs to its adapter, nearest first: `checkpoint-N` lies in the run folder."""
    folders = [adapter]
    if re.fullmatch(r"checkpoint-\d+", adapter.resolve().name):
        folders.append(adapter.resolve().parent)
    return folders


def _recipe_of_run(adapter: Path) -> Recipe | None:
    for folder in run_folders(adapter):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")
    return None


class BaseWeights:
    """Random access to a checkpoint by parameter name, in the memory of one tensor.

    Attributes:
        model: The model on the meta device: names and shapes, no values.
        keys: Tensor names on disk, in file order.
        parameter_of: Tensor name on disk -> parameter name, for tensors that are one parameter as they are.
        converted: Parameters that transformers builds from several tensors on disk, or from a changed one.
        quantized: Modules whose weights were quantised in training, when those are asked for.
    """

    def __init__(self, base: TrainingBase, config: PretrainedConfig, *, as_trained: bool) -> None:
        """Open a checkpoint; `as_trained` gives its weights after training's cast and quantisation."""
        self._files = checkpoint_tensors(base.folder)
        self._open: tuple[Path, Any] | None = None
        self._dtype = base.dtype if as_trained else None
        self.model = _without_weights(config, base)
        self.keys = list(self._files)
        self.parameter_of: dict[str, str] = {}
        self.converted: set[str] = set()
        self._map_names()
        self._key_of = {parameter: key for key, parameter in self.parameter_of.items()}
        self._link_tied()
        self._float32 = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        self._quantizer: Any = None
        self.quantized: set[str] = set()
        if as_trained and base.quantization != "none":
            self._prepare_quantizer(base, config)

    def read(self, parameter: str) -> torch.Tensor:
        """A parameter's value as `as_trained` asks for it; quantised ones are multiplied out in float32."""
        tensor = self._as_loaded(self.read_stored(self._key_of[parameter]), parameter)
        module, _, kind = parameter.rpartition(".")
        if kind == "weight" and module in self.quantized:
            return self._through_quantization(module, tensor)
        return tensor

    def read_key(self, key: str) -> torch.Tensor:
        """The tensor of that name on disk, as `as_trained` asks for it."""
        parameter = self.parameter_of.get(key)
        return self.read(parameter) if parameter else self._as_loaded(self.read_stored(key), key)

    def read_stored(self, key: str) -> torch.Tensor:
        """The tensor of that name exactly as it is on disk."""
        return self._handle(self._files[key]).get_tensor(key)

    def stored_like(self, key: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype on disk, without reading the values."""
        piece = self._handle(self._files[key]).get_slice(key)
        return list(piece.get_shape()), _SAFETENSORS_DTYPES[piece.get_dtype()]

    def holds(self, parameter: str) -> bool:
        """Whether the checkpoint has a value for a parameter, under its own name or a tied one's."""
        return parameter in self._key_of

    def key_of(self, parameter: str) -> str:
        """The tensor on disk that a parameter is read from."""
        return self._key_of[parameter]

    def in_float32(self, name: str) -> bool:
        """Whether the architecture insists on float32 for this tensor."""
        return any(part in name for part in self._float32)

    def _as_loaded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if self._dtype is None or not tensor.is_floating_point() or self.in_float32(name):
            return tensor
        return tensor.to(self._dtype)

    def _map_names(self) -> None:
        """Follow transformers' own rules from names on disk to parameter names."""
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        for key in self.keys:
            name, converter = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, converter = key, None
            if converter is not None:
                self.converted.add(name)
            elif name in state:
                self.parameter_of[key] = name

    def _link_tied(self) -> None:
        """A tied parameter that is not on disk has the value of the one that is."""
        for target, source in self.model.all_tied_weights_keys.items():
            if target in self._key_of:
                self._key_of.setdefault(source, self._key_of[target])
            elif source in self._key_of:
                self._key_of[target] = self._key_of[source]

    def _prepare_quantizer(self, base: TrainingBase, config: PretrainedConfig) -> None:
        """Let transformers choose the modules and their settings as it does when it loads the model."""
        settings = quantization_config(base.quantization, double_quant=base.double_quant)
        assert settings is not None
        self._quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        self._quantized_model = _without_weights(config, base)
        self._quantizer.preprocess_model(model=self._quantized_model, dtype=base.dtype, device_map={"": "cpu"})
        self.quantized = quantized_modules(self._quantized_model)

    def _through_quantization(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        parameter = f"{name}.weight"
        operation = self._quantizer.get_quantize_ops()
        quantized = operation.convert({parameter: [weight]}, full_layer_name=parameter, model=self._quantized_model)
        layer: Any = self._quantized_model.get_submodule(name)
        placeholder = layer.weight
        layer.weight = quantized[parameter]
        try:
            result = dequantized_weight(layer)
        finally:
            layer.weight = placeholder
            if isinstance(layer, Linear4bit):
                layer.quant_state = None
        # bitsandbytes holds GPT-2's transposed layers the ordinary way round.
        return result.T.contiguous() if issubclass(layer.source_cls, Conv1D) else result

    def _handle(self, path: Path) -> Any:
        """An open file; only the last one is kept, and it is read rather than mapped, to bound the memory."""
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt", device="cpu", backend="pread"))
        return self._open[1]


def _without_weights(config: PretrainedConfig, base: TrainingBase) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=base.dtype, trust_remote_code=base.trust_remote_code)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# ---- Merged, in shards ----

#: Called with what is being done, bytes done, and bytes in all (0 when that is not known).
OnProgress = Callable[[str, int, int], None]

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
