"""Checkpointing that keeps the gradients, and the proof that something is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from rrhf_peft.modeling import attach_adapter, causal_lm, check_gradients, load_base_model, prepare_for_training
from rrhf_peft.records import UserError

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_checkpointing_gives_the_same_gradients(tiny_model_folder: Path, quantization: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = attach_adapter(load_base_model(tiny_model_folder, quantization=quantization), {"r": 4})
        prepare_for_training(policy, gradient_checkpointing=checkpointing)
        language_model = causal_lm(policy)
        layers = [module for module in language_model.modules() if hasattr(module, "gradient_checkpointing")]
        assert {layer.gradient_checkpointing for layer in layers} == {checkpointing}
        assert language_model.config.use_cache is False
        assert policy.training
        output = policy(input_ids=IDS, labels=IDS)
        assert output.past_key_values is None
        output.loss.backward()
        check_gradients(policy)
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, atol=1e-7), name


def test_the_model_keeps_its_dtypes(tiny_model_folder: Path) -> None:
    policy = attach_adapter(load_base_model(tiny_model_folder, dtype="bfloat16", quantization="nf4"), {"r": 4})
    prepare_for_training(policy, gradient_checkpointing=True)
    language_model = causal_lm(policy)
    for module in (language_model.lm_head, language_model.model.embed_tokens, language_model.model.norm):
        assert module.weight.dtype == torch.bfloat16


def test_a_frozen_model_is_an_error(tiny_model_folder: Path) -> None:
    model = load_base_model(tiny_model_folder).requires_grad_(False)
    with pytest.raises(UserError, match="no weight of this model is trainable"):
        prepare_for_training(model, gradient_checkpointing=False)


def test_gradients_that_are_missing_zero_or_broken_are_errors() -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match="are missing"):
        check_gradients(model)
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(UserError, match=r"all 2 trainable tensors .'weight', 'bias'.* are all zero"):
        check_gradients(model)
    model.bias.grad[1] = 1e-20
    check_gradients(model)
    for value in (float("nan"), float("inf")):
        model.weight.grad[0, 0] = value
        with pytest.raises(UserError, match="the gradient of 'weight' is not finite"):
            check_gradients(model)
    with pytest.raises(UserError, match="there are none"):
        check_gradients(torch.nn.Linear(3, 2).requires_grad_(False))


def test_sharded_gradients_are_judged(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = torch.nn.Linear(3, 2, bias=False)
        model.weight = torch.nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]))
        model.weight.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
        check_gradients(model)
        model.weight.grad = DTensor.from_local(torch.full((2, 3), float("nan")), mesh, [Shard(0)])
        with pytest.raises(UserError, match="not finite"):
            check_gradients(model)
    finally:
        dist.destroy_process_group()
