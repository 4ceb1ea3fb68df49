"""Own diverse beam search against transformers' beam search, a brute-force oracle, and on real prompts."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from oracles.greedy_groups import coupled_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rrhf_peft.data import encode_prompts
from rrhf_peft.modeling import TokenBudget
from rrhf_peft.sample.diverse_beam import diverse_beam_search
from rrhf_peft.sample.policies import Decoding
from rrhf_peft.sample.transformers_policy import StopStrings, left_padded, respond

SETTINGS = [
    {},
    {"early_stopping": True},
    {"early_stopping": "never"},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0, "early_stopping": "never"},
]


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    # An untrained model is flat over its vocabulary: sharpen it, and let it end now and then.
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    return model, AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def stories(tinystories):
    return AutoModelForCausalLM.from_pretrained(tinystories).eval(), AutoTokenizer.from_pretrained(tinystories)


def some_ends(model, tokenizer, prompts):
    """EOS and a few tokens that the model likes to write, so that beams finish at many different steps."""
    written = transformers_beams(model, prompts, [tokenizer.eos_token_id], 3, 20)
    seen = collections.Counter(token for own in written for ids in own for token in ids[5:])
    return [tokenizer.eos_token_id, *(token for token, _ in seen.most_common(4)[1:])]


def search(model, tokenizer, prompts, ends, **settings):
    keywords = {"diversity_penalty": 0.0, "num_beam_groups": 1, "pad": tokenizer.pad_token_id, **settings}
    return diverse_beam_search(model, prompts, ends=ends, stop=StopStrings(tokenizer, ()), **keywords)


def transformers_beams(model, prompts, ends, beams, length, **settings):
    rows = left_padded(prompts, 0, model.device)
    generation = GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=length,
        eos_token_id=ends,
        pad_token_id=0,
        do_sample=False,
        **settings,
    )
    output = model.generate(**rows, generation_config=generation)[:, rows["input_ids"].shape[1] :].tolist()
    cut = []
    for ids in output:
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
        cut.append(ids[: end + 1])
    return [cut[start : start + beams] for start in range(0, len(cut), beams)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_one_group_is_transformers_beam_search(tiny, beams, settings):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, ["", "a", "Once upon a time", "Zürich 🙂", "The cat sat on the mat and"])
    ends = some_ends(model, tokenizer, prompts)
    found = search(model, tokenizer, prompts, ends, num_beams=beams, max_new_tokens=12, **settings)
    expected = transformers_beams(model, prompts, ends, beams, 12, **settings)
    assert [[item.ids for item in own] for own in found] == expected
    if settings.get("length_penalty") != 2.0:  # which goes for the longest
        assert len({len(ids) for own in expected for ids in own}) > 2  # they ended at different places


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_one_group_is_transformers_beam_search_on_stories(stories, shared_data, settings):
    model, tokenizer = stories
    prompts = encode_prompts(tokenizer, story_beginnings(shared_data, 6))
    ends = some_ends(model, tokenizer, prompts)
    found = search(model, tokenizer, prompts, ends, num_beams=4, max_new_tokens=24, **settings)
    expected = transformers_beams(model, prompts, ends, 4, 24, **settings)
    assert [[item.ids for item in own] for own in found] == expected
    assert len({len(ids) for own in expected for ids in own}) > 5  # they ended at different places


@pytest.mark.parametrize(("groups", "penalty", "temperature"), [(4, 1.0, 0.8), (3, 0.3, 1.0), (5, 20.0, 2.0)])
def test_groups_of_one_beam_are_coupled_greedy_decodings(tiny, groups, penalty, temperature):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, ["", "x", "Once upon a time", "Human: why?"])
    ends = some_ends(model, tokenizer, prompts)
    found = search(
        model,
        tokenizer,
        prompts,
        ends,
        num_beams=groups,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        temperature=temperature,
        max_new_tokens=10,
    )
    for prompt, own in zip(prompts, found, strict=True):
        expected, log_probs = coupled_greedy(
            model,
            prompt,
            groups=groups,
            penalty=penalty,
            temperature=temperature,
            max_new_tokens=10,
            ends=ends,
        )
        assert [item.ids for item in own] == expected
        assert [item.log_prob for item in own] == pytest.approx(log_probs, abs=1e-4)


def test_groups_of_several_beams_without_a_penalty_are_all_the_same_beam_search(tiny):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, ["Once", "The end of"])
    ends = [tokenizer.eos_token_id]
    one = search(model, tokenizer, prompts, ends, num_beams=2, max_new_tokens=8)
    two = search(model, tokenizer, prompts, ends, num_beams=4, num_beam_groups=2, max_new_tokens=8)
    for single, double in zip(one, two, strict=True):
        ranks = [item.ids for item in single]
        assert [item.ids for item in double] == [ranks[0], ranks[0], ranks[1], ranks[1]]


def test_padding_and_company_do_not_change_a_prompt(tiny):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, ["", "b", "A rather long prompt that pads the other ones a lot"])
    ends = some_ends(model, tokenizer, prompts)
    settings = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "max_new_tokens": 10}
    together = search(model, tokenizer, prompts, ends, **settings)
    alone = [search(model, tokenizer, [prompt], ends, **settings)[0] for prompt in prompts]
    assert [[item.ids for item in own] for own in together] == [[item.ids for item in own] for own in alone]


def test_diverse_beams_differ_clearly_more_than_plain_beams(stories, shared_data):
    model, tokenizer = stories
    prompts = encode_prompts(tokenizer, story_beginnings(shared_data, 20))
    shares = {}
    for strategy, extra in (
        ("beam", {}),
        ("diverse_beam", {"num_beam_groups": 4, "diversity_penalty": 1.0, "temperature": 0.8}),
    ):
        decoding = Decoding(strategy, k=4, max_new_tokens=32, num_beams=4, **extra)
        keys = [str(index) for index in range(len(prompts))]
        found = respond(model, tokenizer, prompts, keys, decoding, TokenBudget(20_000))
        shares[strategy] = [
            sum(distinct([item.text.split() for item in own], n) for own in found) / len(found) for n in (1, 2)
        ]
    print(shares)
    for plain, diverse in zip(shares["beam"], shares["diverse_beam"], strict=True):
        assert diverse > 1.5 * plain


def distinct(texts, n):
    """Share of different n-grams among those of a group's texts."""
    grams = [tuple(words[place : place + n]) for words in texts for place in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def story_beginnings(shared_data, count):
    stories = json.loads((shared_data / "text" / "tinystories_1000.json").read_text(encoding="utf-8"))
    return [" ".join(story.split()[:12]) for story in stories[:count]]
