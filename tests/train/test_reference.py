"""Reference log-probs: the adapter switched off, or the starting policy's kept; and training with every objective."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from train.ranked_files import logged, small_recipe, write_groups
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import GroupCollator, read_groups
from rrhf_peft.logprobs import install
from rrhf_peft.modeling import load_base_model
from rrhf_peft.objectives import NEEDS_REFERENCE, OBJECTIVES, ONLINE_ONLY
from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.reference import FILE, adapter_off_log_probs, resolve_reference
from rrhf_peft.train.run import train_recipe
from rrhf_peft.train.run_folder import last_checkpoint
from rrhf_peft.train.trainer import RRHFTrainer

#: Steps that move the policy far enough for a wrong reference to show.
FAST = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("data") / "ranked.jsonl", 16)


def curve(run, name="loss"):
    return [line[name] for line in logged(run)]


def batch_of(*sizes):
    draw = torch.Generator().manual_seed(3)
    groups = [
        TokenizedGroup(
            prompt_ids=torch.randint(3, 200, (4 + index,), generator=draw).tolist(),
            response_ids=[torch.randint(3, 200, (n,), generator=draw).tolist() for n in lengths],
            scores=[float(i) for i in range(len(lengths))],
            sources=["a"] * len(lengths),
            index=index,
        )
        for index, lengths in enumerate(sizes)
    ]
    return GroupCollator(["a"])(groups)


def moved(model):
    """As after training: every trainable weight elsewhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("quantization", "fields", "checkpointing"),
    [
        ("none", {"lora_dropout": 0.5}, False),
        ("none", {"use_dora": True, "modules_to_save": ["lm_head"]}, True),
        ("nf4", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]}, True),
        ("none", {"trainable_token_indices": [5, 6, 7]}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_adapter_off_is_the_base(tiny_model_folder, quantization, fields, checkpointing, layout):
    batch = batch_of([3, 1, 9], [6, 2])
    base = load_base_model(str(tiny_model_folder), quantization=quantization, dtype="float32")
    engine = install(base, layout=layout)
    with torch.no_grad():
        expected = engine.log_probs(base.eval(), batch).sum

    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **fields})
    model = get_peft_model(base, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    moved(model).train()
    engine = install(model, layout=layout, chunk_tokens=24)
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    policy = engine.log_probs(model, batch)
    before = torch.random.get_rng_state()
    reference = adapter_off_log_probs(engine, model, batch)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not reference.sum.requires_grad
    torch.testing.assert_close(reference.sum, expected, rtol=0, atol=2e-5)
    assert (reference.sum - policy.sum).abs().max() > 0.1
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    (policy.sum - reference.sum).sum().backward()  # the policy's graph outlives the switch, recomputed layers included
    assert frozen.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_both_references_train_alike(tiny_model_folder, ranked, tmp_path, name):
    adapter = {"r": 4, "lora_dropout": 0.0}
    curves = {}
    for reference in ("adapter_off", "cached", "auto"):
        run = tmp_path / reference
        objective = {"name": name, "reference": reference}
        recipe = small_recipe(
            tiny_model_folder,
            ranked,
            run,
            adapter=adapter,
            objective=objective,
            data={"train": str(ranked), "eval_size": 4, "max_tokens": 128},
            training={**FAST, "eval_strategy": "epoch", "num_train_epochs": 2},
        )
        train_recipe(recipe)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[reference] = [line.get("loss", line.get("eval_loss")) for line in lines]
        assert (run / FILE).exists() == (reference == "cached")
    assert len(curves["cached"]) == 2 * (3 + 1) + 1  # and the closing line
    assert curves["adapter_off"] == curves["auto"]
    assert curves["cached"][:-1] == pytest.approx(curves["adapter_off"][:-1], rel=1e-5)
    start = {"dpo": math.log(2), "kto": 0.5}[name]
    assert curves["adapter_off"][0] == pytest.approx(start, abs=1e-6)
    assert abs(curves["adapter_off"][5] - start) > 1e-3


@pytest.mark.parametrize("reference", ["adapter_off", "cached"])
def test_accumulation_does_not_change_the_losses(tiny_model_folder, ranked, tmp_path, reference):
    curves = {}
    for batch, accumulate in ((8, 1), (1, 8)):
        run = tmp_path / f"{batch}x{accumulate}"
        training = {**FAST, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        training["num_train_epochs"] = 2
        objective = {"name": "dpo", "beta": 0.5, "reference": reference}
        train_recipe(small_recipe(tiny_model_folder, ranked, run, objective=objective, training=training))
        curves[batch] = run
    for name in ("loss", "grad_norm", "rank_loss", "rewards/margins", "pair_accuracy"):
        assert curve(curves[1], name) == pytest.approx(curve(curves[8], name), rel=1e-4, abs=1e-6), name
    # At the start the policy is its reference: which of two equal rewards is larger is rounding.
    one, eight = (curve(curves[batch], "rewards/accuracies")[1:] for batch in (1, 8))
    assert one == pytest.approx(eight, rel=1e-4)
    assert curve(curves[8])[-1] < 0.65


def test_the_cache_is_the_starting_policy(tiny_model_folder, ranked, tmp_path):
    """A second run goes on from an adapter: its reference is that policy, and not the base."""
    train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "first", training=FAST))
    model = {"name": str(tiny_model_folder), "init_adapter": str(tmp_path / "first")}
    recipe = small_recipe(
        tiny_model_folder,
        ranked,
        tmp_path / "second",
        model=model,
        adapter={},
        objective={"name": "dpo"},
        training=FAST,
    )
    train_recipe(recipe)
    losses = curve(tmp_path / "second")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (tmp_path / "second" / FILE).is_file()

    against_base = {"name": "dpo", "reference": "adapter_off"}
    recipe = small_recipe(
        tiny_model_folder, ranked, tmp_path / "base", model=model, adapter={}, objective=against_base, training=FAST
    )
    train_recipe(recipe)
    assert abs(curve(tmp_path / "base")[0] - math.log(2)) > 1e-3


@pytest.mark.parametrize("adapter", [None, {"r": 4, "init_lora_weights": "pissa"}], ids=["all weights", "pissa"])
def test_auto_caches_where_no_adapter_can_be_switched_off(tiny_model_folder, ranked, tmp_path, adapter):
    run = tmp_path / "run"
    training = {"learning_rate": 1e-3, "num_train_epochs": 2}
    train_recipe(
        small_recipe(tiny_model_folder, ranked, run, adapter=adapter, objective={"name": "dpo"}, training=training)
    )
    assert (run / FILE).is_file()
    assert curve(run)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert curve(run)[-1] < math.log(2) - 1e-3


def test_a_resumed_run_reads_its_cache(tiny_model_folder, ranked, tmp_path):
    """Stopped by its own data after a checkpoint, and resumed: as if nothing had happened."""
    training = {**FAST, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 5}
    objective = {"name": "dpo", "reference": "cached"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(small_recipe(tiny_model_folder, ranked, whole, objective=objective, training=training))

    recipe = small_recipe(tiny_model_folder, ranked, cut, objective=objective, training=training)
    train_recipe(recipe)
    written = (cut / FILE).read_bytes()
    (cut / "adapter_model.safetensors").unlink()
    for checkpoint in cut.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-5":
            (checkpoint / "trainer_state.json").unlink()  # as a kill while it was written leaves it
    assert last_checkpoint(cut).name == "checkpoint-5"
    train_recipe(recipe, resume=True)
    assert (cut / FILE).read_bytes() == written
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert curve(cut, name) == pytest.approx(curve(whole, name), rel=1e-6), name
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()

    for checkpoint in cut.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-5":
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)
    (cut / "adapter_model.safetensors").unlink()
    (cut / FILE).unlink()
    with pytest.raises(UserError, match=r"reference_log_probs\.safetensors: .* are missing"):
        train_recipe(recipe, resume=True)
    tensors = load_file(whole / FILE)
    tensors["train.num_tokens"] += 1
    save_file(tensors, cut / FILE)
    with pytest.raises(UserError, match="reference log-probs of other train data"):
        train_recipe(recipe, resume=True)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - ONLINE_ONLY))
def test_every_objective_trains_from_a_recipe(tiny_model_folder, tmp_path, name):
    groups = [{"prompt": f"say {i}", "responses": ["yes", "maybe", "no"], "scores": [2, 1, 0]} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in groups))
    run = tmp_path / "run"
    training = {**FAST, "num_train_epochs": 8}
    train_recipe(small_recipe(tiny_model_folder, data, run, objective={"name": name}, training=training))
    losses = curve(run)
    assert losses[-1] < losses[0]
    # mpo sets those above the group's mean against the others, whose order among themselves it does not teach.
    at_least = {"sft": 0.0, "mpo": 0.6}.get(name, 1.0)
    assert logged(run)[-1]["pair_accuracy"] >= at_least
    assert ("rewards/margins" in logged(run)[-1]) == (name in NEEDS_REFERENCE)
    if name in NEEDS_REFERENCE:
        assert logged(run)[-1]["rewards/margins"] > 0


def test_what_auto_means(tiny_model_folder):
    def fresh(**fields):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **fields}))

    def choice(model, wanted="auto", objective="dpo"):
        return resolve_reference(objective, wanted, model)

    assert choice(AutoModelForCausalLM.from_pretrained(tiny_model_folder)) == "cached"
    assert choice(fresh()) == "adapter_off"
    assert choice(fresh(use_dora=True, modules_to_save=["lm_head"])) == "adapter_off"
    assert choice(fresh(target_modules=["embed_tokens", "q_proj"])) == "adapter_off"
    assert choice(moved(fresh())) == "cached"
    assert choice(moved(fresh()), "adapter_off") == "adapter_off"  # the base is asked for, and can be had
    unfrozen = fresh()
    unfrozen.get_base_model().model.norm.weight.requires_grad_(True)
    for model, problem in [
        (fresh(init_lora_weights="pissa"), "init_lora_weights pissa moves a part of the base"),
        (unfrozen, r"norm\.weight', a weight of the base, is trained too"),
    ]:
        assert choice(model) == "cached"
        with pytest.raises(UserError, match=problem):
            choice(model, "adapter_off")
    changed = fresh(modules_to_save=["lm_head"])
    with torch.no_grad():
        changed.get_base_model().lm_head.modules_to_save["default"].weight += 1
    assert choice(changed) == "cached"

    assert choice(fresh(), None, "rrhf") is None
    assert choice(fresh(), None, "hinge") is None
    assert choice(fresh(), "auto", "hinge") == "adapter_off"
    assert choice(fresh(), None, "kto") == "adapter_off"
    with pytest.raises(UserError, match="rrhf compares with no reference policy"):
        choice(fresh(), "auto", "rrhf")
    with pytest.raises(UserError, match="dpo compares with a reference"):
        choice(fresh(), "none")
    with pytest.raises(UserError, match="there is no adapter"):
        choice(AutoModelForCausalLM.from_pretrained(tiny_model_folder), "adapter_off")


def test_the_cache_has_every_response_at_its_place_and_no_dropout(tiny_model_folder, ranked, tmp_path):
    """Looked up in any order, it is what the engine says of the starting policy in evaluation mode."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    model = moved(get_peft_model(base, config))
    trainer = RRHFTrainer(
        model=model,
        args=RRHFConfig(
            output_dir=str(tmp_path / "run"),
            objective="dpo",
            max_steps=1,
            learning_rate=0.0,
            per_device_eval_batch_size=3,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=read_groups(str(ranked)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    trainer.train()
    groups = list(trainer.train_dataset)
    batch = GroupCollator(trainer.source_names)([groups[i] for i in (11, 2, 15, 7)])
    got = trainer.reference_cache.look_up("train", batch)
    with torch.no_grad():
        expected = trainer.engine.log_probs(model.eval(), batch)
    torch.testing.assert_close(got.sum, expected.sum, rtol=1e-5, atol=1e-4)
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(one, other)


def test_groups_that_no_cache_holds_are_refused(tiny_model_folder, tmp_path):
    groups = [RankedGroup(f"say {i}", ["yes", "no"], [1.0, 0.0], ["a", "b"]) for i in range(4)]

    def trainer(train):
        return RRHFTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            args=RRHFConfig(output_dir=str(tmp_path), objective="dpo", use_cpu=True, disable_tqdm=True),
            train_dataset=train,
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        )

    held_out = trainer(groups)
    stranger = TokenizedGroup([3, 4], [[5, 2], [6, 2]], [1.0, 0.0], ["a", "b"], index=77)
    with pytest.raises(UserError, match="group 77 of the eval data has no cached reference"):
        held_out.evaluate([stranger])
    look_alike = dataclasses.replace(held_out.train_dataset[0], response_ids=[[5, 6, 2], [6, 2]])
    batch = GroupCollator(["a", "b"])([look_alike])
    with pytest.raises(UserError, match="group 0 of the train data has no cached reference"):
        held_out.reference_cache.look_up("train", batch)
    with pytest.raises(UserError, match="two groups of the train data have the index 77"):
        trainer([stranger, stranger])
