"""Nucleus sampling in which every response has its own random stream: SP in https://arxiv.org/abs/2304.05302.

A row's draws come from numbers of its own, so they do not depend on which rows share its batch, how many
processes work, or where a run was interrupted. Equal up to floating-point noise in the logits: where
a draw falls within 1e-7 of the border between two tokens, another batch may give the other one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from rrhf_peft.sample.steps import CachedSteps, Generated, StopStrings


def uniform_stream(key: str, length: int) -> list[float]:
    """`length` numbers in [0, 1) that depend on `key` alone, on every machine."""
    stream = random.Random(key)
    return [stream.random() for _ in range(length)]


def draw(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """One token for each row, by inverting the cumulative distribution over the nucleus.

    Args:
        logits: [R, V].
        uniforms: float64 [R], in [0, 1).
        temperature: Divides the logits; above 0.
        top_p: The nucleus is the fewest tokens whose probabilities sum to at least this.

    Returns:
        int64 [R].
    """
    probs = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # what comes before already holds top_p
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    aim = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, aim[:, None], right=True)[:, 0]


@torch.no_grad()
def sample_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[str]],
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    stop: StopStrings,
) -> list[list[Generated]]:
    """Draw responses to each prompt, as many as it has keys (the same number for all).

    Args:
        prompts: Token ids.
        keys: For each prompt, the names of its responses' random streams.
        ends: Token ids that end a response.
        pad: Any token id.
        stop: Strings that end a response.
    """
    copies = len(keys[0])
    flat = [key for row in keys for key in row]
    uniforms = torch.tensor([uniform_stream(key, max_new_tokens) for key in flat], dtype=torch.float64)
    steps = CachedSteps(model, prompts, pad, copies)
    uniforms = uniforms.to(steps.logits.device)
    end_tokens = torch.tensor(list(ends), device=steps.logits.device)
    ids: list[list[int]] = [[] for _ in flat]
    log_probs = torch.zeros(len(flat), dtype=torch.float64, device=steps.logits.device)
    rows = torch.arange(len(flat), device=steps.logits.device)  # which response each row of the cache is
    alive = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens = draw(steps.logits, uniforms[rows, step], temperature=temperature, top_p=top_p)
        chosen = steps.logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        log_probs[rows[alive]] += chosen[alive].double()
        ended = torch.isin(tokens, end_tokens)
        for index, (row, token, counts) in enumerate(zip(rows.tolist(), tokens.tolist(), alive.tolist(), strict=True)):
            if counts:
                ids[row].append(token)
                if stop and stop.hit(ids[row]):
                    ended[index] = True
        alive &= ~ended
        left = int(alive.sum())
        if left == 0 or step == max_new_tokens - 1:
            break
        parents = None
        if 2 * left <= len(rows):  # copying the cache pays when half of its rows are done
            parents = alive.nonzero()[:, 0]
            rows, tokens, alive = rows[parents], tokens[parents], alive[parents]
        steps.advance(tokens, parents)
    flat_generated = [Generated(row, total) for row, total in zip(ids, log_probs.tolist(), strict=True)]
    return [flat_generated[start : start + copies] for start in range(0, len(flat), copies)]
