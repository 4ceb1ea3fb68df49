"""How bitsandbytes stores the frozen base, and how its weights are read back.

What was found on a CPU with bitsandbytes 0.50: NF4, FP4 and int8 load, run forward and backward there.
int8 rounds the activations as well (LLM.int8), in float16 whatever the model's dtype.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from rrhf_peft.records import UserError


def _silence(logger: str, text: str) -> None:
    """Drop one log message that tells the user nothing they could act on."""
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())


# Said on import: the optional kernel computes in bfloat16 on CPUs, which `keep_quantized_layout` avoids.
_silence("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
# Said by every layer in every step; it is how int8 works, and the recipe asked for it.
_silence("bitsandbytes.autograd._functions", "inputs will be cast from")

import bitsandbytes as bnb  # noqa: E402 - the filter above has to stand first
from transformers import BitsAndBytesConfig, PreTrainedModel  # noqa: E402

QUANTIZATIONS = ("none", "int8", "nf4", "fp4")


def quantization_config(
    quantization: str,
    *,
    double_quant: bool = True,
    device_type: str = "cpu",
    storage: torch.dtype = torch.uint8,
) -> BitsAndBytesConfig | None:
    """The transformers configuration for `none | int8 | nf4 | fp4`; None for `none`.

    Args:
        quantization: How the frozen base is stored.
        double_quant: Quantise the 4-bit blocks' scales as well; int8 has no such thing.
        device_type: "cuda" computes 4-bit products in bfloat16 (float16 where the GPU has none), the
            rest in float32.
        storage: Type that 4-bit values are packed into. FSDP shards only weights whose storage type is
            the model's own dtype. Changes no value.
    """
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization not in QUANTIZATIONS:
        raise UserError(f"model.quantization: {quantization!r} is not one of {', '.join(QUANTIZATIONS)}.")
    compute = torch.float32
    if device_type == "cuda":
        compute = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
    )


def keep_quantized_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place when a CPU model first runs in eval mode.

    On CPUs with AVX512-BF16 that one-way step makes later training passes lose every gradient, rounds
    the block scales to bfloat16, and leaves weights that no longer dequantise. Without it, training and
    evaluation compute the same.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantized_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules whose weights bitsandbytes holds."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [out, in] that a linear layer multiplies with, whatever it is stored in.

    4-bit weights are multiplied out in float32, as the CPU forward does, and not first rounded to the
    dtype that the checkpoint was loaded in.

    Args:
        module: bitsandbytes `Linear4bit` or `Linear8bitLt`, or an ordinary linear layer.
        dtype: Type of the result.
    """
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(weight.data, state).to(dtype)
    if isinstance(module, bnb.nn.Linear8bitLt):
        # The first forward moves the scales from the weight to the layer's state.
        scales: Any = weight.SCB if weight.SCB is not None else module.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    assert isinstance(weight, torch.Tensor), type(module)
    return weight.detach().to(dtype)


def compute_in_float32(model: nn.Module) -> None:
    """Make a model compute in float32 with the weights that it has, quantised ones included."""
    model.float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight: Any = module.weight
            # DoRA takes the norms of weights that were multiplied out in this dtype.
            weight.quant_state.dtype = torch.float32
            module.compute_dtype = torch.float32
