"""Settings are tried before anything is written, and what a run shows and uploads is what it is about."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from train.ranked_files import small_recipe, write_groups
from transformers import trainer as transformers_trainer

from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.train import config
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.run import train_recipe, training_config
from rrhf_peft.train.trainer import GradientCheck, RRHFTrainer


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 8)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"optim": "galore_adamw"}, "training.optim"),
        ({"optim": "adamw_torch", "optim_args": "no equals sign"}, "training.optim"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training.lr_scheduler_type"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"cycles": 2}}, "training.lr_scheduler_type"),
        ({"fsdp": "full_shard", "fsdp_config": "no-such-file.json"}, "training.fsdp"),
        ({"accelerator_config": "no-such-file.json"}, "training.accelerator_config"),
        ({"eval_strategy": "steps", "save_strategy": "epoch", "load_best_model_at_end": True}, "training."),
    ],
)
def test_values_that_a_library_refuses_are_one_paragraph(tmp_path, tiny_model_folder, ranked, settings, key):
    """Each names its key, and leaves nothing behind."""
    data = {"train": str(ranked), "eval_size": 2, "max_tokens": 128}
    recipe = small_recipe(tiny_model_folder, ranked, tmp_path / "run", data=data, training=settings)
    with pytest.raises(UserError) as error:
        train_recipe(recipe)
    assert str(error.value).startswith(key)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_optimizer_and_schedule_that_works_is_taken(tmp_path, tiny_model_folder, ranked):
    for settings in (
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"optim": "adamw_8bit"},
        {"optim": "adamw_torch_fused"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-3},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"warmup_steps": 0.1},
    ):
        assert training_config(small_recipe(tiny_model_folder, ranked, tmp_path / "run", training=settings))


def test_the_card_is_uploaded_with_the_weights(tmp_path, tiny_model_folder, ranked, monkeypatch):
    """Whatever reaches the hub has this run's card, whose base model is no folder of somebody's disk."""
    uploads = []

    class Hub:
        """Takes what would go over the network."""

        def create_repo(self, repo_id, **rest):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, *, folder_path, **rest):
            uploads.append((tmp_path / folder_path / "README.md").read_text())
            return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()

    monkeypatch.setattr(transformers_trainer, "hf_api", Hub)
    run = tmp_path / "run"
    training = {"push_to_hub": True, "hub_model_id": "mine", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train_recipe(small_recipe(tiny_model_folder, ranked, run, training=training))
    assert len(uploads) >= 2
    for card in uploads:
        assert "aligned with ranked responses by the `rrhf` objective" in card
        assert "base_model:" not in card.split("---")[1]
    assert (run / "README.md").read_text() == uploads[-1]
    assert "| loss |" in uploads[-1]


def test_the_console_shows_what_the_objective_is_about(tmp_path, tiny_model_folder, ranked):
    """DPO ranks by log-ratios: its accuracy, and not that of mean log-probs; and groups, which compare layouts."""
    said = Console(file=io.StringIO(), width=200)
    run = tmp_path / "run"
    settings = {"logging_steps": 2, "disable_tqdm": False}
    recipe = small_recipe(tiny_model_folder, ranked, run, objective={"name": "dpo"}, training=settings)
    train_recipe(recipe, console=said)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["rewards/accuracies"] != pytest.approx(line["pair_accuracy"], abs=0.01)
    shown = next(text for text in said.file.getvalue().splitlines() if text.startswith("training: 2/2 steps"))
    assert f"pairs {line['rewards/accuracies']:.0%}, " in shown
    assert "groups/s" in shown
    assert "tok/s" not in shown
    assert line["groups_per_second"] > 0


def test_a_scalers_first_overflow_is_no_broken_gradient(tmp_path, tiny_model_folder):
    """fp16 begins with a loss scale of 65536 and halves it until the gradients are finite; the check waits for that."""
    groups = [RankedGroup(f"say {i}", ["yes", "no"], [1.0, 0.0], ["a", "b"]) for i in range(2)]
    config = RRHFConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    trainer = RRHFTrainer(model=str(tiny_model_folder), args=config, train_dataset=groups)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    trainer._loss_so_far += 1
    check = next(item for item in trainer.callback_handler.callbacks if isinstance(item, GradientCheck))
    weights = list(trainer.model.parameters())

    def step(gradient):
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        check.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)

    trainer.accelerator.scaler.scale(torch.ones(()))  # as the first backward pass does
    step(float("inf"))
    with pytest.raises(UserError, match="are all zero"):  # not checked before there is something finite
        step(0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.accelerator.scaler.scale(torch.ones(()))
    with pytest.raises(UserError, match="not finite"):
        step(float("inf"))


def test_a_launch_that_never_comes_together_is_no_wrong_setting(tiny_model_folder, tmp_path, monkeypatch):
    """Trying one setting after the other would wait half an hour for each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls = []

    def lonely(*arguments):
        calls.append(arguments)
        raise torch.distributed.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(config, "_config", lonely)
    with pytest.raises(UserError, match=r"not all 2 processes .* have met .*1/2 clients joined"):
        training_config(small_recipe(tiny_model_folder, tmp_path / "x.jsonl", tmp_path / "run"))
    assert len(calls) == 1
