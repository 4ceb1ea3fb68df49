"""The pass without data against the engine's real forward and backward pass, allocation by allocation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rrhf_peft.logprobs import install
from rrhf_peft.modeling import attach_adapter, prepare_for_training
from rrhf_peft.plan.activations import _LiveBytes, head_bytes, pass_bytes

LAYERS, HIDDEN, VOCABULARY = 4, 128, 512


def llama(device: str, checkpointing: bool, adapter: dict[str, Any] | None) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=344,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = attach_adapter(model, adapter)
    prepare_for_training(model, gradient_checkpointing=checkpointing)
    return model


def one_group(prompt: int, responses: int, length: int) -> dict[str, torch.Tensor]:
    return {
        "prompt_lengths": torch.tensor([prompt]),
        "response_lengths": torch.full((responses,), length),
        "group": torch.zeros(responses, dtype=torch.long),
        "input_ids": torch.randint(3, VOCABULARY, (prompt + responses * length,)),
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", [{}, {"r": 4, "target_modules": ["q_proj"]}, None], ids=["lora", "small", "all"])
def test_the_planned_pass_is_the_engines_pass(checkpointing: bool, adapter: dict[str, Any] | None) -> None:
    batch = one_group(prompt=64, responses=4, length=48)
    width = len(batch["input_ids"])
    real = llama("cpu", checkpointing, adapter)
    engine = install(real, layout="shared", chunk_tokens=width)
    for weight in real.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    gradients = [weight.grad for weight in real.parameters() if weight.grad is not None]
    with _LiveBytes([*real.parameters(), *real.buffers(), *gradients, *batch.values()]) as live:
        log_probs = engine.log_probs(real, batch)
        kept = live.now
        log_probs.sum.sum().backward()

    planned = pass_bytes(llama("meta", checkpointing, adapter), rows=1, width=width, shared=True)
    head = head_bytes(width, VOCABULARY, HIDDEN, size=4, on_cpu=True, trained=adapter is None)
    assert planned.kept == pytest.approx(kept, rel=0.1)
    peak = planned.kept + max(planned.peak - planned.kept, head)
    assert live.peak <= 1.02 * peak  # never more than was promised
    assert live.peak >= 0.75 * peak


def test_recomputing_layers_keeps_little_more_than_their_inputs() -> None:
    kept = pass_bytes(llama("meta", False, {}), rows=1, width=256, shared=True).kept
    recomputed = pass_bytes(llama("meta", True, {}), rows=1, width=256, shared=True).kept
    inputs = LAYERS * 256 * HIDDEN * 4
    assert inputs < recomputed < inputs + 256 * 256 * 8 + 8 * 256 * HIDDEN * 4
    assert recomputed < kept / 4


def test_nothing_of_a_pass_outlives_it_and_the_model_is_as_before() -> None:
    model = llama("meta", False, {})
    first = pass_bytes(model, rows=1, width=128, shared=True)
    assert pass_bytes(model, rows=1, width=128, shared=True) == first
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_in_float32_copies_the_inputs_of_16_bit_layers() -> None:
    model = llama("meta", False, {}).to(torch.bfloat16)
    plain = pass_bytes(model, rows=1, width=128, shared=True)
    cast = pass_bytes(model, rows=1, width=128, shared=True, casts=True)
    per_layer = 128 * 2 * (5 * HIDDEN)  # q, k, v, gate and up each keep a copy; o and down had their input alone
    assert cast.kept - plain.kept >= LAYERS * (per_layer - 2 * 128 * 2 * HIDDEN)
