"""`RRHFTrainer` from Python, quantised bases, and the runs that must stop."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from train.ranked_files import logged, small_recipe, write_groups
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.recipe import load_recipe
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.run import train_recipe
from rrhf_peft.train.trainer import RRHFTrainer


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 16)


def config(folder, **fields):
    quick = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "use_cpu": True, "save_strategy": "no"}
    return RRHFConfig(output_dir=str(folder), disable_tqdm=True, **{**quick, **fields})


def test_trl_habits(tiny_model_folder, ranked, tmp_path):
    dataset = load_dataset("json", data_files=str(ranked), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = RRHFTrainer(
        model=str(tiny_model_folder),
        args=config(tmp_path / "run", learning_rate=1e-2, num_train_epochs=4, objective_options={"rank_weight": 2.0}),
        train_dataset=dataset.select(range(12)),
        eval_dataset=dataset.select(range(12, 16)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path / "run")
    assert again.peft_config["default"].r == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "</s>"


def test_a_loaded_model_all_weights_and_sft(tiny_model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    groups = [RankedGroup(f"say {i}", ["yes", "no"], [1.0, 0.0], ["a", "b"]) for i in range(8)]
    trainer = RRHFTrainer(
        model=model,
        args=config(tmp_path / "run", objective="sft", learning_rate=1e-2, num_train_epochs=6),
        train_dataset=groups,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["logps/a"] > history[-1]["logps/b"]
    assert "rank_loss" not in history[0]


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantised_bases_train(tiny_model_folder, ranked, tmp_path, quantization):
    run = tmp_path / "run"
    recipe = small_recipe(
        tiny_model_folder,
        ranked,
        run,
        model={"quantization": quantization},
        training={"learning_rate": 1e-2, "num_train_epochs": 4},
        engine={"gradient_checkpointing": True, "chunk_tokens": 300},
    )
    train_recipe(recipe)
    losses = [line["loss"] for line in logged(run)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert (run / "adapter_model.safetensors").stat().st_size > 0


def test_continue_from_an_adapter(tiny_model_folder, ranked, tmp_path):
    train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "first", training={"learning_rate": 1e-2}))
    recipe = small_recipe(
        tiny_model_folder,
        ranked,
        tmp_path / "second",
        model={"init_adapter": str(tmp_path / "first")},
        adapter={},
        training={"learning_rate": 1e-2},
    )
    train_recipe(recipe)
    first, second = logged(tmp_path / "first"), logged(tmp_path / "second")
    assert second[0]["loss"] < first[0]["loss"]


def test_a_run_that_trains_nothing_is_an_error(tiny_model_folder, ranked, tmp_path, monkeypatch):
    from rrhf_peft.logprobs import engine

    forward = engine._forward_rows
    # the right values, cut off from every weight
    monkeypatch.setattr(
        engine, "_forward_rows", lambda *args, **rest: (out := forward(*args, **rest)).detach() + 0 * out
    )
    monkeypatch.setattr("rrhf_peft.train.trainer.prove", lambda *args, **kwargs: type("P", (), {"rejected": ()}))
    with pytest.raises(UserError, match="all zero"):
        train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "run"))


def test_a_first_step_without_loss_is_no_error(tiny_model_folder, tmp_path):
    """Ranking alone, every pair already in order: loss 0, gradient 0, and nothing wrong with it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    trainer = RRHFTrainer(
        model=model,
        args=config(tmp_path / "run", objective_options={"sft_weight": 0.0, "margin": -100.0}),
        train_dataset=[RankedGroup(f"say {i}", ["yes", "no"], [1.0, 0.0], ["a", "b"]) for i in range(8)],
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0


def test_tensors_saved_empty_are_an_error(tiny_model_folder, ranked, tmp_path, monkeypatch):
    from transformers import Trainer

    def save_empty(self, output_dir=None, state_dict=None):
        save_file({"a": torch.ones(2), "b": torch.ones(0)}, f"{output_dir}/adapter_model.safetensors")

    monkeypatch.setattr(Trainer, "_save", save_empty)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: 1 tensors were saved without elements, b first"):
        train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "run"))


def test_a_non_finite_loss_names_the_group(tiny_model_folder, ranked, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    groups = [RankedGroup("fine", ["yes", "no"], [1.0, 0.0], ["a", "b"]) for _ in range(3)]
    groups.append(RankedGroup("fine", ["yes", "~"], [1.0, 0.0], ["a", "b"]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tilde = tokenizer("~", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[tilde] = float("nan")
    arguments = config(tmp_path / "run", per_device_train_batch_size=4)
    trainer = RRHFTrainer(model=model, args=arguments, train_dataset=groups, processing_class=tokenizer)
    with pytest.raises(UserError, match=r"step 1: the loss is not finite \(nan\), in group 3 "):
        trainer.train()


def test_rows_without_the_columns_are_named(tiny_model_folder, tmp_path):
    with pytest.raises(UserError, match="no column responses, scores"):
        RRHFTrainer(model=str(tiny_model_folder), args=config(tmp_path), train_dataset=[{"prompt": "a", "chosen": "b"}])


def test_the_run_folder_reads_as_a_run(tiny_model_folder, ranked, tmp_path):
    run = tmp_path / "run"
    train_recipe(small_recipe(tiny_model_folder, ranked, run, training={"save_strategy": "epoch"}))
    report = json.loads((run / "data_report.json").read_text())["train"]
    assert report["groups_kept"] == 16
    assert load_recipe(run / "recipe.yaml").model.dtype == "float32"
    card = (run / "README.md").read_text()
    assert "16 groups" in card
    assert "rrhf-peft merge" in card
    assert (run / "checkpoint-4" / "adapter_model.safetensors").is_file()
    line = logged(run)[-1]
    assert 0 < line["tokens_saved"] < 1
    assert line["tokens_per_second"] > 0
    assert line["peak_memory_gib"] > 0
    assert line["logps/writer-0"] < 0


def test_too_long_a_context_is_refused_before_training(tiny_model_folder, ranked, tmp_path):
    data = {"train": str(ranked), "max_tokens": 4096}
    with pytest.raises(UserError, match=r"data\.max_tokens: 4096 is more than .* can read \(512 tokens\)"):
        train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()
