"""Merged models compute what the adapter models compute, standalone, in every variant."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from rrhf_peft.merge.fidelity import MergeReport
from rrhf_peft.merge.run import merge_adapter
from rrhf_peft.modeling import load_base_model

MakeAdapter = Callable[..., tuple[Path, PeftModel]]
IDS = torch.arange(3, 43).reshape(2, 20)
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@torch.no_grad()
def _difference(policy: torch.nn.Module, folder: Path) -> float:
    """Largest difference of logits between a live adapter model and a merged folder, as a share of the largest."""
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = policy(input_ids=IDS).logits.float()
    return ((merged(input_ids=IDS).logits - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_dequantized_float32_is_the_adapter_model(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, quantization: str, double_quant: bool
) -> None:
    run, policy = make_adapter(tiny_model_folder, quantization=quantization, double_quant=double_quant)
    report = merge_adapter(run, tmp_path / "merged", dtype="float32")
    assert (report.base, report.training_quantization, report.dtype) == ("dequantized", quantization, "float32")
    assert report.changed_tensors == 14
    assert report.fidelity is not None
    assert report.fidelity.relative_difference < 1e-5
    assert report.fidelity.top1_agreement == 1.0
    assert _difference(policy, tmp_path / "merged") < 1e-5


@pytest.mark.parametrize(
    ("quantization", "training_dtype", "dtype", "allowed"),
    [
        ("none", "float32", "float32", 1e-5),
        ("none", "float32", "bfloat16", 2e-2),
        ("none", "float32", "float16", 3e-3),
        ("nf4", "float32", "bfloat16", 2e-2),
        ("nf4", "float32", "float16", 3e-3),
        ("nf4", "bfloat16", "float32", 2e-2),  # the live model rounds its activations to bfloat16
        ("none", "bfloat16", "float32", 2e-2),
        ("int8", "float32", "float32", 3e-2),  # the live model rounds its activations to 8 bits
    ],
)
def test_every_precision(
    tiny_model_folder: Path,
    tmp_path: Path,
    make_adapter: MakeAdapter,
    quantization: str,
    training_dtype: str,
    dtype: str,
    allowed: float,
) -> None:
    run, policy = make_adapter(tiny_model_folder, quantization=quantization, dtype=training_dtype)
    report = merge_adapter(run, tmp_path / "merged", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    assert report.fidelity is not None
    if dtype == "float32" and quantization != "int8":  # compared with both in float32
        assert report.fidelity.relative_difference < 1e-5
    assert _difference(policy, tmp_path / "merged") < allowed


def test_merged_weights_are_base_plus_scaled_product(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, _ = make_adapter(tiny_model_folder, {"lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]})
    report = merge_adapter(run, tmp_path / "merged")
    base = load_file(tiny_model_folder / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(run / "adapter_model.safetensors")
    assert list(merged) == list(base)
    norms = 0.0
    for key, weight in base.items():
        prefix = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in adapter:
            delta = adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"] * 12 / 4
            norms += delta.norm().item()
            weight = weight + delta
        assert torch.allclose(merged[key], weight, atol=1e-6), key
    assert report.changed_tensors == 4
    assert report.delta_norm == pytest.approx(norms, rel=1e-4)


def test_original_base_keeps_the_unquantised_weights(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, policy = make_adapter(tiny_model_folder, {"target_modules": ["q_proj"]}, quantization="nf4", dtype="bfloat16")
    report = merge_adapter(run, tmp_path / "merged", base="original")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model_folder, tmp_path / "merged"))
    for key, weight in base.items():
        assert torch.equal(merged[key], weight) == ("q_proj" not in key), key
    assert report.base == "original"
    assert report.fidelity is not None
    assert report.fidelity.relative_difference < 1e-5
    assert report.against_training is not None
    assert report.against_training.relative_difference > 1e-2
    assert _difference(policy, tmp_path / "merged") > 1e-2


@pytest.mark.parametrize(
    ("fields", "quantization"),
    [
        ({"use_dora": True}, "nf4"),
        ({"use_rslora": True}, "nf4"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}}, "nf4"),
        ({"modules_to_save": ["lm_head"]}, "nf4"),
        ({"modules_to_save": ["embed_tokens", "norm"]}, "nf4"),
        ({"trainable_token_indices": [5, 9]}, "nf4"),
        ({"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, "nf4"),
        ({"init_lora_weights": "pissa"}, "none"),
        ({"init_lora_weights": "olora"}, "none"),
    ],
)
def test_every_variant(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, fields: dict[str, Any], quantization: str
) -> None:
    run, policy = make_adapter(tiny_model_folder, fields, quantization=quantization)
    report = merge_adapter(run, tmp_path / "merged", dtype="float32")
    assert _difference(policy, tmp_path / "merged") < 1e-5
    assert not report.untied_embeddings
    assert report.without_adapter is not None
    assert report.without_adapter.relative_difference > 1e-3


@pytest.mark.parametrize(
    ("fields", "untied"),
    [
        ({}, False),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
        ({"trainable_token_indices": [5, 9]}, False),
    ],
)
def test_tied_embeddings_are_untied_only_where_they_differ(
    tmp_path: Path,
    make_adapter: MakeAdapter,
    make_base: Callable[..., Path],
    fields: dict[str, Any],
    untied: bool,
) -> None:
    run, policy = make_adapter(make_base(LlamaConfig(**SMALL, tie_word_embeddings=True)), fields, quantization="nf4")
    report = merge_adapter(run, tmp_path / "merged", dtype="float32")
    assert report.untied_embeddings == untied
    keys = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert ("lm_head.weight" in keys and "model.embed_tokens.weight" in keys) == untied
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] != untied
    assert _difference(policy, tmp_path / "merged") < 1e-5


BIASED = LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize(
    ("config", "fields", "quantization"),
    [
        (BIASED, {"lora_bias": True}, "nf4"),
        (BIASED, {"bias": "all"}, "none"),
        (BIASED, {"bias": "lora_only", "lora_bias": True}, "none"),
        (Qwen2Config(**SMALL), {}, "nf4"),
        (GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=128), {"use_dora": True}, "nf4"),
        (GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=128), {}, "none"),
        (LlamaConfig(**{**SMALL, "hidden_size": 72, "intermediate_size": 90}), {}, "nf4"),
        (MixtralConfig(**SMALL, num_local_experts=2), {"target_modules": ["q_proj", "o_proj"]}, "nf4"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_other_architectures(
    tmp_path: Path,
    make_adapter: MakeAdapter,
    make_base: Callable[..., Path],
    config: Any,
    fields: dict[str, Any],
    quantization: str,
) -> None:
    run, policy = make_adapter(make_base(config), fields, quantization=quantization)
    merge_adapter(run, tmp_path / "merged", dtype="float32")  # without a tokenizer: compared on fixed token ids
    assert _difference(policy, tmp_path / "merged") < 1e-5


def test_shards_in_and_shards_out(tmp_path: Path, make_adapter: MakeAdapter, make_base: Callable[..., Path]) -> None:
    base = make_base(LlamaConfig(**SMALL), max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    run, policy = make_adapter(base, quantization="nf4")
    report = merge_adapter(run, tmp_path / "merged", dtype="float32", shard_size="40KB")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert report.files == len(files) > 8
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.total_bytes
    assert {key for file in files for key in load_file(file)} == set(index["weight_map"])
    assert _difference(policy, tmp_path / "merged") < 1e-5


def test_the_output_needs_neither_peft_nor_bitsandbytes(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, policy = make_adapter(tiny_model_folder, quantization="nf4")
    merge_adapter(run, tmp_path / "merged", dtype="float32")
    program = (
        "import sys; sys.modules['peft'] = None; sys.modules['bitsandbytes'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        f"torch.save(model(torch.arange(3, 43).reshape(2, 20)).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert (policy(input_ids=IDS).logits - logits).abs().max() < 1e-5 * logits.abs().max()


def test_what_lies_beside_the_weights(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tiny_model_folder, quantization="nf4")
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(run)
    (run / "generation_config.json").write_text('{"temperature": 0.625, "do_sample": true}')
    config = json.loads((tiny_model_folder / "config.json").read_text())
    report = merge_adapter(run, tmp_path / "merged", dtype="bfloat16")
    output = tmp_path / "merged"
    assert json.loads((output / "config.json").read_text()) == {**config, "dtype": "bfloat16"}
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages[0].content }}!"
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.625
    written = json.loads((output / "merge_report.json").read_text())
    assert written == report.to_dict()
    assert written["fidelity"]["positions"] > 100
    assert "merged in by rrhf-peft" in (output / "README.md").read_text()
    assert not list(tmp_path.glob(".merged*"))


def test_a_checkpoint_takes_recipe_and_tokenizer_from_its_run(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, policy = make_adapter(tiny_model_folder, quantization="nf4")
    checkpoint = run / "checkpoint-20"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).rename(checkpoint / name)
    report = merge_adapter(checkpoint, tmp_path / "merged", dtype="float32")
    assert report.training_quantization == "nf4"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert _difference(policy, tmp_path / "merged") < 1e-5


def test_without_a_recipe_the_quantisation_is_an_argument(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, policy = make_adapter(tiny_model_folder, quantization="fp4", double_quant=False, recipe=False)
    merge_adapter(run, tmp_path / "merged", dtype="float32", quantization="fp4", double_quant=False)
    assert _difference(policy, tmp_path / "merged") < 1e-5


def test_a_base_that_moved_can_be_named(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_model_folder)
    run, policy = make_adapter(tiny_model_folder, quantization="nf4")
    text = (run / "adapter_config.json").read_text()
    (run / "adapter_config.json").write_text(text.replace(str(tiny_model_folder), str(tmp_path / "gone")))
    merge_adapter(run, tmp_path / "merged", dtype="float32", base_model=str(moved))
    assert _difference(policy, tmp_path / "merged") < 1e-5


def test_unverified_merges_say_so(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tiny_model_folder)
    stages: list[tuple[str, int, int]] = []
    report: MergeReport = merge_adapter(
        run, tmp_path / "merged", verify=False, on_progress=lambda *stage: stages.append(stage)
    )
    assert report.fidelity is None
    assert "not verified" in (tmp_path / "merged" / "README.md").read_text()
    assert stages[-1] == ("merging", report.total_bytes, report.total_bytes)


def test_a_real_model(tinystories: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tinystories, quantization="nf4", dtype="bfloat16")
    report = merge_adapter(run, tmp_path / "merged", verify_prompts=["Once upon a time, there was a little girl"])
    assert report.dtype == "float32"
    assert report.fidelity is not None
    assert report.fidelity.relative_difference < 1e-5
    model = load_base_model(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
