"""What is logged is the loss: against the float64 oracle, and however a step's groups are split."""

from __future__ import annotations

import pytest
import torch
from oracles.log_probs import float64_copy, response_sums
from oracles.losses import rrhf_group
from train.ranked_files import logged, small_recipe, write_groups
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import read_groups
from rrhf_peft.train.run import train_recipe


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 24)


@pytest.mark.parametrize("variant", ["balanced", "paper", "released"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_first_loss_is_the_oracles_mean_group_loss(tiny_model_folder, ranked, tmp_path, variant, layout):
    recipe = small_recipe(
        tiny_model_folder,
        ranked,
        tmp_path / "run",
        objective={"variant": variant},
        engine={"layout": layout, "chunk_tokens": 200},
        training={"per_device_train_batch_size": 24, "learning_rate": 1e-30},
    )
    train_recipe(recipe)

    model = float64_copy(AutoModelForCausalLM.from_pretrained(tiny_model_folder))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    losses = []
    for group in read_groups(str(ranked)):
        prompt = [tokenizer.bos_token_id, *tokenizer(group.prompt, add_special_tokens=False)["input_ids"]]
        responses = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for text in group.responses
        ]
        with torch.no_grad():
            sums = response_sums(model, [(prompt, responses)]).tolist()
        padded = len(prompt) + max(map(len, responses))
        losses.append(rrhf_group(sums, [len(r) for r in responses], padded, group.scores, variant=variant)[0])
    (only,) = logged(tmp_path / "run")
    assert only["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_accumulation_does_not_change_the_losses(tiny_model_folder, ranked, tmp_path):
    curves = {}
    for batch, accumulate in ((8, 1), (1, 8), (3, 3)):
        run = tmp_path / f"{batch}x{accumulate}"
        training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        train_recipe(small_recipe(tiny_model_folder, ranked, run, training=training))
        curves[batch, accumulate] = logged(run)
    assert len(curves[8, 1]) == 3
    for name in ("loss", "grad_norm", "rank_loss", "sft_loss", "pair_accuracy", "best_hit_rate", "logps/writer-0"):
        whole, split = ([line[name] for line in curves[key]] for key in ((8, 1), (1, 8)))
        assert split == pytest.approx(whole, rel=1e-5), name
    # 24 groups in steps of 9: the last step has 6 groups in two micro-batches, and weighs them alike
    assert [round(line["epoch"], 3) for line in curves[3, 3]] == [0.375, 0.75, 1.0]


def test_last_partial_step_is_a_mean_over_its_own_groups(tiny_model_folder, ranked, tmp_path):
    frozen = {"learning_rate": 1e-30, "seed": 3}
    losses = {}
    for batch, accumulate in ((5, 1), (5, 4)):
        run = tmp_path / f"{batch}x{accumulate}"
        training = {**frozen, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        train_recipe(small_recipe(tiny_model_folder, ranked, run, training=training))
        losses[accumulate] = [line["loss"] for line in logged(run)]
    single = losses[1]  # batches of 5, 5, 5, 5, 4
    assert losses[4] == pytest.approx([sum(single[:4]) / 4, single[4]], rel=1e-5)


def test_evaluation_reports_the_held_out_split(tiny_model_folder, ranked, tmp_path):
    import json

    results = []
    for batch in (2, 7):
        run = tmp_path / str(batch)
        recipe = small_recipe(
            tiny_model_folder,
            ranked,
            run,
            data={"train": str(ranked), "eval_size": 7, "max_tokens": 128},
            training={"eval_strategy": "epoch", "per_device_eval_batch_size": batch},
        )
        train_recipe(recipe)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results.append(next(line for line in lines if "eval_loss" in line))
        assert len(json.loads((run / "data_report.json").read_text())) == 2
    for name in ("eval_loss", "eval_pair_accuracy", "eval_rank_loss", "eval_best_hit_rate"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name
    assert results[0]["eval_loss"] == pytest.approx(
        results[0]["eval_rank_loss"] + results[0]["eval_sft_loss"], rel=1e-5
    )
