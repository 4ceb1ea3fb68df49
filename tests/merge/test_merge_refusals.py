"""Merges that must not happen: each says why, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig

from rrhf_peft.merge.adapter_edits import AdapterEdits
from rrhf_peft.merge.run import merge_adapter
from rrhf_peft.records import UserError

MakeAdapter = Callable[..., tuple[Path, PeftModel]]
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _refused(run: Path, output: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        merge_adapter(run, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


def _edit_weights(run: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = run / "adapter_model.safetensors"
    save_file({key: change(key, tensor).contiguous() for key, tensor in load_file(path).items()}, path)


def _copy_base(base: Path, target: Path) -> Path:
    shutil.copytree(base, target)
    return target


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_zero_adapter(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, quantization: str) -> None:
    run, _ = make_adapter(tiny_model_folder, scale=0.0, quantization=quantization)
    _refused(run, tmp_path / "merged", "changes nothing")


def test_an_adapter_that_rounding_swallows(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tiny_model_folder, quantization="nf4")
    _edit_weights(run, lambda key, tensor: tensor * 1e-4 if "lora_B" in key else tensor)
    _refused(run, tmp_path / "merged", "rounding swallows what was trained", dtype="bfloat16")
    merge_adapter(run, tmp_path / "merged", dtype="float32")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: _cut(run / "adapter_model.safetensors"), "truncated"),
        (lambda run: (run / "adapter_model.safetensors").write_bytes(b""), "it is empty"),
        (lambda run: (run / "adapter_model.safetensors").unlink(), "weights are missing"),
        (lambda run: _edit_weights(run, lambda key, tensor: tensor / 0 if "0.mlp.up" in key else tensor), "not finite"),
        (lambda run: _edit_weights(run, lambda key, tensor: tensor[:2] if "lora_A" in key else tensor), "asks for"),
        (lambda run: (run / "adapter_config.json").unlink(), "it is no adapter"),
        (lambda run: (run / "recipe.yaml").unlink(), "Pass --quantization"),
        (lambda run: (run / "recipe.yaml").write_text("model: ["), "not valid YAML"),
    ],
)
def test_a_damaged_run(
    tiny_model_folder: Path,
    tmp_path: Path,
    make_adapter: MakeAdapter,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    run, _ = make_adapter(tiny_model_folder)
    damage(run)
    _refused(run, tmp_path / "merged", message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: _cut(base / "model.safetensors"), "truncated"),
        (lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"), "pickled"),
        (lambda base: (base / "model.safetensors").unlink(), "no weights here"),
        (lambda base: shutil.rmtree(base), "pass --base-model if it is elsewhere now"),
    ],
)
def test_a_damaged_base(
    tiny_model_folder: Path,
    tmp_path: Path,
    make_adapter: MakeAdapter,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    base = _copy_base(tiny_model_folder, tmp_path / "base")
    run, _ = make_adapter(base)
    damage(base)
    _refused(run, tmp_path / "merged", message)


def test_another_base(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, make_base: Callable[..., Path]
) -> None:
    run, _ = make_adapter(tiny_model_folder)
    wider = make_base(LlamaConfig(**{**SMALL, "hidden_size": 96}))
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    config.num_hidden_layers = 1
    shallower = make_base(config)
    _refused(run, tmp_path / "merged", "does not fit the base model .*asks for", base_model=str(wider))
    _refused(run, tmp_path / "merged", "does not fit the base model .*no place for", base_model=str(shallower))


def test_another_base_of_the_same_shape(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tiny_model_folder, {"target_modules": ["embed_tokens", "q_proj"]})
    other = _copy_base(tiny_model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    _refused(run, tmp_path / "merged", "differs from the base model's", base_model=str(other))


def test_resized_vocabularies(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(run)
    _refused(run, tmp_path / "merged", "the vocabulary was resized")
    run, _ = make_adapter(tiny_model_folder, {"target_modules": ["q_proj"]}, name="other-run")
    path = run / "adapter_model.safetensors"
    weights = load_file(path) | {"base_model.model.model.embed_tokens.weight": torch.zeros(270, 64)}
    save_file(weights, path)
    _refused(run, tmp_path / "merged", "resized vocabulary")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "quantized"}, "--base: 'quantized'"),
        ({"dtype": "int8"}, "--dtype: 'int8'"),
        ({"shard_size": "5 apples"}, "--shard-size: '5 apples'"),
        ({"tolerance": 1e-12}, "computes something else than the adapter model"),
        ({"quantization": "nf5"}, "'nf5' is not one of"),
        ({"base_model": "/nowhere/at-all"}, "/nowhere/at-all: there is no such model folder"),
    ],
)
def test_impossible_options(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, options: dict[str, Any], message: str
) -> None:
    run, _ = make_adapter(tiny_model_folder)
    _refused(run, tmp_path / "merged", message, **options)


def test_a_merge_with_the_wrong_quantisation_would_be_noticed(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_adapter(tiny_model_folder, quantization="nf4")
    monkeypatch.setattr(
        "rrhf_peft.merge.weights.BaseWeights._through_quantization", lambda self, name, weight: weight.float()
    )
    _refused(run, tmp_path / "merged", "computes something else than the adapter model", dtype="float32")


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LlamaConfig(**SMALL), {"lora_bias": True}, "lora_bias trained a bias"),
        (LlamaConfig(**SMALL), {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
    ids=["lora_bias", "layer_replication"],
)
def test_what_cannot_be_merged(
    tmp_path: Path,
    make_adapter: MakeAdapter,
    make_base: Callable[..., Path],
    config: Any,
    fields: dict[str, Any],
    message: str,
) -> None:
    run, _ = make_adapter(make_base(config), fields)
    _refused(run, tmp_path / "merged", message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "experts of a mixture"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "stored in another form"),
    ],
)
def test_experts_trained_elsewhere(
    tmp_path: Path,
    make_adapter: MakeAdapter,
    make_base: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    message: str,
) -> None:
    base = make_base(MixtralConfig(**SMALL, num_local_experts=2))
    with pytest.raises(UserError, match="experts of a mixture"):  # here they are refused before training
        make_adapter(base, fields)
    monkeypatch.setattr("rrhf_peft.modeling.adapter._trains_experts", lambda module: False)
    run, _ = make_adapter(base, fields)
    _refused(run, tmp_path / "merged", message)


def test_code_that_comes_with_the_base_runs_only_when_the_caller_says_so(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    base = _copy_base(tiny_model_folder, tmp_path / "base")
    run, _ = make_adapter(base)
    planted = tmp_path / "planted"
    (base / "modeling_planted.py").write_text(
        f"from pathlib import Path\nPath({str(planted)!r}).write_text('ran')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class PlantedConfig(LlamaConfig):\n    model_type = 'planted'\n"
        "class PlantedModel(LlamaForCausalLM):\n    config_class = PlantedConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "modeling_planted.PlantedConfig", "AutoModelForCausalLM": "modeling_planted.PlantedModel"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "planted", "auto_map": names}))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("model: {", "model: {trust_remote_code: true, "))
    assert "trust_remote_code: true" in (run / "recipe.yaml").read_text()
    _refused(run, tmp_path / "merged", "--trust-remote-code")
    assert not planted.exists()
    merge_adapter(run, tmp_path / "merged", trust_remote_code=True)
    assert planted.read_text() == "ran"
    assert (tmp_path / "merged" / "modeling_planted.py").is_file()


def test_a_recipe_beside_the_adapter_folder_says_nothing(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, _ = make_adapter(tiny_model_folder)
    (run / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    _refused(run, tmp_path / "merged", "Pass --quantization")


def test_int8_is_held_to_what_the_adapter_changes(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """An adapter whose whole effect on the logits is about as large as int8's rounding of its inputs."""
    run, _ = make_adapter(tiny_model_folder, quantization="int8")
    _edit_weights(run, lambda key, tensor: tensor * 0.01 if "lora_B" in key else tensor)
    report = merge_adapter(run, tmp_path / "merged", dtype="float32")
    assert report.fidelity is not None
    assert report.without_adapter is not None
    assert report.without_adapter.relative_difference < 0.1  # the tolerance that such merges once had
    assert report.fidelity.relative_difference < 1e-3 * report.without_adapter.relative_difference
    other = load_file(run / "adapter_model.safetensors")
    key = next(key for key in other if "lora_B" in key)
    shutil.rmtree(tmp_path / "merged")
    with pytest.MonkeyPatch.context() as patch:  # a merge that loses one layer
        apply = AdapterEdits.apply
        lost = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
        patch.setattr(
            AdapterEdits,
            "apply",
            lambda self, name, base, *rest: base.float() if name == lost else apply(self, name, base, *rest),
        )
        _refused(run, tmp_path / "merged", "computes something else", dtype="float32")


def test_an_existing_output_is_left_alone_unless_told(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, _ = make_adapter(tiny_model_folder)
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    for overwrite, said in ((False, "already exists"), (True, "has no mark of rrhf-peft")):
        with pytest.raises(UserError, match=said):
            merge_adapter(run, output, overwrite=overwrite)
    for target in (run, run.parent, tiny_model_folder, tiny_model_folder.parent):
        with pytest.raises(UserError, match=r"which this run reads|is what this run reads"):
            merge_adapter(run, target, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    report = merge_adapter(run, output)
    before = (output / "model.safetensors").read_bytes()
    assert merge_adapter(run, output) == report  # its seconds too: the same merge is done, and success
    with pytest.raises(UserError, match="already exists"):
        merge_adapter(run, output, dtype="bfloat16")
    with pytest.raises(UserError, match="computes something else"):
        merge_adapter(run, output, overwrite=True, tolerance=1e-12)
    assert (output / "model.safetensors").read_bytes() == before
    merge_adapter(run, output, overwrite=True, dtype="bfloat16")
    assert len((output / "model.safetensors").read_bytes()) < len(before)
    (output / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds mine\.txt, which rrhf-peft merge did not write"):
        merge_adapter(run, output, overwrite=True)
    assert not list(tmp_path.glob(".merged*"))


def test_a_killed_merge_leaves_no_output_and_can_be_repeated(
    tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    run, _ = make_adapter(tiny_model_folder, quantization="nf4")
    output = tmp_path / "merged"
    program = (
        "import time; from rrhf_peft.merge.run import merge_adapter\n"
        f"merge_adapter({str(run)!r}, {str(output)!r}, shard_size='10KB', on_progress=lambda *_: time.sleep(0.2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        partial = tmp_path / ".merged.rrhf-peft.partial"
        deadline = time.monotonic() + 60
        while len(list(partial.glob("*.safetensors"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert partial.is_dir()
    assert not output.exists()
    merge_adapter(run, output)
    assert not partial.exists()
    assert json.loads((output / "merge_report.json").read_text())["changed_tensors"] == 14


def test_siblings_that_are_not_ours_stay(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    run, _ = make_adapter(tiny_model_folder)
    for state in ("partial", "retired"):
        (tmp_path / f".merged.{state}").mkdir()
        (tmp_path / f".merged.{state}" / "mine.txt").write_text("precious")
    merge_adapter(run, tmp_path / "merged", verify=False)
    merge_adapter(run, tmp_path / "merged", verify=False, overwrite=True)
    assert [(tmp_path / f".merged.{state}" / "mine.txt").read_text() for state in ("partial", "retired")] == [
        "precious"
    ] * 2


@pytest.mark.parametrize("limit", [2_000, 100_000], ids=["tokenizer", "weights"])
def test_a_disk_that_refuses(tiny_model_folder: Path, tmp_path: Path, make_adapter: MakeAdapter, limit: int) -> None:
    run, _ = make_adapter(tiny_model_folder)
    program = (
        "import resource; from rrhf_peft.merge.run import merge_adapter; from rrhf_peft.records import UserError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: merge_adapter({str(run)!r}, {str(tmp_path / 'merged')!r})\n"
        "except UserError as error: print(error)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot be written" in finished.stdout
    assert str(tmp_path) in finished.stdout
    assert not list(tmp_path.glob("*merged*"))
