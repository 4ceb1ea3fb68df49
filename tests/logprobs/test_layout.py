"""Where tokens go: every one once, whole groups together, and little room wasted."""

from __future__ import annotations

import json
import random
from itertools import accumulate

import pytest
from transformers import AutoConfig, LlamaConfig

from rrhf_peft.logprobs.engine import attention_tokens
from rrhf_peft.logprobs.layout import plan_chunks

LLAMA_7B = LlamaConfig()  # hidden size 4096, 32 heads, intermediate size 11008


def lengths_of(seed, count, most=9):
    draw = random.Random(seed)
    prompts = [draw.randint(1, 60) for _ in range(count)]
    responses = [[draw.randint(1, 80) for _ in range(draw.randint(1, most))] for _ in range(count)]
    return prompts, responses


def planned(prompts, responses, **options):
    owners = [g for g, lengths in enumerate(responses) for _ in lengths]
    flat = [length for lengths in responses for length in lengths]
    return plan_chunks(prompts, flat, owners, **options), owners


@pytest.mark.parametrize("attention", [20.0, 300.0, 8000.0])
@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("chunk_tokens", [40, 300, 1000, 100_000])
def test_every_response_is_in_one_chunk_and_groups_that_fit_are_whole(layout, chunk_tokens, attention):
    prompts, responses = lengths_of(chunk_tokens, 24)
    options = {"layout": layout, "chunk_tokens": chunk_tokens, "attention_tokens": attention}
    chunks, owners = planned(prompts, responses, **options)
    assert sorted(int(r) for rows in chunks for r in rows.response) == list(range(len(owners)))
    stretches = [length for p, rs in zip(prompts, responses, strict=True) for length in (p, *rs)]
    starts = list(accumulate(stretches, initial=0))
    firsts = [starts[index] for index in (r + owners[r] + 1 for r in range(len(owners)))]
    for rows in chunks:
        offset = 0
        for response, length in zip(rows.response.tolist(), rows.length.tolist(), strict=True):
            target = rows.target[offset : offset + length].tolist()
            assert target == list(range(firsts[response], firsts[response] + length))
            offset += length
        held = {owners[r] for r in rows.response.tolist()}
        whole = all({r for r, g in enumerate(owners) if g == own} <= set(rows.response.tolist()) for own in held)
        assert whole != rows.is_part
        fits = rows.token.numel() <= chunk_tokens
        assert fits or len(rows.response) == 1
    for g, (prompt, lengths) in enumerate(zip(prompts, responses, strict=True)):
        least = prompt + sum(lengths) if layout == "shared" else len(lengths) * (prompt + max(lengths))
        in_parts = any(rows.is_part and g in {owners[r] for r in rows.response.tolist()} for rows in chunks)
        assert in_parts == (least > chunk_tokens and len(lengths) > 1)
    assert [rows.token.tolist() for rows in planned(prompts, responses, **options)[0]] == [
        rows.token.tolist() for rows in chunks
    ]


def test_many_responses_behind_a_short_prompt_take_several_narrow_rows():
    (rows,), _ = planned([20], [[50] * 32], layout="shared", chunk_tokens=4000, attention_tokens=500)
    assert rows.token.shape[0] > 4
    assert rows.num_padded <= 0.05 * rows.token.numel()
    (rows,), _ = planned([1500], [[50] * 32], layout="shared", chunk_tokens=4000, attention_tokens=500)
    assert rows.token.shape[0] == 1  # the prompt is too dear to be computed twice


def test_a_group_that_barely_fits_a_chunk_is_not_computed_twice():
    chunks, _ = planned([20], [[50] * 8], layout="shared", chunk_tokens=430, attention_tokens=50)
    assert [rows.is_part for rows in chunks] == [False]


@pytest.mark.parametrize("name", ["fgrlhf_dev_k4", "hh_harmless_test_k2", "alpaca_eval_k16_300"])
@pytest.mark.parametrize("chunk_tokens", [2048, 8192])
def test_real_groups_waste_less_than_a_twentieth(shared_data, name, chunk_tokens):
    """At the shape of a 7B model, in batches of 8 as they come; words stand for tokens, 3 for 4."""
    rows = [json.loads(line) for line in (shared_data / f"ranked/{name}.jsonl").read_text().splitlines()[:200]]
    groups = [
        [min(400, 2 + 4 * len(str(text).split()) // 3) for text in (row["prompt"], *row["responses"])] for row in rows
    ]
    random.Random(0).shuffle(groups)
    padded = total = 0
    for start in range(0, len(groups), 8):
        part = groups[start : start + 8]
        chunks, _ = planned(
            [prompt for prompt, *_ in part],
            [responses for _, *responses in part],
            layout="shared",
            chunk_tokens=chunk_tokens,
            attention_tokens=attention_tokens(LLAMA_7B),
        )
        padded += sum(chunk.num_padded for chunk in chunks)
        total += sum(chunk.token.numel() for chunk in chunks)
    assert padded < 0.05 * total


def test_the_shape_decides_what_attention_costs():
    assert 15_000 < attention_tokens(LLAMA_7B) < 18_000
    assert attention_tokens(AutoConfig.for_model("mamba")) == float("inf")
