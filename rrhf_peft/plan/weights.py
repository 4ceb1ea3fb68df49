"""How many bytes the base model, the adapter and the optimizer take, from shapes alone: nothing is loaded.

The model is built on torch's meta device, which has shapes and no data. Of the optimizers, by the names that
`training.optim` gives them, only those whose arithmetic has been compared with the real ones stand here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from rrhf_peft.modeling import attach_adapter, quantization_config, quantized_modules, read_adapter

#: Values that share a scale in bitsandbytes' 4-bit formats, and scales that share one when quantised again.
BLOCK, SCALES_BLOCK = 64, 256


@dataclass(frozen=True)
class Weights:
    """The trainable model in shapes, and what its parts take.

    Attributes:
        model: causal LM or PeftModel on the meta device; quantised layers stand there unquantised.
        stored: storage ("nf4", "bfloat16" ...) -> bytes of the base, scales and buffers included.
        adapter: bytes of the adapter; 0 when all weights are trained.
        trainable: (values, bytes each, shape) of every trained tensor.
        parameters: values of the base model.
        largest_quantized: values in the largest quantised layer; 0 when nothing is quantised.
    """

    model: Any
    stored: dict[str, int]
    adapter: int
    trainable: list[tuple[int, int, tuple[int, ...]]]
    parameters: int
    largest_quantized: int


def shaped_weights(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    quantization: str = "none",
    double_quant: bool = True,
    attention: str = "sdpa",
    adapter: Mapping[str, Any] | None = None,
    init_adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Weights:
    """Build the model that a recipe describes without its data, and count it.

    Args:
        config: the base model's configuration.
        dtype: of the unquantised weights.
        quantization: none, int8, nf4 or fp4.
        double_quant: quantise the 4-bit blocks' scales as well.
        attention: transformers' name of an attention implementation.
        adapter: LoraConfig fields; None with no `init_adapter` trains all weights.
        init_adapter: an adapter to train further.
        trust_remote_code: run model code that comes with the weights.
    """
    quantized = _quantized_names(config, quantization, double_quant, trust_remote_code)
    model = _on_meta(config, dtype, attention, trust_remote_code)
    if adapter is None and init_adapter is None:
        model = attach_adapter(model, None)  # what is trained is float32, and counted so
    stored: dict[str, int] = {}
    largest = 0
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            stored[quantization] = stored.get(quantization, 0) + quantized_bytes(
                tuple(parameter.shape), quantization, double_quant
            )
            largest = max(largest, parameter.numel())
        else:
            _add(stored, parameter)
    for buffer in model.buffers():
        _add(stored, buffer)
    base = {id(parameter): parameter.numel() for parameter in model.parameters()}
    trained = _with_adapter(model, adapter, init_adapter)
    new = [parameter for parameter in trained.parameters() if id(parameter) not in base]
    return Weights(
        model=trained,
        stored=stored,
        adapter=sum(parameter.numel() * parameter.element_size() for parameter in new),
        trainable=[
            (parameter.numel(), parameter.element_size(), tuple(parameter.shape))
            for parameter in trained.parameters()
            if parameter.requires_grad
        ],
        parameters=sum(base.values()),
        largest_quantized=largest,
    )


def quantized_bytes(shape: tuple[int, ...], quantization: str, double_quant: bool) -> int:
    """Bytes of one linear layer's weight [out, in] in a bitsandbytes format, scales and code tables included."""
    values = math.prod(shape)
    if quantization == "int8":
        return values + 4 * shape[0]  # a float32 scale per row
    blocks = math.ceil(values / BLOCK)
    packed, table = math.ceil(values / 2), 16 * 4
    if not double_quant:
        return packed + 4 * blocks + table
    scales = blocks + 4 * math.ceil(blocks / SCALES_BLOCK)  # int8, and float32 scales of these
    return packed + scales + table + 256 * 4 + 4  # the scales' own table and their mean


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )


def _quantized_names(config: PretrainedConfig, quantization: str, double_quant: bool, remote: bool) -> set[str]:
    """The layers that transformers would hand to bitsandbytes; it leaves out the head, for one."""
    settings = quantization_config(quantization, double_quant=double_quant)
    if settings is None:
        return set()
    model = _on_meta(config, torch.float32, "sdpa", remote)
    AutoHfQuantizer.from_config(settings).preprocess_model(model, device_map=None)
    return quantized_modules(model)


def _with_adapter(model: Any, adapter: Mapping[str, Any] | None, init_adapter: str | None) -> Any:
    if init_adapter is None:
        # Other initialisations look at the weights, and change no shape.
        return attach_adapter(model, None if adapter is None else {**adapter, "init_lora_weights": True})
    settings = read_adapter(init_adapter).config
    settings.inference_mode, settings.init_lora_weights = False, True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return get_peft_model(model, settings)


def _add(stored: dict[str, int], tensor: torch.Tensor) -> None:
    name = str(tensor.dtype).removeprefix("torch.")
    stored[name] = stored.get(name, 0) + tensor.numel() * tensor.element_size()


#: Values that share a scale in bitsandbytes' 8-bit states, and the tensor size below which they stay 32-bit.
OPTIMIZER_BLOCK, SMALLEST_8BIT = 256, 4096


@dataclass(frozen=True)
class _Kind:
    """moments: tensors of the parameter's size. bits: 8, 32, or None for the parameter's own type."""

    moments: int
    bits: int | None = None
    paged: bool = False


OPTIMIZERS = {
    "adamw_torch": _Kind(2),
    "adamw_torch_fused": _Kind(2),
    "sgd": _Kind(0),
    "adagrad": _Kind(1),
    "rmsprop": _Kind(1),
    "adamw_bnb_8bit": _Kind(2, 8),
    "adamw_8bit": _Kind(2, 8),
    "lion_8bit": _Kind(1, 8),
    "lion_32bit": _Kind(1, 32),
    "ademamix": _Kind(3, 32),
    "ademamix_8bit": _Kind(3, 8),
    "rmsprop_bnb": _Kind(1, 32),
    "rmsprop_bnb_32bit": _Kind(1, 32),
    "rmsprop_bnb_8bit": _Kind(1, 8),
    "paged_adamw_32bit": _Kind(2, 32, paged=True),
    "paged_adamw_8bit": _Kind(2, 8, paged=True),
    "paged_lion_32bit": _Kind(1, 32, paged=True),
    "paged_lion_8bit": _Kind(1, 8, paged=True),
    "paged_ademamix_32bit": _Kind(3, 32, paged=True),
    "paged_ademamix_8bit": _Kind(3, 8, paged=True),
}


def optimizer_bytes(name: str, trainable: Sequence[tuple[int, int, tuple[int, ...]]]) -> int | None:
    """Bytes of the optimizer's state after its first step, or None for an optimizer that is not known here.

    Args:
        name: as in `training.optim`.
        trainable: (values, bytes each, shape) of every trained tensor.
    """
    if name == "adafactor":
        return sum(_adafactor(shape) for _, _, shape in trainable)
    kind = OPTIMIZERS.get(name)
    if kind is None:
        return None
    return sum(kind.moments * _moment(kind.bits, values, size) for values, size, _ in trainable)


def is_paged(name: str) -> bool:
    """Whether the state lives in host memory and visits the GPU page by page."""
    return name in OPTIMIZERS and OPTIMIZERS[name].paged


def step_bytes(name: str, trainable: Sequence[tuple[int, int, tuple[int, ...]]]) -> int:
    """Temporary bytes of the update itself: torch's unfused AdamW works on all tensors at once."""
    return sum(values * size for values, size, _ in trainable) if name == "adamw_torch" else 0


def _moment(bits: int | None, values: int, size: int) -> int:
    if bits is None:
        return values * size
    if bits == 32 or values < SMALLEST_8BIT:
        return 4 * values
    return values + 4 * math.ceil(values / OPTIMIZER_BLOCK)


def _adafactor(shape: tuple[int, ...]) -> int:
    """A row and a column of squares for a matrix, all of them for a vector; and one running size."""
    if len(shape) < 2:
        return 4 * math.prod(shape) + 4
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]) + 4
