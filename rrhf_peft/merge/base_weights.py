"""The base model that an adapter was trained on, and its weights one tensor at a time.

`find_training_base` says which checkpoint it is and how training held it; `BaseWeights` reads it, as training held it
or as it is on disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from rrhf_peft.modeling import (
    AdapterFiles,
    checkpoint_tensors,
    dequantized_weight,
    quantization_config,
    quantized_modules,
    resolve_dtype,
    resolve_source,
)
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
