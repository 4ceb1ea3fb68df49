"""Perplexity and p_i against a slow float64 oracle, whatever the padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.log_probs import float64_copy, response_sums
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import tokenize_groups
from rrhf_peft.evaluate.measure import mean_log_probs, perplexity
from rrhf_peft.evaluate.statistics import pair_accuracy
from rrhf_peft.records import RankedGroup, UserError

PROMPTS = ["A fox", "The old mill stood by the river and", "", "Two"]
TEXTS = [" ran.", "", " was quiet", " are better than one, and three are better still."]


@pytest.fixture(scope="module")
def judge(tiny_model_folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)


@torch.no_grad()
def test_perplexity_weighs_every_token_alike(judge: Any) -> None:
    model, tokenizer = judge
    groups = [
        ([1, *tokenizer(prompt)["input_ids"]], [tokenizer(text)["input_ids"]])
        for prompt, text in zip(PROMPTS, TEXTS, strict=True)
        if text
    ]
    sums = response_sums(float64_copy(model), groups)
    expected = math.exp(-float(sums.sum()) / sum(len(responses[0]) for _, responses in groups))
    for batch_tokens in (1, 100, 16384):
        found = perplexity(model, tokenizer, PROMPTS, TEXTS, batch_tokens=batch_tokens)
        assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_special_tokens_written_out_in_a_text_are_text(judge: Any) -> None:
    model, tokenizer = judge
    assert perplexity(model, tokenizer, ["A"], ["</s>"]) != pytest.approx(
        math.exp(-float(response_sums(float64_copy(model), [([1, *tokenizer("A")["input_ids"]], [[2]])])[0])), rel=1e-3
    )


def test_p_i_is_the_mean_over_the_response_and_its_end(judge: Any) -> None:
    model, tokenizer = judge
    ragged = [["a", " longer answer", "mid"], ["yes.", "no, never"]]
    groups = [
        RankedGroup(prompt, own, [float(place) for place in range(len(own))], ["x"] * len(own))
        for prompt, own in zip(PROMPTS, ragged, strict=False)
    ]
    tokenized, _ = tokenize_groups(groups, tokenizer)
    pairs = [(list(group.prompt_ids), [list(ids) for ids in group.response_ids]) for group in tokenized]
    sums = iter(response_sums(float64_copy(model), pairs).tolist())
    expected = [[next(sums) / len(ids) for ids in responses] for _, responses in pairs]
    for batch_tokens in (1, 100, 16384):
        found = mean_log_probs(model, tokenized, batch_tokens=batch_tokens)
        assert found == [pytest.approx(own, rel=1e-5) for own in expected]
    assert 0 <= pair_accuracy(found, [group.scores for group in tokenized]) <= 1


def test_nothing_to_judge_and_too_much_to_read_are_user_errors(judge: Any) -> None:
    model, tokenizer = judge
    with pytest.raises(UserError, match="every text is empty"):
        perplexity(model, tokenizer, ["A"], [""])
    with pytest.raises(UserError, match="602 tokens, and the judging model reads 512"):
        perplexity(model, tokenizer, ["A"], ["b" * 600])


def test_the_models_mode_is_kept(judge: Any) -> None:
    model, tokenizer = judge
    model.train()
    perplexity(model, tokenizer, ["A"], ["b"])
    assert model.training


def test_a_real_model_finds_its_own_stories_likelier_than_shuffled_ones(tinystories: Path) -> None:
    model, tokenizer = (kind.from_pretrained(tinystories) for kind in (AutoModelForCausalLM, AutoTokenizer))
    story = " went to the park with her mom. She saw a big dog and was happy."
    shuffled = " " + " ".join(sorted(story.split()))
    right, wrong = (perplexity(model, tokenizer, ["One day, Lily"], [text]) for text in (story, shuffled))
    assert 2 * right < wrong
