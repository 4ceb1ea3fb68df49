"""Likelihood of texts under a judge whose context is short: the prompt's beginning goes first, then the text's end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.log_probs import float64_copy, response_sums
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.evaluate.measure import text_log_probs


@torch.no_grad()
def test_what_does_not_fit_is_cut(tiny_model_folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    prompts = ["short", "p" * 600 + "q", "any", "x"]
    texts = [" text", "ends", "", "t" * 520]
    found = text_log_probs(model, tokenizer, prompts, texts, batch_tokens=600)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    kept = [
        ([1, *tokenizer("short")["input_ids"]], [ids[0]]),
        (tokenizer(prompts[1])["input_ids"][-508:], [ids[1]]),  # 508 and 4 are the context of 512
        (tokenizer("x")["input_ids"], [ids[3][:511]]),
    ]
    expected = response_sums(float64_copy(model), kept).tolist()
    assert found[2] == (0.0, 0)
    assert [tokens for _, tokens in found] == [5, 4, 0, 511]
    assert [found[place][0] for place in (0, 1, 3)] == pytest.approx(expected, rel=1e-5)
