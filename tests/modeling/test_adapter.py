"""Adapters: defaults, variants, resuming, and every way in which they can fail to fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from rrhf_peft.modeling import attach_adapter, causal_lm, load_base_model, prepare_for_training
from rrhf_peft.records import UserError

IDS = torch.arange(3, 43).reshape(2, 20)


def _trained(folder: Path, fields: dict[str, Any], **load: Any) -> PeftModel:
    """An adapter whose every weight differs from its initial value."""
    policy = attach_adapter(load_base_model(folder, **load), fields)
    assert isinstance(policy, PeftModel)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy.eval()


def test_an_empty_section_is_lora_on_all_linear_layers(tiny_model_folder: Path) -> None:
    policy = attach_adapter(load_base_model(tiny_model_folder), {})
    assert isinstance(policy, PeftModel)
    config = policy.peft_config["default"]
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.0)
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in policy.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_no_adapter_trains_all_weights(tiny_model_folder: Path) -> None:
    model = attach_adapter(load_base_model(tiny_model_folder), None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="quantised ones cannot"):
        attach_adapter(load_base_model(tiny_model_folder, quantization="nf4"), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 64}},
        {"trainable_token_indices": [3, 5]},
    ],
)
def test_variants_train_and_come_back_as_they_were_saved(
    tiny_model_folder: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    policy = _trained(tiny_model_folder, {"r": 4, **fields})
    policy.save_pretrained(tmp_path)
    again = attach_adapter(load_base_model(tiny_model_folder), None, init_adapter=tmp_path).eval()
    with torch.no_grad():
        base = load_base_model(tiny_model_folder)(input_ids=IDS).logits
        logits = policy(input_ids=IDS).logits
        assert (logits - base).abs().max() > 1e-3
        assert torch.allclose(again(input_ids=IDS).logits, logits, atol=1e-5)
    prepare_for_training(again, gradient_checkpointing=True)
    again(input_ids=IDS, labels=IDS).loss.backward()
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trainable
    assert any(parameter.grad is not None for parameter in again.parameters())


def test_adapter_weights_are_float32_on_a_bfloat16_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    policy = _trained(tiny_model_folder, {"r": 4}, dtype="bfloat16")
    policy.save_pretrained(tmp_path)
    again = attach_adapter(load_base_model(tiny_model_folder, dtype="bfloat16"), None, init_adapter=tmp_path)
    for model in (policy, again):
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4}, "adapter: .*rank"),
        ({"r": 0}, "adapter.r: must be above zero"),
        ({"lora_alpha": 0}, "adapter.lora_alpha: must be above zero"),
        ({"lora_dropout": 1.5}, "adapter: PEFT cannot make"),
        ({"target_modules": ["qproj"]}, "qproj.*Linear layers.*q_proj"),
        ({"target_modules": ["q_proj", "vproj"]}, "target_modules 'vproj' matches no module"),
        ({"modules_to_save": ["head"]}, "modules_to_save 'head' matches no module"),
        ({"init_lora_weights": "zork"}, "adapter: .*zork"),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot be repeated"),
        ({"init_lora_weights": "eva"}, "a pass over the data"),
        ({"use_qalora": True}, "adapter.use_qalora: not available"),
        ({"alora_invocation_tokens": [1]}, "adapter.alora_invocation_tokens: not available"),
    ],
)
def test_impossible_fields_are_named(tiny_model_folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        attach_adapter(load_base_model(tiny_model_folder), fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_initialisations_that_change_the_base_refuse_a_quantised_one(
    tiny_model_folder: Path, quantization: str, init: str
) -> None:
    with pytest.raises(UserError, match="takes a part out of the base weights"):
        attach_adapter(load_base_model(tiny_model_folder, quantization=quantization), {"init_lora_weights": init})


def test_block_diagonal_adapters_refuse_a_quantised_base(tiny_model_folder: Path) -> None:
    blocks = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    with pytest.raises(UserError, match="ignores use_bdlora"):
        attach_adapter(load_base_model(tiny_model_folder, quantization="nf4"), {"use_bdlora": blocks})


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_loftq_without_a_gpu_is_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="loftq on a GPU only"):
        attach_adapter(load_base_model(tiny_model_folder), {"init_lora_weights": "loftq"})


@pytest.fixture
def adapter_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    _trained(tiny_model_folder, {"r": 4, "target_modules": ["q_proj", "v_proj"]}).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return damage


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "truncated"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "it is empty"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "weights are missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not a usable adapter configuration"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"holds no adapter_config\.json"),
        (_rewrite(lambda weights: weights.clear()), "holds no tensors"),
        (_rewrite(lambda weights: weights.update({FIRST: torch.zeros(0)})), "has size zero"),
        (_rewrite(lambda weights: weights.update({FIRST: weights[FIRST] / 0})), "not finite"),
        (_rewrite(lambda weights: weights.pop(FIRST)), "lacks '.*layers.0.self_attn.q_proj.lora_A"),
        (
            _rewrite(lambda weights: weights.update({FIRST.replace(".0.", ".9."): weights[FIRST].clone()})),
            "no place for",
        ),
        (_rewrite(lambda weights: weights.update({FIRST: torch.zeros(4, 32)})), "size mismatch.*q_proj"),
    ],
)
def test_a_damaged_adapter_is_named(
    tiny_model_folder: Path, adapter_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(adapter_folder)
    with pytest.raises(UserError, match=message) as caught:
        attach_adapter(load_base_model(tiny_model_folder), None, init_adapter=adapter_folder)
    assert str(adapter_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(tiny_model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "another-llama"
    shutil.copytree(tiny_model_folder, other)
    with pytest.raises(UserError, match=r"was trained on .*tiny-llama.*, and the base model is .*another-llama"):
        attach_adapter(load_base_model(other), None, init_adapter=adapter_folder)


def test_an_adapter_of_another_method_is_refused(tiny_model_folder: Path, adapter_folder: Path) -> None:
    path = adapter_folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))
    with pytest.raises(UserError, match="IA3 adapter"):
        attach_adapter(load_base_model(tiny_model_folder), None, init_adapter=adapter_folder)


def test_causal_lm_is_the_transformers_model(tiny_model_folder: Path) -> None:
    model = load_base_model(tiny_model_folder)
    assert causal_lm(model) is model
    assert causal_lm(attach_adapter(model, {"r": 4})) is model
