"""Base models and adapters: a recipe's `model:` section in, a model that can be trained or asked out.

`model:` --tokenizer_of, base_of--> tokenizer, causal LM --attach_adapter--> policy --prepare_for_training--> trained
`model:` --load_policy--> frozen policy with its adapter, tokenizer
"""

from rrhf_peft.modeling.adapter import (
    AdapterFiles,
    attach_adapter,
    attach_adapter_files,
    load_adapter_weights,
    lora_config,
    read_adapter,
)
from rrhf_peft.modeling.base_model import (
    TokenBudget,
    compute_in_float32,
    default_device,
    dequantized_weight,
    load_base_model,
    load_config,
    quantization_config,
    quantized_modules,
    resolve_dtype,
)
from rrhf_peft.modeling.policy import (
    base_of,
    causal_lm,
    check_gradients,
    load_policy,
    load_tokenizer,
    prepare_for_training,
    refuse_beyond_context,
    refuse_unknown_tokens,
    tokenizer_of,
    uses_checkpointing,
)
from rrhf_peft.modeling.sources import checkpoint_tensors, resolve_source, weights_fingerprint

__all__ = [
    "AdapterFiles",
    "TokenBudget",
    "attach_adapter",
    "attach_adapter_files",
    "base_of",
    "causal_lm",
    "check_gradients",
    "checkpoint_tensors",
    "compute_in_float32",
    "default_device",
    "dequantized_weight",
    "load_adapter_weights",
    "load_base_model",
    "load_config",
    "load_policy",
    "load_tokenizer",
    "lora_config",
    "prepare_for_training",
    "quantization_config",
    "quantized_modules",
    "read_adapter",
    "refuse_beyond_context",
    "refuse_unknown_tokens",
    "resolve_dtype",
    "resolve_source",
    "tokenizer_of",
    "uses_checkpointing",
    "weights_fingerprint",
]
