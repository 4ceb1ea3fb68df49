"""Base models and adapters: names in, a model that can be trained out.

name --load_base_model--> causal LM --attach_adapter--> policy --prepare_for_training--> trainable policy
"""

from rrhf_peft.modeling.adapter import attach_adapter, attach_adapter_files, lora_config
from rrhf_peft.modeling.adapter_files import AdapterFiles, load_adapter_weights, read_adapter
from rrhf_peft.modeling.base_model import default_device, load_base_model, load_config, resolve_dtype
from rrhf_peft.modeling.checkpoint_files import checkpoint_tensors
from rrhf_peft.modeling.preparation import causal_lm, check_gradients, prepare_for_training
from rrhf_peft.modeling.quantization import (
    compute_in_float32,
    dequantized_weight,
    quantization_config,
    quantized_modules,
)
from rrhf_peft.modeling.sources import resolve_source
from rrhf_peft.modeling.tokenizer import load_tokenizer

__all__ = [
    "AdapterFiles",
    "attach_adapter",
    "attach_adapter_files",
    "causal_lm",
    "check_gradients",
    "checkpoint_tensors",
    "compute_in_float32",
    "default_device",
    "dequantized_weight",
    "load_adapter_weights",
    "load_base_model",
    "load_config",
    "load_tokenizer",
    "lora_config",
    "prepare_for_training",
    "quantization_config",
    "quantized_modules",
    "read_adapter",
    "resolve_dtype",
    "resolve_source",
]
