"""Online training learns, the KL penalty is what it says and holds the policy back, and no base is held twice."""

from __future__ import annotations

import functools
import gc
import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from train.online_rules import PROMPTS, letters, online_recipe, write_prompts
from train.ranked_files import logged, write_groups
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rrhf_peft.data import Encoder, read_groups
from rrhf_peft.objectives import OBJECTIVES
from rrhf_peft.sample.policies import Candidate
from rrhf_peft.train import online
from rrhf_peft.train.online import OnlinePrompt, answers_of
from rrhf_peft.train.run import train_recipe


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.txt")


def refreshes(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "refresh" in line]


def rows(run, step):
    text = (run / "online" / f"step-{step:06}.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]  # a sampled text may hold other ends of lines


@pytest.mark.parametrize(("every", "epochs"), [(1, 12), (4, 18)])
def test_the_reward_rises(tiny_model_folder, prompts, tmp_path, every, epochs):
    """Epochs of three steps: a refresh at every multiple of `every` and at every epoch's start."""
    steps = [step for step in range(3 * epochs) if step % every == 0 or step % 3 == 0]
    run = tmp_path / "run"
    training = {"num_train_epochs": epochs}
    train_recipe(online_recipe(tiny_model_folder, prompts, run, online={"every": every}, training=training))
    seen = refreshes(run)
    assert [line["step"] for line in seen] == steps
    rewards = [line["rewards/mean"] for line in seen]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert all(line["rewards/max"] >= line["rewards/mean"] for line in seen)
    assert seen[0]["kl/response"] == pytest.approx(0, abs=1e-5)  # a new adapter changes nothing
    assert seen[-1]["kl/response"] > 1
    assert all(0 < line["response_tokens"] <= 12 for line in seen)
    assert [line["step"] for line in logged(run)] == list(range(1, 3 * epochs + 1))
    found = [row["meta"]["prompt_index"] for step in steps for row in rows(run, step)]
    assert sorted(found) == sorted(list(range(len(PROMPTS))) * epochs)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_policy_gradients_raise_the_reward(tiny_model_folder, prompts, tmp_path, monkeypatch, name):
    """Two steps on each draw: in the first the policy is the one that sampled, in the second it has moved."""
    ratios, objective = [], OBJECTIVES[name]

    @functools.wraps(objective)
    def spy(log_probs, scores, *, reference, **options):
        is_stand_in = not reference.sum.any()  # where no group had responses of different scores
        ratios.append([0.0] if is_stand_in else (log_probs.sum.detach() - reference.sum).tolist())
        assert not reference.sum.requires_grad
        return objective(log_probs, scores, reference=reference, **options)

    monkeypatch.setitem(OBJECTIVES, name, spy)
    run = tmp_path / "run"
    recipe = online_recipe(
        tiny_model_folder,
        prompts,
        run,
        online={"every": 2, "keep_provided": False},
        objective={"name": name},
        training={"num_train_epochs": 12},
    )
    train_recipe(recipe)
    seen = refreshes(run)
    rewards = [line["rewards/mean"] for line in seen]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    first = [line["step"] for line in seen]
    for step, one in enumerate(ratios):
        assert step not in first or max(map(abs, one)) < 1e-4
    assert any(max(map(abs, one)) > 0.01 for step, one in enumerate(ratios) if step not in first)
    clipped = [line["clip_ratio"] for line in logged(run) if "clip_ratio" in line]  # not of steps of stand-ins
    assert 0 < max(clipped) <= 1
    assert min(clipped) == 0


def test_policy_gradients_count_a_response_as_often_as_it_was_sampled(tiny_model_folder, prompts, tmp_path):
    run = tmp_path / "run"
    settings = {"every": 3, "keep_provided": False, "decoding": {"strategy": "top_p", "k": 6, "max_new_tokens": 1}}
    objective = {"name": "rloo"}
    recipe = online_recipe(
        tiny_model_folder, prompts, run, online=settings, objective=objective, training={"max_steps": 1}
    )
    train_recipe(recipe)
    answered = rows(run, 0)
    assert any(len(set(row["responses"])) < len(row["responses"]) for row in answered)
    assert all(len(row["responses"]) + len(row["left_out"]) == 6 for row in answered)


def plain_log_prob(model, prompt, response):
    """Sum of log P(token | past), straight from the model's logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum().item()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_kl_is_that_of_two_plain_forwards(tiny_model_folder, prompts, tmp_path, reduction):
    run = tmp_path / "run"
    penalty = {"every": 3, "kl_coefficient": 0.3, "kl_reduction": reduction}
    steps = {"save_strategy": "epoch", "num_train_epochs": 2}
    train_recipe(online_recipe(tiny_model_folder, prompts, run, online=penalty, training=steps))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    compared = 0
    expected_kl = {}
    for row in rows(run, 3):
        prompt = [1, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        for text, response in zip(row["responses"], row["token_ids"], strict=True):
            assert tokenizer.decode(response, skip_special_tokens=True) == text
            expected_kl[row["prompt"], text] = (prompt, response, -plain_log_prob(base, prompt, response))
    policy = PeftModel.from_pretrained(base, run / "checkpoint-3").eval()
    for row in rows(run, 3):
        for place, text in enumerate(row["responses"]):
            prompt, response, minus_base = expected_kl[row["prompt"], text]
            expected = plain_log_prob(policy, prompt, response) + minus_base
            expected /= len(response) if reduction == "mean" else 1
            assert row["kl"][place] == pytest.approx(expected, abs=1e-4)
            assert row["scores"][place] == pytest.approx(row["rewards"][place] - 0.3 * row["kl"][place], abs=1e-9)
            compared += abs(expected) > 0.01
    assert compared > 20


def test_answers_are_trained_on_as_the_tokens_that_were_sampled(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    encoder, eos = Encoder(tokenizer, "raw"), tokenizer.eos_token_id
    broken = tokenizer("über", add_special_tokens=False)["input_ids"][:1]  # half a character
    text = tokenizer.decode(broken)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] != broken  # it cannot be had back from the text
    known = {"finish_reasons": ["length"], "num_tokens": [2], "token_ids": [None], "tokenizers": [None]}
    prompt = OnlinePrompt(0, "say:", [1, 5], ["cut off"], ["file"], known)
    sampled = [Candidate(text, 2, -1.0, "eos", [*broken, eos]), Candidate(text * 2, 2, -1.0, "length", broken * 2)]
    answers = answers_of(prompt, sampled, "online", [1.0, 2.0, 3.0], encoder, max_tokens=64)
    assert list(map(list, answers.response_ids[1:])) == [[*broken, eos], broken * 2]
    assert answers.response_ids[0][-1] != eos  # provided, and known to be cut
    assert answers.finish_reasons == ["length", "eos", "length"]


def test_a_large_penalty_keeps_the_policy_near_the_base(tiny_model_folder, prompts, tmp_path):
    kl = {}
    for coefficient in (0.0, 1.0):
        run = tmp_path / str(coefficient)
        train_recipe(
            online_recipe(
                tiny_model_folder,
                prompts,
                run,
                online={"kl_coefficient": coefficient},
                training={"num_train_epochs": 8},
            )
        )
        last = refreshes(run)[-3:]
        kl[coefficient] = sum(line["kl/response"] for line in last) / len(last)
    assert abs(kl[1.0]) < 0.7 * kl[0.0]


def test_all_identical_scores_train_nothing_and_say_so(tiny_model_folder, prompts, tmp_path, caplog):
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        train_recipe(online_recipe(tiny_model_folder, prompts, run, rule="all_the_same"))
    warnings = [record.getMessage() for record in caplog.records if "nothing has been learned" in record.getMessage()]
    assert len(warnings) == 1
    assert "in 3 refreshes" in warnings[0]
    assert [line["groups_without_pairs"] for line in refreshes(run)] == [1.0] * 12
    assert [line["loss"] for line in logged(run)] == [0.0] * 12
    adapter = load_file(run / "adapter_model.safetensors")
    assert not any(values.any() for name, values in adapter.items() if "lora_B" in name)


def test_ties_weigh_nothing(tiny_model_folder, prompts, tmp_path):
    """Micro-batches of one group, some of them tied, are the same step as one batch of all."""
    for size, run in ((1, tmp_path / "one"), (4, tmp_path / "four")):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        train_recipe(online_recipe(tiny_model_folder, prompts, run, rule="letters_of_some", training=training))
    one, four = logged(tmp_path / "one"), logged(tmp_path / "four")
    assert [line["groups_without_pairs"] for line in refreshes(tmp_path / "one")] == [
        line["groups_without_pairs"] for line in refreshes(tmp_path / "four")
    ]
    assert any(0 < line["groups_without_pairs"] < 1 for line in refreshes(tmp_path / "one"))
    for name in ("loss", "grad_norm", "pair_accuracy", "rank_loss"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in four], rel=1e-4), name


@pytest.mark.parametrize("keep", [True, False])
def test_provided_responses_are_scored_and_ranked_with_the_new_ones(tiny_model_folder, tmp_path, keep):
    ranked = write_groups(tmp_path / "ranked.jsonl", 8)
    run = tmp_path / "run"
    settings = {"every": 2, "keep_provided": keep}
    data = {"max_tokens": 128, "eval": str(ranked)}
    training = {"num_train_epochs": 1, "eval_strategy": "epoch"}
    train_recipe(online_recipe(tiny_model_folder, ranked, run, online=settings, data=data, training=training))
    sources = {source for row in rows(run, 0) for source in row["sources"]}
    assert sources == {"top_p:online", *(("writer-0", "writer-1") if keep else ())}
    for row in rows(run, 0):
        assert row["sampled"] == [source == "top_p:online" for source in row["sources"]]
        assert row["rewards"] == letters("", row["responses"])  # the rule's word, not the file's
    assert any("eval_loss" in line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    again = read_groups(run / "online" / "step-000000.jsonl")
    assert [group.scores for group in again] == [row["scores"] for row in rows(run, 0)]


@pytest.mark.parametrize(
    ("name", "decoding"),
    [("dpo", {"strategy": "beam", "k": 2, "num_beams": 3}), ("sft", {"strategy": "diverse_beam", "k": 2})],
)
def test_other_objectives_and_strategies(tiny_model_folder, prompts, tmp_path, name, decoding):
    run = tmp_path / "run"
    settings = {"every": 3, "decoding": {**decoding, "max_new_tokens": 8}}
    train_recipe(
        online_recipe(
            tiny_model_folder,
            prompts,
            run,
            online=settings,
            objective={"name": name},
            engine={"gradient_checkpointing": True},
            training={"num_train_epochs": 2},
        )
    )
    assert len(logged(run)) == 6
    assert load_file(run / "adapter_model.safetensors")
    assert all(len(row["responses"]) <= 2 for row in rows(run, 3))


def bytes_of_tensors():
    """All that live tensors hold, each storage once; other tests' tensors without memory have no address."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not isinstance(item, FakeTensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_no_second_copy_of_the_base_is_held(tiny_model_folder, prompts, tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "model")
    del model
    before, during = bytes_of_tensors(), []
    adapter_off = online.adapter_off_log_probs

    def counted(*arguments):
        values = adapter_off(*arguments)
        during.append(bytes_of_tensors() - before)
        return values

    monkeypatch.setattr(online, "adapter_off_log_probs", counted)
    settings = {"kl_coefficient": 0.1, "every": 3}
    training = {"num_train_epochs": 1}
    train_recipe(online_recipe(tmp_path / "model", prompts, tmp_path / "run", online=settings, training=training))
    assert len(during) == 3
    assert weights < min(during)
    assert max(during) < 1.3 * weights
