"""Ragged groups of random log-probs for the objectives' tests, as tensors and as plain lists."""

from __future__ import annotations

import random

import torch

from rrhf_peft.records import ResponseLogProbs


def random_log_probs(seed: int, sizes: list[int], levels: int = 3) -> tuple[ResponseLogProbs, torch.Tensor]:
    """Float64 groups of the given sizes, with few distinct scores, so that ties are common."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 40) for _ in range(sum(sizes))]
    group = [index for index, k in enumerate(sizes) for _ in range(k)]
    padded = [max(lengths[i] for i in range(len(group)) if group[i] == g) + draw.randint(1, 9) for g in group]
    padded = [next(padded[i] for i in range(len(group)) if group[i] == g) for g in group]
    sums = torch.tensor([-draw.uniform(0.1, 4) * n for n in lengths], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([float(draw.randrange(levels)) for _ in lengths], dtype=torch.float64)
    return ResponseLogProbs(sums, torch.tensor(lengths), torch.tensor(padded), torch.tensor(group)), scores


def reference_of(log_probs: ResponseLogProbs, seed: int) -> ResponseLogProbs:
    """Another policy's log-probs of the same responses, some higher and some lower."""
    draw = random.Random(seed)
    shift = torch.tensor([draw.uniform(-0.7, 0.5) for _ in log_probs.sum], dtype=log_probs.sum.dtype)
    return log_probs._replace(sum=log_probs.sum.detach() + shift * log_probs.num_tokens)


def as_lists(
    log_probs: ResponseLogProbs, scores: torch.Tensor, reference: ResponseLogProbs
) -> list[tuple[list[float], list[float], list[int], list[float]]]:
    """The oracles' form: (sums, reference sums, lengths, scores) of every group."""
    columns = (log_probs.sum, reference.sum, log_probs.num_tokens, scores)
    members = [(log_probs.group == g).nonzero().flatten() for g in log_probs.group.unique()]
    return [tuple(column[rows].tolist() for column in columns) for rows in members]
