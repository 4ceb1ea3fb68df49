"""The streamed base weights are, bit for bit, those that a loaded model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, Phi3Config
from transformers.pytorch_utils import Conv1D

from rrhf_peft.merge.weights import BaseWeights, TrainingBase
from rrhf_peft.modeling import dequantized_weight, load_base_model, load_config, quantized_modules

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OPT = {key: value for key, value in SMALL.items() if key not in ("intermediate_size", "num_key_value_heads")}


def _assert_same(folder: Path, quantization: str, dtype: torch.dtype, double_quant: bool = True) -> None:
    model = load_base_model(folder, quantization=quantization, dtype=dtype, double_quant=double_quant)
    base = TrainingBase(str(folder), folder, quantization, double_quant, dtype, trust_remote_code=False)
    weights = BaseWeights(base, load_config(str(folder)), as_trained=True)
    assert weights.quantized == quantized_modules(model)
    compared = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if name in weights.converted:
            continue
        found = weights.read(name)
        if module in weights.quantized and kind == "weight":
            layer: Any = model.get_submodule(module)
            expected = dequantized_weight(layer)
            expected = expected.T if issubclass(layer.source_cls, Conv1D) else expected
        else:
            expected = parameter.detach()
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
        compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    ("quantization", "dtype", "double_quant"),
    [
        ("nf4", torch.float32, True),
        ("nf4", torch.bfloat16, False),
        ("fp4", torch.bfloat16, True),
        ("fp4", torch.float16, False),
        ("int8", torch.float32, True),
        ("int8", torch.bfloat16, True),
        ("none", torch.bfloat16, True),
    ],
)
def test_every_precision_is_read_as_it_is_loaded(
    tiny_model_folder: Path, quantization: str, dtype: torch.dtype, double_quant: bool
) -> None:
    _assert_same(tiny_model_folder, quantization, dtype, double_quant)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        LlamaConfig(**{**SMALL, "hidden_size": 72, "intermediate_size": 90}, mlp_bias=True),
        GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=128),
        Phi3Config(**SMALL, pad_token_id=0),
        OPTConfig(**OPT, ffn_dim=96, word_embed_proj_dim=64),
        MixtralConfig(**SMALL, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_every_architecture_is_read_as_it_is_loaded(make_base: Callable[..., Path], config: Any) -> None:
    folder = make_base(config, max_shard_size="100KB")
    _assert_same(folder, "nf4", torch.bfloat16)
    _assert_same(folder, "none", torch.float32)


def test_original_weights_are_those_on_disk(tiny_model_folder: Path) -> None:
    base = TrainingBase("", tiny_model_folder, "nf4", True, torch.bfloat16, trust_remote_code=False)
    weights = BaseWeights(base, load_config(str(tiny_model_folder)), as_trained=False)
    assert not weights.quantized
    for name, parameter in load_base_model(tiny_model_folder).named_parameters():
        assert torch.equal(weights.read(name), parameter)


def test_a_real_tied_checkpoint_is_read_by_both_names(tinystories: Path) -> None:
    base = TrainingBase("", tinystories, "none", True, torch.float32, trust_remote_code=False)
    weights = BaseWeights(base, load_config(str(tinystories)), as_trained=True)
    assert "model.embed_tokens.weight" not in weights.keys  # the file has it as lm_head only
    assert torch.equal(weights.read("model.embed_tokens.weight"), weights.read("lm_head.weight"))
    assert weights.key_of("model.embed_tokens.weight") == "lm_head.weight"
