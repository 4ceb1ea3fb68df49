"""Top-p with a random stream for every response: exact, and the same in any company."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rrhf_peft.data import encode_prompts
from rrhf_peft.modeling import TokenBudget
from rrhf_peft.records import UserError
from rrhf_peft.sample.diverse_beam import diverse_beam_search
from rrhf_peft.sample.policies import Decoding
from rrhf_peft.sample.transformers_policy import StopStrings, draw, respond, sample_rows

#: Sizes of linear attention layers.
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PROMPTS = ["", "a", "Grüße aus Zürich 🙂", "Once upon a time there was", "x" * 60, "Human: why?"]


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model, AutoTokenizer.from_pretrained(tiny_model_folder)


def rows_of(tiny, prompts, keys, **settings):
    model, tokenizer = tiny
    keywords = {
        "temperature": 0.9,
        "top_p": 0.95,
        "max_new_tokens": 12,
        "ends": [2, *range(90, 120)],
        "pad": 0,
        **settings,
    }
    return sample_rows(model, prompts, keys, stop=StopStrings(tokenizer, ()), **keywords)


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_distribution_over_the_nucleus(top_p, temperature):
    torch.manual_seed(0)
    logits = torch.randn(50)
    probs = (logits.double() / temperature).softmax(-1)
    kept, total = [], 0.0
    for token in probs.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept.append(token)
        total += float(probs[token])
    expected = torch.zeros(50, dtype=torch.float64)
    expected[kept] = probs[kept] / probs[kept].sum()
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(logits.expand(count, -1), grid, temperature=temperature, top_p=top_p)
    found = torch.bincount(tokens, minlength=50).double() / count
    assert torch.allclose(found, expected, atol=1.5 / count)


def test_the_ends_of_the_stream_draw_tokens_that_can_be_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    tokens = draw(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), temperature=1.0, top_p=1.0)
    assert tokens.tolist() == [0, 2]


def test_company_padding_and_budget_do_not_change_a_response(tiny):
    prompts = encode_prompts(tiny[1], PROMPTS)
    keys = [[f"{index}/{number}" for number in range(3)] for index in range(len(prompts))]
    together = rows_of(tiny, prompts, keys)
    alone = [rows_of(tiny, [prompt], [own])[0] for prompt, own in zip(prompts, keys, strict=True)]
    one_by_one = [
        [rows_of(tiny, [prompt], [[key]])[0][0] for key in own] for prompt, own in zip(prompts, keys, strict=True)
    ]
    ids = [[item.ids for item in own] for own in together]
    assert ids == [[item.ids for item in own] for own in alone]
    assert ids == [[item.ids for item in own] for own in one_by_one]
    assert len({len(item) for own in ids for item in own}) > 3  # they ended at different places
    assert len({tuple(item) for own in ids for item in own}) > 10


def test_padding_does_not_shift_learnt_positions():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=40, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    prompts, keys = [[5], [6, 7, 8, 9, 10, 11, 12, 13]], [["a"], ["b"]]
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "ends": [59], "pad": 0}
    stop = StopStrings(None, ())
    together = sample_rows(model, prompts, keys, stop=stop, **settings)
    alone = [
        sample_rows(model, [prompt], [key], stop=stop, **settings)[0] for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert [own[0].ids for own in together] == [own[0].ids for own in alone]
    assert [own[0].log_prob for own in together] == pytest.approx([own[0].log_prob for own in alone], abs=1e-4)


#: Models whose layers keep a state beside keys and values, or instead of them.
HYBRIDS = {
    "qwen3_next": {"num_experts": 0, "mlp_only_layers": [0, 1, 2, 3], **LINEAR},
    "qwen3_5_text": {**LINEAR},
    "jamba": {
        "mamba_d_state": 8,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "mamba": {"state_size": 8},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids_give_several_responses_in_any_company(kind):
    """Recurrent states are copied for the k responses of a prompt and sorted out as rows end."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "pad_token_id": 0}
    if not kind.startswith("mamba"):
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **HYBRIDS[kind]})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    prompts = [[5], [6, 7, 8, 9, 10, 11, 12, 13], [9, 9, 9]]
    keys = [[f"{index}/{number}" for number in range(3)] for index in range(3)]
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "ends": [59, 58, 57], "pad": 0}
    stop = StopStrings(None, ())
    together = sample_rows(model, prompts, keys, stop=stop, **settings)
    assert len({tuple(item.ids) for row in together for item in row}) > 3
    for prompt, row in zip(prompts, together, strict=True):
        for item in row:
            assert item.log_prob == pytest.approx(log_prob_of(model, prompt, item.ids), abs=1e-3)
    beams = diverse_beam_search(
        model,
        prompts,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=1.0,
        max_new_tokens=8,
        ends=[59],
        pad=0,
        stop=stop,
    )
    for prompt, row in zip(prompts, beams, strict=True):
        assert row[0].log_prob == pytest.approx(log_prob_of(model, prompt, row[0].ids), abs=1e-3)


@torch.no_grad()
def log_prob_of(model, prompt, ids):
    """Of a response, by one forward pass over the whole text without a cache."""
    log_probs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(ids))


def test_log_probs_are_those_of_the_whole_text(tiny):
    model, _ = tiny
    prompts = encode_prompts(tiny[1], PROMPTS)
    found = rows_of(tiny, prompts, [[f"{index}"] for index in range(len(prompts))])
    for prompt, (item,) in zip(prompts, found, strict=True):
        assert item.log_prob == pytest.approx(log_prob_of(model, prompt, item.ids), abs=1e-4)


@pytest.mark.parametrize("strategy", ["top_p", "beam", "diverse_beam"])
def test_a_stop_string_ends_a_response_and_is_cut_off(tiny, strategy):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, PROMPTS)
    keys = [str(index) for index in range(len(prompts))]
    beams = {} if strategy == "top_p" else {"num_beams": 3, "num_beam_groups": 3 if strategy == "diverse_beam" else 1}
    free = Decoding(strategy, k=3, max_new_tokens=16, **beams)
    without = respond(model, tokenizer, prompts, keys, free, TokenBudget(4000))
    texts = [item.text for own in without for item in own]
    pairs = [text[place : place + 2] for text in texts for place in range(1, len(text) - 1)]
    stop = next(pair for pair in pairs if pair.isprintable() and pair.isascii())
    stopping = Decoding(strategy, k=3, max_new_tokens=16, stop=("no such text", stop), **beams)
    found = respond(model, tokenizer, prompts, keys, stopping, TokenBudget(4000))
    reasons = [item.finish_reason for own in found for item in own]
    assert "stop" in reasons
    assert not any(stop in item.text for own in found for item in own)
    if strategy == "top_p":  # the draws before it are the same
        for own, own_free in zip(found, without, strict=True):
            assert [item.text for item in own] == [item.text.split(stop)[0] for item in own_free]
            assert [item.finish_reason == "stop" for item in own] == [stop in item.text for item in own_free]
            assert all(a.num_tokens <= b.num_tokens for a, b in zip(own, own_free, strict=True))


def test_smaller_batches_when_memory_is_out(tiny):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, PROMPTS)
    keys = [str(index) for index in range(len(prompts))]
    decoding = Decoding("top_p", k=2, max_new_tokens=8)
    expected = respond(model, tokenizer, prompts, keys, decoding, TokenBudget(10_000))

    def refuse(rows):
        def hook(module, arguments, keywords):
            if len(keywords["input_ids"]) > rows:
                raise torch.OutOfMemoryError("out of memory")

        return model.register_forward_pre_hook(hook, with_kwargs=True)

    budget, seen = TokenBudget(10_000), []
    hook = refuse(4)
    try:
        found = respond(model, tokenizer, prompts, keys, decoding, budget, lambda *added: seen.append(added))
    finally:
        hook.remove()
    assert [[item.text for item in own] for own in found] == [[item.text for item in own] for own in expected]
    assert budget.halvings > 0
    assert budget.tokens < 10_000
    assert sum(groups for groups, _ in seen) == len(prompts)
    assert sum(tokens for _, tokens in seen) == sum(item.num_tokens for own in found for item in own)
    hook = refuse(1)
    try:
        with pytest.raises(UserError, match="does not fit into the accelerator's memory on its own"):
            respond(model, tokenizer, prompts, keys, decoding, TokenBudget(10_000))
    finally:
        hook.remove()


def test_beyond_the_context_is_an_error(tiny):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, ["a" * 505])
    with pytest.raises(UserError, match=r"context of 512. Set sampling.max_prompt_tokens to 502"):
        respond(model, tokenizer, prompts, ["0"], Decoding("top_p", k=1, max_new_tokens=10), TokenBudget(1))


def test_prompts_keep_one_bos_and_lose_their_beginning(tiny):
    tokenizer = tiny[1]
    ids = encode_prompts(tokenizer, ["", "abc", "<s>abc"])
    assert ids[0] == [1]
    assert ids[1] == ids[2]
    assert encode_prompts(tokenizer, ["abc"], max_tokens=3) == [[1, *ids[1][-2:]]]
    assert encode_prompts(tokenizer, ["abc"], add_bos=False) == [ids[1][1:]]
    assert encode_prompts(tokenizer, ["<s>abc"], add_bos=False) == [ids[1]]
