"""The shared layout on other people's models, and the self-check that catches those that cannot take it."""

from __future__ import annotations

import pytest
import torch
from logprobs.batches import as_batch, random_groups
from oracles.log_probs import float64_copy, response_sums
from transformers import AutoConfig, AutoModelForCausalLM

from rrhf_peft.logprobs import install, prove
from rrhf_peft.logprobs.engine import causal_lm_of
from rrhf_peft.records import UserError

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2}
SHARED = {
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 7},
    "qwen2": {**GQA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {**GQA, "head_dim": 8},
    "gemma2": {**GQA, "head_dim": 8, "sliding_window": 7, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GQA, "head_dim": 8, "sliding_window": 7},
    "cohere": {**GQA, "logit_scale": 0.25},
    "granite": {**GQA, "logits_scaling": 4.0},
    "phi": {},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {},
    "mixtral": {**GQA, "num_local_experts": 4, "sliding_window": None},
    "olmo2": GQA,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def tiny(kind, **changes):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes})).eval()


@pytest.mark.parametrize(
    ("kind", "attention"),
    # transformers has no SDPA for Gemma 2, whose attention scores are capped
    [
        (kind, attention)
        for kind in sorted(SHARED)
        for attention in ("sdpa", "eager")
        if (kind, attention) != ("gemma2", "sdpa")
    ],
)
def test_shared_layout_is_exact(kind, attention):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SHAPE, **SHARED[kind]})
    config._experts_implementation = "eager"  # the fused one has no float64 for the oracle
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    groups = random_groups(6, [3, 1, 4], VOCABULARY)
    batch = as_batch(groups)
    expected = response_sums(float64_copy(model), groups)
    engine = install(model, chunk_tokens=60)
    proof = prove(model, engine, batch)
    assert (proof.layout, proof.own_logits, proof.rejected) == ("shared", False, ())
    assert torch.allclose(engine.log_probs(model, batch).sum.double(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("mamba", {"state_size": 4, "expand": 2}),
        ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1}),
    ],
)
def test_models_that_cannot_share_fall_back_and_stay_exact(kind, changes):
    model = tiny(kind, **changes)
    groups = random_groups(6, [3, 2], VOCABULARY)
    batch = as_batch(groups)
    engine = install(model, layout="auto")
    proof = prove(model, engine, batch)
    assert proof.layout == engine.layout == "plain"
    expected = torch.stack(
        [
            torch.log_softmax(model(input_ids=torch.tensor([[*p, *r]])).logits[0].double(), -1)[
                torch.arange(len(p) - 1, len(p) + len(r) - 1), torch.tensor(r)
            ].sum()
            for p, responses in groups
            for r in responses
        ]
    )
    assert torch.allclose(engine.log_probs(model, batch).sum.double(), expected, atol=1e-3)


NEO = {
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 16,
}


@pytest.mark.parametrize("known", [True, False], ids=["by-its-config", "by-the-self-check"])
def test_a_window_the_mask_does_not_know_is_never_shared(known, monkeypatch):
    """GPT-Neo's local layers look 16 columns back, and the first two groups are too short for that to matter."""
    if not known:
        monkeypatch.setattr("rrhf_peft.logprobs.engine.shared_layout_obstacle", lambda config: None)
    model = tiny("gpt_neo", **NEO)
    groups = random_groups(6, [2, 2], VOCABULARY, longest_prompt=3, longest_response=2)
    groups += random_groups(7, [6, 5], VOCABULARY, longest_prompt=20, longest_response=12)
    batch = as_batch(groups)
    engine = install(model)
    assert engine.layout == ("plain" if known else "shared")
    proof = prove(model, engine, batch)
    assert proof.layout == "plain"
    assert bool(proof.rejected) != known
    expected = response_sums(float64_copy(model), groups)
    assert torch.allclose(engine.log_probs(model, batch).sum.double(), expected, atol=2e-4, rtol=1e-5)
    if known:
        with pytest.raises(UserError, match=r"engine\.layout: .*window_size 16"):
            install(model, layout="shared")


def test_layers_that_see_everything_share_although_a_window_is_named():
    model = tiny("gpt_neo", **{**NEO, "attention_types": [[["global"], 2]]})
    groups = random_groups(7, [6, 5], VOCABULARY)
    engine = install(model)
    assert prove(model, engine, as_batch(groups)).layout == "shared"
    expected = response_sums(float64_copy(model), groups)
    assert torch.allclose(engine.log_probs(model, as_batch(groups)).sum.double(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("limit", [150, 70])
def test_out_of_memory_is_no_refusal(limit):
    """A forward pass of more tokens than the memory holds: fewer are compared, and the layout stays."""
    model = tiny("llama", **GQA)
    groups = random_groups(6, [9, 8, 7], VOCABULARY)
    whole, shared = model.model.forward, []

    def limited(input_ids, **kwargs):
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if kwargs.get("position_ids") is not None:
            shared.append(int(kwargs["position_ids"].diff().lt(0).sum()) + len(input_ids))  # responses in these rows
        return whole(input_ids=input_ids, **kwargs)

    model.model.forward = limited
    engine = install(model)
    proof = prove(model, engine, as_batch(groups))
    assert (proof.layout, proof.own_logits, proof.rejected) == ("shared", False, ())
    assert proof.difference < 1e-5
    assert max(shared) >= 2


def test_a_memory_for_nothing_is_an_error():
    model = tiny("llama", **GQA)

    def none(**kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.forward = none
    with pytest.raises(UserError, match=r"memory does not hold two responses.*max_tokens"):
        prove(model, install(model), as_batch(random_groups(6, [3, 2], VOCABULARY)))


def test_the_self_check_catches_a_mask_that_is_ignored():
    model = tiny("llama", **GQA)
    inner = causal_lm_of(model)
    whole = inner.model.forward
    inner.model.forward = lambda **kwargs: whole(**{**kwargs, "attention_mask": None})
    engine = install(model, layout="shared")
    batch = as_batch(random_groups(6, [3, 2], VOCABULARY))
    proof = prove(model, engine, batch)
    assert proof.layout == "plain"
    assert "differ by" in proof.rejected[0]
    engine.layout = "shared"
    with pytest.raises(ValueError, match=r"engine\.layout: shared does not give"):
        prove(model, engine, batch, fall_back=False)


def test_the_self_check_catches_logits_the_head_does_not_know():
    model = tiny("llama", **GQA)
    original = type(model).forward

    def louder(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = louder.__get__(model)
    engine = install(model)
    groups = random_groups(6, [3, 2], VOCABULARY)
    proof = prove(model, engine, as_batch(groups))
    assert (proof.layout, proof.own_logits) == ("plain", True)
    assert len(proof.rejected) == 2
    engine.log_probs(model, as_batch(groups)).sum.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_the_self_check_leaves_the_training_mode_alone():
    model = tiny("llama", **GQA)
    model.train()
    prove(model, install(model), as_batch(random_groups(6, [1], VOCABULARY)))
    assert model.training


def test_flex_attention_gets_the_same_mask_as_sdpa():
    from rrhf_peft.logprobs.layout import plan_chunks, shared_mask

    config = AutoConfig.for_model("llama", **SHAPE, **GQA)
    (rows,) = plan_chunks([5, 3], [4, 2, 6, 1], [0, 0, 1, 1], layout="shared", chunk_tokens=1000)
    config._attn_implementation = "sdpa"
    dense = shared_mask(rows, config, torch.float32)
    config._attn_implementation = "flex_attention"
    block = shared_mask(rows, config, torch.float32)
    b = torch.arange(dense.shape[0]).view(-1, 1, 1)
    place = torch.arange(dense.shape[-1])
    assert torch.equal(block.mask_mod(b, b, place.view(1, -1, 1), place.view(1, 1, -1)), dense[:, 0])
