"""The engine against a float64 oracle: values and adapter gradients, every layout, chunking and head."""

from __future__ import annotations

import random

import pytest
import torch
from logprobs.batches import as_batch, random_groups
from oracles.log_probs import float64_copy, response_sums
from oracles.released import released_loss
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rrhf_peft.logprobs import install, uninstall
from rrhf_peft.logprobs.engine import causal_lm_of
from rrhf_peft.objectives import kto, rrhf
from rrhf_peft.records import ResponseLogProbs

VOCABULARY = 97
SIZES = [[3], [1, 5, 2], [32], [2, 7, 1, 3, 4]]


def small_llama(**changes):
    torch.manual_seed(1)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, "tie_word_embeddings": False, **changes}))


def with_lora(model, **fields):
    torch.manual_seed(2)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return trained_gradients(model)


def trained_gradients(model):
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.requires_grad}


def step(engine, model, batch, loss_of, **options):
    """The loss and its gradients, turn by turn, as training takes them; and the number of turns."""
    model.zero_grad()
    shares = []

    def noting(log_probs, responses):
        shares.append(loss_of(log_probs, responses))
        return shares[-1]

    turns = engine.turns(model, batch, noting, **options)
    for turn in turns:
        turn().backward()
    return sum(share.item() for share in shares), trained_gradients(model), len(turns)


def mean_of_groups(batch, objective=rrhf, **options):
    """A loss over whole groups as its share in the mean over all groups of the batch."""

    def loss_of(log_probs, responses):
        loss, _ = objective(log_probs, batch["scores"][responses], **options)
        return loss * (int(log_probs.group[-1]) + 1) / len(batch["prompt_lengths"])

    return loss_of


def relative_error(got, expected):
    """Norm of the difference over all parameters, over the norm of the expected gradient."""
    difference = sum(((got[name] - expected[name]) ** 2).sum() for name in expected).sqrt()
    return (difference / sum((value**2).sum() for value in expected.values()).sqrt()).item()


def random_scores(groups, seed):
    draw = random.Random(seed)
    return [float(draw.randrange(4)) for _, responses in groups for _ in responses]


@pytest.mark.parametrize("variant", ["balanced", "paper", "released"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("chunk_tokens", [40, 100_000])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loss_and_adapter_gradients_equal_the_float64_oracle(variant, layout, chunk_tokens, sizes):
    model = with_lora(small_llama())
    groups = random_groups(sum(sizes), sizes, VOCABULARY)
    scores = random_scores(groups, sum(sizes))
    batch = as_batch(groups, scores)

    twin = float64_copy(model)
    sums = response_sums(twin, groups)
    lengths = torch.tensor([len(r) for _, responses in groups for r in responses])
    padded = torch.tensor([len(p) + max(map(len, rs)) for p, rs in groups for _ in rs])
    expected, _ = rrhf(ResponseLogProbs(sums, lengths, padded, batch["group"]), batch["scores"], variant=variant)
    expected_gradients = gradients(twin, expected)

    engine = install(model, layout=layout, chunk_tokens=chunk_tokens)
    log_probs = engine.log_probs(model, batch)
    assert torch.equal(log_probs.num_tokens, lengths)
    assert torch.equal(log_probs.padded_length, padded)
    loss, _ = rrhf(log_probs, batch["scores"], variant=variant)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert relative_error(gradients(model, loss), expected_gradients) < 1e-4

    loss, by_turns, turns = step(engine, model, batch, mean_of_groups(batch, variant=variant))
    assert turns == 1 or chunk_tokens == 40
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert relative_error(by_turns, expected_gradients) < 1e-4


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, None],
    ids=["lora-on-head", "trained-head", "dora", "all-weights"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_kind_of_head(fields, tied):
    base = small_llama(tie_word_embeddings=tied)
    model = base if fields is None else with_lora(base, **fields)
    groups = random_groups(4, [3, 2], VOCABULARY)
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = float64_copy(model)
    expected = gradients(twin, (response_sums(twin, groups) * weights).sum())
    for chunk_tokens in (25, 10_000):
        engine = install(model, chunk_tokens=chunk_tokens)
        _, got, turns = step(engine, model, as_batch(groups), lambda own, which: (own.sum * weights[which]).sum())
        assert (turns > 1) == (chunk_tokens == 25)
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "layers-checkpointed"])
def test_chunks_with_gradient_checkpointing(checkpointing):
    model = with_lora(small_llama())
    batch = as_batch(random_groups(9, [6, 4], VOCABULARY))
    whole = install(model, chunk_tokens=100_000)
    expected = gradients(model, whole.log_probs(model, batch).sum.square().sum())
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    engine = install(model, chunk_tokens=30)
    _, got, turns = step(engine, model, batch, lambda own, which: own.sum.square().sum())
    assert turns > 2
    assert relative_error(got, expected) < 1e-5  # float32: 1.3e-6 has been seen where kernels sum in another order


@pytest.mark.parametrize("k", [2, 5, 16])
def test_released_variant_is_the_released_codes_arithmetic(k):
    model = with_lora(small_llama())
    (group,) = random_groups(k, [k], VOCABULARY)
    prompt, responses = group
    scores = torch.tensor(random_scores([group], k), dtype=torch.float64)
    longest = len(prompt) + max(map(len, responses))
    ids = torch.zeros(k, longest, dtype=torch.int64)
    labels = torch.full((k, longest), -100)
    for row, response in enumerate(responses):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(response)
    twin = float64_copy(model)
    expected = released_loss(twin(input_ids=ids, use_cache=False).logits, labels, scores)
    expected_gradients = gradients(twin, expected)

    exact = ResponseLogProbs(
        response_sums(twin, [group]),
        torch.tensor([len(r) for r in responses]),
        torch.full((k,), longest),
        torch.zeros(k, dtype=torch.int64),
    )
    assert rrhf(exact, scores, variant="released")[0].item() == pytest.approx(expected.item(), rel=1e-13)

    engine = install(model)
    loss, _ = rrhf(engine.log_probs(model, as_batch([group])), scores, variant="released")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients(model, loss), expected_gradients) < 1e-5


def test_group_of_one_token_prompt_and_one_token_responses():
    model = small_llama()
    groups = [([5], [[6], [7], [6]]), ([9], [[3]])]
    expected = response_sums(float64_copy(model), groups)
    for layout in ("shared", "plain"):
        got = install(model, layout=layout).log_probs(model, as_batch(groups)).sum
        assert torch.allclose(got.double(), expected, atol=1e-5)


def test_results_come_back_in_the_order_of_the_batch():
    model = small_llama()
    groups = random_groups(3, [2, 4, 3], VOCABULARY)
    whole = install(model, chunk_tokens=10_000).log_probs(model, as_batch(groups)).sum
    split = install(model, chunk_tokens=20).log_probs(model, as_batch(groups)).sum
    alone = [install(model).log_probs(model, as_batch([group])).sum for group in groups]
    assert torch.allclose(whole, split, atol=1e-4)
    assert torch.allclose(whole, torch.cat(alone), atol=1e-4)


def test_no_full_logits_and_bounded_memory(monkeypatch):
    """Every slice of logits is as small as the head's budget says, in both passes."""
    from rrhf_peft.logprobs import head

    monkeypatch.setitem(head._SLICE_ELEMENTS, "cpu", 5 * VOCABULARY)
    seen = []
    product = head._product
    monkeypatch.setattr(head, "_product", lambda *args: seen.append(len(args[0])) or product(*args))
    for model in (with_lora(small_llama()), small_llama()):
        engine = install(model, chunk_tokens=50)
        step(engine, model, as_batch(random_groups(1, [4, 4], VOCABULARY)), lambda own, which: own.sum.sum())
    assert seen
    assert max(seen) <= 5


def test_freed_memory_goes_back_between_chunks(monkeypatch):
    """One chunk leaves nothing behind for another."""
    from rrhf_peft.logprobs import engine as module

    returned = []
    monkeypatch.setattr(module, "_malloc_trim", lambda: returned.append)
    model, batch = with_lora(small_llama()), as_batch(random_groups(1, [4, 4], VOCABULARY))
    step(install(model), model, batch, lambda own, which: own.sum.sum())
    assert returned == []
    engine, passes = install(model, chunk_tokens=60), forwards_of(model)
    step(engine, model, batch, lambda own, which: own.sum.sum())
    assert len(returned) == len(passes) > 1
    monkeypatch.setattr(module, "_malloc_trim", lambda: None)  # another C library
    step(engine, model, batch, lambda own, which: own.sum.sum())
    assert len(returned) == len(passes) / 2


def test_the_models_own_forward_still_works(tinystories):
    model = AutoModelForCausalLM.from_pretrained(tinystories)
    ids = torch.tensor([[1, 44, 55, 66]])
    own = model(input_ids=ids).logits
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    install(model)
    assert torch.equal(model(input_ids=ids).logits, own)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
    uninstall(model)
    assert "forward" not in model.__dict__


def test_tokens_are_counted():
    model = small_llama()
    engine = install(model)
    groups = [([3, 4, 5], [[6], [7, 8]]), ([3], [[4, 5], [6], [7]])]
    step(engine, model, as_batch(groups), lambda own, which: own.sum.sum())
    assert (engine.tokens.responses, engine.tokens.seen, engine.tokens.unshared) == (7, 11, 7 + 6 + 3)
    with torch.no_grad():
        engine.log_probs(model, as_batch(groups))
    assert engine.tokens.seen == 11


def forwards_of(model):
    """[(tokens of the forward pass, whether it makes a graph), ...], filled as the model runs."""
    passes = []
    layers = causal_lm_of(model).model
    whole = layers.forward

    def noting(*args, **kwargs):
        passes.append((kwargs["input_ids"].numel(), torch.is_grad_enabled()))
        return whole(*args, **kwargs)

    layers.forward = noting
    return passes


def test_whole_groups_are_computed_once_and_only_an_oversized_one_twice():
    model = with_lora(small_llama()).train()
    passes = forwards_of(model)
    short, long = random_groups(5, [3, 2, 4], VOCABULARY), random_groups(6, [12], VOCABULARY)
    longest = max(len(p) + sum(map(len, rs)) for p, rs in short)
    batch = as_batch(short, random_scores(short, 1))
    *_, turns = step(install(model, chunk_tokens=longest), model, batch, mean_of_groups(batch))
    assert [graph for _, graph in passes] == [True] * turns
    assert turns > 1
    passes.clear()
    groups = short + long
    batch = as_batch(groups, [float(n) for n in range(21)])
    assert len(long[0][0]) + sum(map(len, long[0][1])) > longest
    loss_of = mean_of_groups(batch, pair_reduction="mean", margin=100.0)  # every response has a gradient
    step(install(model, chunk_tokens=longest), model, batch, loss_of)
    again = [tokens for tokens, graph in passes if not graph]
    assert len(again) > 1
    assert [tokens for tokens, graph in passes if graph][-len(again) :] == again
    assert len(passes) == turns + 2 * len(again)


def test_chunks_without_a_gradient_are_left_out():
    """Of 64 responses, all in order but the last two, only those that the hinge still moves go backward."""
    model = with_lora(small_llama()).train()
    (group,) = random_groups(8, [64], VOCABULARY)
    with torch.no_grad():
        engine = install(model, chunk_tokens=100_000)
        p = engine.log_probs(model, as_batch([group]))
        scores = (p.sum / p.num_tokens).double()
    best, second = scores.topk(2).indices.tolist()
    scores[best], scores[second] = scores[second].item(), scores[best].item()
    batch = {**as_batch([group]), "scores": scores}
    loss_of = mean_of_groups(batch, sft_weight=0.0)
    expected_loss, expected, _ = step(engine, model, batch, loss_of)
    assert expected_loss > 0
    passes = forwards_of(model)
    loss, got, turns = step(install(model, chunk_tokens=120), model, batch, loss_of)
    chunks = sum(not graph for _, graph in passes)
    assert chunks > 5
    assert turns == sum(graph for _, graph in passes) <= 2
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert relative_error(got, expected) < 1e-4
    batch["scores"] = torch.zeros(64, dtype=torch.float64)  # ties alone: no gradient, and still one backward pass
    _, got, turns = step(install(model, chunk_tokens=120), model, batch, loss_of)
    assert turns == 1
    assert all(not gradient.any() for gradient in got.values())


@pytest.mark.parametrize("sizes", [[64], [7, 30, 2]], ids=str)
def test_dropout_masks_are_the_same_in_both_passes(sizes):
    """The chunks' own masks decide the loss: gradients are those of these very chunks, kept whole."""
    model = with_lora(small_llama(), lora_dropout=0.5).train()
    groups = random_groups(3, sizes, VOCABULARY)
    batch = as_batch(groups, random_scores(groups, 3))
    engine = install(model, chunk_tokens=60)
    torch.manual_seed(5)
    log_probs = engine.log_probs(model, batch)
    loss_of = mean_of_groups(batch, margin=1.0)
    whole = loss_of(log_probs, torch.arange(sum(sizes)))
    expected = gradients(model, whole)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    loss, got, turns = step(engine, model, batch, loss_of, couples_groups=True)
    assert turns > 2
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    assert relative_error(got, expected) < 1e-5
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("chunk_tokens", [60, 100_000])
def test_objectives_that_couple_groups_see_all_of_them(chunk_tokens):
    model = with_lora(small_llama())
    groups = random_groups(3, [2, 7, 4], VOCABULARY)
    batch = as_batch(groups, random_scores(groups, 3))
    engine = install(model, chunk_tokens=100_000)
    with torch.no_grad():
        reference = engine.log_probs(model, batch)
        reference = reference._replace(sum=reference.sum + torch.randn(13, generator=torch.Generator().manual_seed(1)))

    def loss_of(log_probs, responses):
        assert len(responses) == 13
        return kto(log_probs, batch["scores"], reference=reference)[0]

    loss = loss_of(engine.log_probs(model, batch), torch.arange(13))
    expected = gradients(model, loss)
    got_loss, got, turns = step(install(model, chunk_tokens=chunk_tokens), model, batch, loss_of, couples_groups=True)
    assert (turns > 1) == (chunk_tokens == 60)
    assert got_loss == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(got, expected) < 1e-5
