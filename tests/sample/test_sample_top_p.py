"""Top-p sampling: what comes back is exactly what the model would write, text for text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import encode_prompts, tokenize_groups
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.transformers_policy import sample_top_p

PROMPTS = ["A fox", "The old mill stood by the river and", "", "Two", "Every morning the baker"]


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)


def greedy(model: Any, tokenizer: Any, prompt: str, steps: int) -> list[int]:
    """Ids of the likeliest continuation, one forward over the whole text at a time."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


def test_nearly_greedy_sampling_is_greedy_decoding_for_prompts_of_any_length_in_one_batch(tiny: Any) -> None:
    model, tokenizer = tiny
    texts = sample_top_p(model, tokenizer, PROMPTS, k=2, temperature=1e-4, max_new_tokens=12, batch_size=64)
    for prompt, own in zip(PROMPTS, texts, strict=True):
        expected = tokenizer.decode(greedy(model, tokenizer, prompt, 12), skip_special_tokens=True)
        assert own == [expected, expected]


def test_draws_follow_the_models_distribution_inside_the_nucleus_and_never_leave_it(tiny: Any) -> None:
    model, tokenizer = tiny
    ids = torch.tensor(encode_prompts(tokenizer, ["A fox"]))
    temperature, top_p = 0.05, 0.7
    probabilities = torch.softmax(model(ids).logits[0, -1] / temperature, -1)
    ordered, order = probabilities.sort(descending=True)
    inside = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    assert 3 <= len(inside) < 100
    texts = sample_top_p(
        model, tokenizer, ["A fox"], k=3000, temperature=temperature, top_p=top_p, max_new_tokens=1, batch_size=3000
    )[0]
    expected = probabilities[inside] / probabilities[inside].sum()
    by_text: dict[str, float] = {}
    for token, share in zip(inside.tolist(), expected.tolist(), strict=True):
        text = tokenizer.decode([token], skip_special_tokens=True)
        by_text[text] = by_text.get(text, 0) + share
    assert set(texts) <= set(by_text)
    for text, share in by_text.items():
        assert abs(texts.count(text) / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5 + 1e-3


def test_a_response_ends_at_its_end_token_and_carries_no_special_text(tiny: Any) -> None:
    model, tokenizer = tiny
    # Make the end token likely, so that responses in one batch end at different places.
    model = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.5 * model.lm_head.weight.std()
    texts = sample_top_p(model, tokenizer, PROMPTS * 4, k=4, max_new_tokens=200)
    lengths = {len(tokenizer(text)["input_ids"]) for own in texts for text in own}
    assert len(lengths) > 5
    assert min(lengths) < 150
    assert not any(re.search("<s>|</s>|<pad>", text) for own in texts for text in own)


def test_an_end_token_that_the_tokenizer_does_not_call_special_stays_out_of_the_text(tiny: Any) -> None:
    model, tokenizer = tiny
    model = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    end = greedy(model, tokenizer, "A fox", 1)[0]  # what it writes first is made to end a response
    assert tokenizer.decode([end], skip_special_tokens=True) != ""
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    assert sample_top_p(model, tokenizer, ["A fox"], k=1, temperature=1e-4, max_new_tokens=9) == [[""]]


def test_the_same_seed_repeats_another_differs_and_the_callers_randomness_is_untouched(tiny: Any) -> None:
    model, tokenizer = tiny
    settings: dict[str, Any] = {"k": 3, "max_new_tokens": 8, "batch_size": 6}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample_top_p(model, tokenizer, PROMPTS, seed=4, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample_top_p(model, tokenizer, PROMPTS, seed=4, **settings) == first
    assert sample_top_p(model, tokenizer, PROMPTS, seed=5, **settings) != first
    assert len({text for own in first for text in own}) > 10


def test_progress_counts_every_response_and_the_models_mode_is_kept(tiny: Any) -> None:
    model, tokenizer = tiny
    counted: list[int] = []
    model.train()
    sample_top_p(model, tokenizer, PROMPTS, k=3, max_new_tokens=2, batch_size=7, progress=counted.append)
    assert model.training
    assert sum(counted) == 15
    assert len(counted) > 1
    assert sample_top_p(model, tokenizer, [], k=3, max_new_tokens=2) == []


def test_an_adapter_is_sampled_with_its_weights(tiny: Any) -> None:
    _, tokenizer = tiny
    base = AutoModelForCausalLM.from_pretrained(tiny[0].name_or_path)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    settings: dict[str, Any] = {"k": 1, "temperature": 1e-4, "max_new_tokens": 12}
    with_adapter = sample_top_p(model, tokenizer, PROMPTS, **settings)
    with model.disable_adapter():
        assert sample_top_p(model, tokenizer, PROMPTS, **settings) != with_adapter


def test_prompts_get_the_ids_that_training_gives_them(tiny: Any, tinystories: Path) -> None:
    for tokenizer in (tiny[1], AutoTokenizer.from_pretrained(tinystories)):
        prompts = ["A fox", f"{tokenizer.bos_token}A fox", "", "  two  spaces "]
        groups = [RankedGroup(prompt, ["a", "b"], [0.0, 1.0], ["x", "x"]) for prompt in prompts]
        tokenized, _ = tokenize_groups(groups, tokenizer)
        assert encode_prompts(tokenizer, prompts) == [list(group.prompt_ids) for group in tokenized]


def test_texts_join_their_prompts_as_the_model_wrote_them(tinystories: Path) -> None:
    """This tokenizer writes spaces at the end of tokens: decoded alone, a text may begin otherwise."""
    model, tokenizer = (kind.from_pretrained(tinystories) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompts = ["Once upon a time, there was a little girl named Lily. She", "One day, Tom saw a dog."]
    texts = sample_top_p(model, tokenizer, prompts, k=1, temperature=1e-4, max_new_tokens=20)
    for prompt, (text,) in zip(prompts, texts, strict=True):
        new = [token for token in greedy(model, tokenizer, prompt, 20) if token != tokenizer.eos_token_id]
        assert prompt + text == tokenizer.decode(tokenizer(prompt, add_special_tokens=False)["input_ids"] + new)


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_impossible_settings_are_named(tiny: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} = "):
        sample_top_p(*tiny, PROMPTS, **{"k": 1, "max_new_tokens": 2, **wrong})
