"""From a recipe to a plan: what is added up, what divides it, and what it admits not to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rrhf_peft.plan.run import MemoryPlan, fit_memory, plan_memory
from rrhf_peft.recipe import Recipe, make_recipe
from rrhf_peft.records import UserError

#: LLaMA 7B, as its config.json has it: plans need no weights.
LLAMA_7B = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
"max_position_embeddings": 2048, "tie_word_embeddings": false}"""


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-7b")
    (folder / "config.json").write_text(LLAMA_7B)
    return folder


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8 of its 32 layers, still above the size from which layers are recomputed."""
    folder = tmp_path_factory.mktemp("llama-shallow")
    (folder / "config.json").write_text(LLAMA_7B.replace('"num_hidden_layers": 32', '"num_hidden_layers": 8'))
    return folder


def recipe(folder: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {"data": {"train": "x"}, "training": {"output_dir": "o"}, **sections}
    values["model"] = {"name": str(folder), **sections.get("model", {})}
    return make_recipe(values)


def item(plan: MemoryPlan, name: str) -> int:
    return sum(line.bytes for line in plan.items if line.name == name)


def test_qlora_on_7b_fits_a_24_gb_gpu_and_full_training_does_not(llama_7b: Path) -> None:
    qlora = plan_memory(recipe(llama_7b, model={"quantization": "nf4"}))
    assert qlora.parameters == 6_738_415_616
    assert 3.3 < item(qlora, "base weights") / 2**30 < 3.7  # 4.127 bits per value, embeddings and head in 16
    assert qlora.trainable == 39_976_960  # r 16 on all linear layers
    assert qlora.gradient_checkpointing
    assert qlora.peak_bytes < 20e9
    assert plan_memory(recipe(llama_7b, adapter=None)).peak_bytes > 50e9


def test_items_add_up_to_the_peak(shallow: Path) -> None:
    plan = plan_memory(recipe(shallow))
    assert plan.peak_bytes == sum(line.bytes for line in plan.items)
    assert item(plan, "gradients") == 4 * plan.trainable
    assert item(plan, "optimizer state") == 8 * plan.trainable


def test_shards_divide_weights_gradients_and_optimizer_but_not_activations(llama_7b: Path) -> None:
    full = recipe(llama_7b, adapter=None, model={"dtype": "float32"})
    one, eight = plan_memory(full), plan_memory(full, processes=8)
    for name in ("base weights", "gradients", "optimizer state"):
        assert item(eight, name) == -(-item(one, name) // 8)
    assert item(eight, "activations") == item(one, "activations")
    assert item(eight, "gathered weights") > 0
    assert eight.peak_bytes < 40e9 < 80e9 < one.peak_bytes


def test_the_chunk_bounds_the_activations(shallow: Path) -> None:
    small = plan_memory(recipe(shallow, engine={"chunk_tokens": 1024}))
    large = plan_memory(recipe(shallow, engine={"chunk_tokens": 4096}))
    assert (small.chunk_tokens, large.chunk_tokens) == (1024, 4096)
    assert 3.5 < item(large, "activations") / item(small, "activations") < 8  # masks grow with the square


def test_few_responses_do_not_fill_a_chunk(shallow: Path) -> None:
    settings = {"output_dir": "o", "per_device_train_batch_size": 1}
    of_two = recipe(shallow, data={"train": "x", "max_tokens": 256}, training=settings)
    assert plan_memory(of_two, responses=2).chunk_tokens == 512
    assert plan_memory(of_two).chunk_tokens == 8 * 256
    plain = recipe(shallow, data={"train": "x", "max_tokens": 256}, training=settings, engine={"layout": "plain"})
    assert plan_memory(plain, responses=2).chunk_tokens == 512


def test_longer_groups_have_larger_masks(shallow: Path) -> None:
    settings: dict[str, Any] = {"engine": {"chunk_tokens": 4096, "gradient_checkpointing": False}}
    by_responses = [plan_memory(recipe(shallow, **settings), responses=k) for k in (1, 8)]
    assert [plan.chunk_tokens for plan in by_responses] == [4096, 4096]
    assert item(by_responses[0], "activations") < item(by_responses[1], "activations")


def test_weights_in_float32_under_autocast_exist_twice(shallow: Path) -> None:
    plan = plan_memory(recipe(shallow, model={"dtype": "float32"}, engine={"gradient_checkpointing": False}))
    assert item(plan, "cast weights") > 3e9
    on_cpu = plan_memory(recipe(shallow), device="cpu")
    assert item(on_cpu, "cast weights") == 0
    assert item(on_cpu, "base weights") > 4 * on_cpu.parameters


def test_paged_optimizers_count_on_the_host_and_unknown_ones_are_said(shallow: Path) -> None:
    paged = plan_memory(recipe(shallow, training={"output_dir": "o", "optim": "paged_adamw_32bit"}))
    assert item(paged, "optimizer state") == 0
    assert paged.host_bytes == 8 * paged.trainable
    unknown = plan_memory(recipe(shallow, training={"output_dir": "o", "optim": "apollo_adamw"}))
    assert any("apollo_adamw" in note for note in unknown.unknown)
    assert not any("optimizer" in note for note in paged.unknown)


def test_the_unfused_optimizer_needs_room_of_its_own(shallow: Path) -> None:
    settings = {"output_dir": "o", "optim": "adamw_torch"}
    plan = plan_memory(recipe(shallow, adapter=None, training=settings, engine={"chunk_tokens": 256}))
    assert item(plan, "optimizer step") == 4 * plan.parameters
    assert item(plan, "activations") == 0  # they are gone by then


def test_eager_attention_keeps_its_scores(shallow: Path) -> None:
    settings: dict[str, Any] = {"engine": {"chunk_tokens": 2048, "gradient_checkpointing": False}}
    eager = plan_memory(recipe(shallow, model={"attention": "eager"}, **settings))
    fused = plan_memory(recipe(shallow, **settings))
    assert item(eager, "activations") - item(fused, "activations") > 8 * 32 * 2048**2 * 2


def test_the_table_reads_at_80_columns(shallow: Path) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_memory(recipe(shallow, training={"output_dir": "o", "optim": "paged_adamw_8bit"})))
    text = console.export_text()
    for part in ("base weights", "predicted peak", "Not in it:", "CUDA context", "host memory"):
        assert part in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_model_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such model folder"):
        plan_memory(recipe(tmp_path / "nowhere"))


def test_lengths_and_k_are_the_datas(tiny_model_folder: Path, tmp_path: Path) -> None:
    """A byte is a token here, and every sequence has a beginning and its responses an end."""
    lines = [{"prompt": "p" * 10, "responses": ["r" * 20] * 2 + ["s" * 5], "scores": [1.0, 0.5, 0.0]}] * 50
    lines.append({"prompt": "p" * 31, "responses": [letter * 63 for letter in "abcde"], "scores": [1, 2, 3, 4, 5]})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {
        "data": {"train": str(data), "max_tokens": 500},
        "training": {"output_dir": "o", "per_device_train_batch_size": 1},
    }
    plan = plan_memory(recipe(tiny_model_folder, **settings))
    assert (plan.responses, plan.from_data) == (5, True)
    assert 32 + 5 * 64 <= plan.chunk_tokens <= 2 * (32 + 3 * 64)  # one row, or two of which each has the prompt
    assumed = plan_memory(recipe(tiny_model_folder, **settings), responses=5)
    assert (assumed.responses, assumed.from_data, assumed.chunk_tokens) == (5, False, 5 * 500)
    assert plan.peak_bytes < assumed.peak_bytes
    plain = plan_memory(recipe(tiny_model_folder, **settings, engine={"layout": "plain"}))
    assert plain.chunk_tokens == 5 * (32 + 64)
    elsewhere = {**settings, "data": {"train": str(tmp_path / "nowhere.jsonl"), "max_tokens": 500}}
    assert plan_memory(recipe(tiny_model_folder, **elsewhere)).responses == 8


def test_what_training_would_refuse_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_tokens: 513 is more than .* can read \(512 tokens\)"):
        plan_memory(recipe(tiny_model_folder, data={"train": "x", "max_tokens": 513}))
    (tmp_path / "data.jsonl").write_text('{"prompt": "p", "responses": 5}\n')
    with pytest.raises(UserError, match=r"data\.jsonl"):
        plan_memory(recipe(tiny_model_folder, data={"train": str(tmp_path / "data.jsonl"), "max_tokens": 64}))


def test_all_weights_are_planned_in_float32(shallow: Path) -> None:
    plan = plan_memory(recipe(shallow, adapter=None, model={"dtype": "bfloat16"}))
    assert item(plan, "base weights") == pytest.approx(4 * plan.parameters, rel=1e-3)
    assert item(plan, "gradients") == 4 * plan.parameters


def test_the_decoding_cache_of_online_training_counts_where_it_is_larger(llama_7b: Path) -> None:
    online = {"every": 10, "decoding": {"strategy": "top_p", "k": 4, "max_new_tokens": 64}}
    online["scorer"] = {"name": "rule", "function": "rrhf_peft.score:vader"}
    settings: dict[str, Any] = {"engine": {"chunk_tokens": 256}, "data": {"train": "x", "max_tokens": 512}}
    plan = plan_memory(recipe(llama_7b, online={**online, "batch_tokens": 100_000}, **settings))
    assert item(plan, "decoding cache") == 2 * 100_000 * 32 * 4096 * 2
    assert plan.responses == 4
    small = plan_memory(recipe(llama_7b, online={**online, "batch_tokens": 100}, **settings))
    assert item(small, "decoding cache") == 0
    assert item(small, "activations") > 0


def test_fit_names_the_changes_that_make_a_recipe_fit(tmp_path: Path) -> None:
    config = {**json.loads(LLAMA_7B), "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "vocab_size": 2000}))

    def make(changes: list[str]) -> Recipe:
        sections: dict[str, Any] = {"engine": {"gradient_checkpointing": False, "chunk_tokens": 8192}}
        for change in changes:
            key, value = change.split("=")
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = {"true": True}.get(value, value)
        sections["training"] = {"output_dir": "o", **sections.get("training", {})}
        return recipe(tmp_path, **sections)

    def peak(changes: list[str]) -> int:
        return plan_memory(make(changes), device="cpu").peak_bytes

    as_it_is = peak([])
    roomy, none = fit_memory(make, 1.01 * as_it_is / 2**30, device="cpu")
    assert (none, roomy.peak_bytes) == ([], as_it_is)
    room = 0.5 * as_it_is
    plan, changes = fit_memory(make, room / 2**30, device="cpu")
    assert changes
    assert plan.peak_bytes == peak(changes) <= room
    for change in changes:  # none of them is needless
        assert peak([other for other in changes if other != change]) > room
    with pytest.raises(UserError, match=r"--fit .*: the least that was found is .*gradient_checkpointing.*max_tokens"):
        fit_memory(make, 0.001, device="cpu")
