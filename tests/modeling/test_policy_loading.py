"""From a `model:` section to a policy: what must be told before the first token, and what the hub may do."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from rrhf_peft.logprobs import install
from rrhf_peft.modeling import (
    attach_adapter,
    check_gradients,
    load_base_model,
    load_policy,
    load_tokenizer,
    prepare_for_training,
    read_adapter,
    sources,
)
from rrhf_peft.recipe import ModelSection
from rrhf_peft.records import UserError

IDS = torch.arange(3, 43).reshape(2, 20)


def test_load_policy_is_base_adapter_and_tokenizer(tiny_model_folder: Path, tmp_path: Path) -> None:
    adapted = attach_adapter(load_base_model(tiny_model_folder), {"r": 2, "init_lora_weights": "orthogonal"})
    adapted.save_pretrained(tmp_path)
    section = ModelSection(name=str(tiny_model_folder), init_adapter=str(tmp_path))
    model, tokenizer = load_policy(section)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, adapted.eval()(input_ids=IDS).logits)
    assert tokenizer("a").input_ids == load_tokenizer(tiny_model_folder)("a").input_ids
    bare, _ = load_policy(section.model_copy(update={"init_adapter": None}))
    assert not hasattr(bare, "peft_config")


def _with_tokens(model: Path, folder: Path, tokens: list[str], special: bool, template: str | None = None) -> Path:
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "template", "refused"),
    [(False, None, True), (True, "{{ '<turn>' }}{{ messages[0].content }}", True), (True, None, False)],
)
def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(
    tiny_model_folder: Path, tmp_path: Path, special: bool, template: str | None, refused: bool
) -> None:
    folder = _with_tokens(tiny_model_folder, tmp_path / "model", ["<turn>"], special, template)
    if refused:
        with pytest.raises(UserError, match=r"knows token ids up to 259 \('<turn>'\), and the model has 259 embed"):
            load_policy(ModelSection(name=str(folder)))
    else:  # no text becomes it: as the pictures' token of a language model cut out of a multimodal one
        load_policy(ModelSection(name=str(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_with_weights_that_are_not_finite_is_refused(
    tiny_model_folder: Path, tmp_path: Path, quantization: str, value: float
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj.*not finite"):
        load_base_model(folder, quantization=quantization)


def test_pickled_weights_are_read_only_when_asked_for(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\).*model.allow_pickle: true"):
        load_base_model(folder)
    model = load_base_model(folder, allow_pickle=True)
    assert torch.equal(model(input_ids=IDS).logits, load_base_model(tiny_model_folder)(input_ids=IDS).logits)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A hub that takes connections and never answers; the folder of its cache."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(64)
    held: list[Any] = []

    def accept() -> None:
        while True:
            try:
                held.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("rrhf_peft.modeling.sources.SECONDS_FOR_THE_HUB", 0.5)
    yield tmp_path
    server.close()


def test_a_hub_that_does_not_answer_is_told_in_time(silent_hub: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_base_model("somebody/model")
    assert time.monotonic() - started < 30


def test_a_cached_model_loads_while_the_hub_does_not_answer(silent_hub: Path, tiny_model_folder: Path) -> None:
    cache = silent_hub / "models--somebody--model"
    commit = "0123456789" * 4
    shutil.copytree(tiny_model_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    started = time.monotonic()
    model = load_base_model("somebody/model")
    load_tokenizer("somebody/model")
    assert time.monotonic() - started < 30  # several minutes of retries, one file after the other, without a limit
    assert model.name_or_path == "somebody/model"
    adapted = attach_adapter(model, {"r": 2})
    assert adapted.peft_config["default"].base_model_name_or_path == "somebody/model"


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as downloading one model takes; `folder` holds its files, `asked` what was asked for."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        commit = "0123456789" * 4
        if path.startswith("/api/models/somebody/model/tree/"):
            content = json.dumps(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{i:040}"}
                    for i, f in enumerate(files)
                ]
            ).encode()
        elif path.startswith("/api/models/somebody/model"):
            siblings = [{"rfilename": file.name} for file in files]
            content = json.dumps({"id": "somebody/model", "sha": commit, "siblings": siblings}).encode()
        elif path.startswith("/somebody/model/resolve/") and (self.folder / path.rpartition("/")[2]).is_file():
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "/api/" in path else "EntryNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(path.encode()).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again, pickled")
    handler = type("Handler", (_Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    try:
        tokenizer = load_tokenizer("somebody/model")
        assert tokenizer("a").input_ids == load_tokenizer(tiny_model_folder)("a").input_ids
        assert not [path for path in handler.asked if "safetensors" in path]
        model = load_base_model("somebody/model")
        assert torch.equal(model(input_ids=IDS).logits, load_base_model(tiny_model_folder)(input_ids=IDS).logits)
        assert model.name_or_path == "somebody/model"
        assert not [path for path in handler.asked if path.endswith(".bin")]
        with pytest.raises(UserError, match="the hub has no such model"):
            load_base_model("somebody/else")
    finally:
        server.shutdown()
        server.server_close()


def _use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(sources, "HfApi", lambda: HfApi(endpoint=address))
    monkeypatch.setattr(
        sources, "snapshot_download", functools.partial(snapshot_download, endpoint=address, cache_dir=str(cache))
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", '{"model_type": "llama", "vocab_size": -1}'),
        ("config.json", '{"model_type": ["llama"]}'),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "llama", "hidden_act": "zork"}'),
        ("config.json", '{"model_type": "llama", "rope_parameters": {"rope_type": "zork"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": 5}}'),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": "missing.safetensors"}}'),
    ],
)
def test_damaged_files_are_one_paragraph(tiny_model_folder: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    if "index" in file:
        (folder / "model.safetensors").unlink()
    if file == "config.json" and content.startswith('{"model_type": "llama"'):
        content = json.dumps({**json.loads((folder / file).read_text()), **json.loads(content)})
    (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        load_base_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{oops"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Zork"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": "ZorkTokenizer", "eos_token": ["a"]}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
    ],
)
def test_damaged_tokenizers_are_one_paragraph(tiny_model_folder: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 5000, "/proc/1/root/x"])
def test_impossible_names_are_one_paragraph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_base_model, load_tokenizer, read_adapter):
        with pytest.raises(UserError) as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "adapter",
    [
        None,
        {"r": 2, "modules_to_save": ["lm_head", "embed_tokens"]},
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    ],
)
def test_what_is_trained_is_float32_and_small_updates_are_kept(
    tiny_model_folder: Path, adapter: dict[str, Any] | None, dtype: str
) -> None:
    """In bfloat16 a step of 2e-5 moves 1% to 5% of such weights."""
    policy = attach_adapter(load_base_model(tiny_model_folder, dtype=dtype), adapter)
    prepare_for_training(policy, gradient_checkpointing=False)
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    policy(input_ids=IDS, labels=IDS).loss.backward()  # also without autocast
    torch.optim.AdamW(trained.values(), lr=2e-5, weight_decay=0.0).step()
    moved = 0
    count = 0
    for name, weight in trained.items():
        touched = weight.grad != 0
        moved += int((weight[touched] != before[name][touched]).sum())
        count += int(touched.sum())
    assert moved > 0.95 * count


def test_a_trained_bias_of_a_16_bit_layer_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"would be trained in bfloat16.*Set model.dtype: float32"):
        attach_adapter(load_base_model(tmp_path, dtype="bfloat16"), {"r": 2, "bias": "all"})
    attach_adapter(load_base_model(tmp_path, dtype="float32"), {"r": 2, "bias": "all"})


def test_dora_on_int8_is_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.use_dora.*nf4 or none"):
        attach_adapter(load_base_model(tiny_model_folder, quantization="int8"), {"r": 2, "use_dora": True})


def test_adapters_on_experts_are_refused_before_training(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"experts of a mixture.*target_modules"):
        attach_adapter(load_base_model(tmp_path), {"r": 2, "target_parameters": ["mlp.experts.gate_up_proj"]})
    attach_adapter(load_base_model(tmp_path), {"r": 2, "target_modules": ["q_proj", "v_proj"]})


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal Gemma 3."""
    folder = tmp_path_factory.mktemp("gemma3")
    config = Gemma3Config(
        text_config={
            "vocab_size": 80,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 8,
            "max_position_embeddings": 64,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "adapter",
    [{"r": 2}, {"r": 2, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, None],
)
def test_only_the_language_model_of_a_multimodal_one_is_trained(
    gemma3: Path, tmp_path: Path, adapter: dict[str, Any] | None
) -> None:
    policy: Any = attach_adapter(load_base_model(gemma3), adapter)
    prepare_for_training(policy, gradient_checkpointing=False)
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained
    assert not [name for name in trained if "language_model" not in name and "lm_head" not in name]
    ids = IDS % 70
    policy(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    check_gradients(policy)
    policy.zero_grad()
    batch = {"input_ids": ids[0, :15], "prompt_lengths": torch.tensor([4]), "response_lengths": torch.tensor([5, 6])}
    install(policy).log_probs(policy, {**batch, "group": torch.tensor([0, 0])}).sum.sum().backward()
    check_gradients(policy)
    # A trained weight without a gradient stops DistributedDataParallel in its second step.
    assert [name for name, weight in policy.named_parameters() if weight.requires_grad and weight.grad is None] == []
    if adapter is not None:
        assert ("layers.0" in "".join(trained)) == ("exclude_modules" not in adapter)
        policy.save_pretrained(tmp_path)
        again, _ = attach_adapter(load_base_model(gemma3), None, init_adapter=tmp_path), None
        assert [name for name, weight in again.named_parameters() if weight.requires_grad] == trained
