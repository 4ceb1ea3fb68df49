"""Loading base models: precisions, devices, and everything that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from rrhf_peft.modeling import (
    attach_adapter,
    dequantized_weight,
    load_base_model,
    prepare_for_training,
    quantized_modules,
)
from rrhf_peft.records import UserError

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_every_precision_loads_runs_and_trains(tiny_model_folder: Path, quantization: str, dtype: str) -> None:
    exact = load_base_model(tiny_model_folder, dtype="float32")(input_ids=IDS).logits
    model = load_base_model(tiny_model_folder, quantization=quantization, dtype=dtype)
    assert len(quantized_modules(model)) == (0 if quantization == "none" else 14)
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    policy = attach_adapter(model, {"r": 4})
    prepare_for_training(policy, gradient_checkpointing=False)
    output = policy(input_ids=IDS, labels=IDS)
    tolerance = {"none": 1e-6, "int8": 0.03, "nf4": 0.25, "fp4": 0.35}[quantization] + (dtype == "bfloat16") * 0.03
    assert (output.logits.float() - exact).abs().max() < tolerance * exact.abs().max()
    output.loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
            assert ("lora_B" in name) == bool(parameter.grad.abs().max() > 0)


def test_auto_dtype_is_float32_on_cpu(tiny_model_folder: Path) -> None:
    assert load_base_model(tiny_model_folder, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_evaluating_leaves_4bit_weights_trainable(tiny_model_folder: Path, quantization: str) -> None:
    model = load_base_model(tiny_model_folder, quantization=quantization)
    layer = model.model.layers[0].mlp.up_proj
    packed, weight = layer.weight.data.clone(), dequantized_weight(layer)
    policy = attach_adapter(model, {"r": 4})
    policy.train()
    training_logits = policy(input_ids=IDS).logits.detach()
    policy.eval()
    with torch.no_grad():
        assert torch.equal(policy(input_ids=IDS).logits, training_logits)
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(dequantized_weight(layer), weight)
    policy.train()
    policy(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_dequantized_weight_is_what_the_layer_multiplies_with(tiny_model_folder: Path, quantization: str) -> None:
    model = load_base_model(tiny_model_folder, quantization=quantization)
    layer = model.model.layers[1].mlp.down_proj
    weight = dequantized_weight(layer)
    assert weight.shape == (layer.out_features, layer.in_features)
    unit = torch.eye(layer.in_features)
    with torch.no_grad():
        product = layer(unit).T
    assert (product - weight).abs().max() < (2e-3 if quantization == "int8" else 1e-7)
    assert torch.equal(dequantized_weight(layer), weight)  # int8 moves its scales in the first forward


def test_4bit_weights_of_odd_widths_dequantise_as_they_multiply() -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(37, 24, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert (layer(torch.eye(37)).T - dequantized_weight(layer)).abs().max() < 1e-7


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _as_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_weights, r"model\.safetensors: this weight file cannot be read \(it is truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"cannot be read \(it is empty\)"),
        (_pointer, "git lfs pull"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights here"),
        (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{oops"), r"config\.json cannot be used"),
        (_edit_config(model_type="zork"), r"config\.json cannot be used .*zork"),
        (_edit_config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "not a causal language model"),
        (_edit_config(architectures=["LlamaForSequenceClassification"]), "not a causal language model"),
        (_edit_config(num_hidden_layers=3), "lacks 9 of the model's weights, which would be random"),
        (_edit_config(hidden_size=128), "do not have the sizes"),
        (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "already quantised .gptq"),
        (_as_adapter, "this is an adapter, not a model"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    tiny_model_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_base_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "llama-7b").mkdir()
    with pytest.raises(UserError, match=r"did you mean '.*llama-7b'"):
        load_base_model(tmp_path / "lama-7b")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="this is a file"):
        load_base_model(path)


def test_a_hub_id_that_is_not_cached_fails_at_once_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_base_model("nobody/has-this-model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "auto"}, "each process takes its own GPU"),
        ({"device": "zork:0"}, "device 'zork:0'"),
        ({"dtype": "float8"}, "model.dtype: 'float8'"),
        ({"quantization": "nf5"}, "model.quantization: 'nf5'"),
        ({"attention": "flash_attention_2"}, "model.attention: flash_attention_2"),
        ({"attention": "nonsense"}, "model.attention: nonsense"),
    ],
)
def test_an_impossible_setting_is_named(tiny_model_folder: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_base_model(tiny_model_folder, **settings)


def test_a_real_model_with_tied_weights_loads(tinystories: Path) -> None:
    model = load_base_model(tinystories, quantization="nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in quantized_modules(model)
