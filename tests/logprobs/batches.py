"""Random ragged groups as token ids, and as the batch the engine takes."""

from __future__ import annotations

import random

import torch


def random_groups(seed, sizes, vocabulary, longest_prompt=30, longest_response=17):
    """[(prompt ids, [response ids, ...]), ...]; about a third of the responses have one token."""
    draw = random.Random(seed)

    def ids(length):
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    return [
        (
            ids(draw.randint(1, longest_prompt)),
            [ids(draw.choice([1, draw.randint(1, longest_response), longest_response])) for _ in range(k)],
        )
        for k in sizes
    ]


def as_batch(groups, scores=None, device="cpu"):
    owners = [g for g, (_, responses) in enumerate(groups) for _ in responses]
    flat = [token for prompt, responses in groups for part in (prompt, *responses) for token in part]
    return {
        "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in groups], device=device),
        "response_lengths": torch.tensor([len(r) for _, responses in groups for r in responses], device=device),
        "group": torch.tensor(owners, device=device),
        "scores": torch.tensor(scores if scores is not None else [0.0] * len(owners), dtype=torch.float64),
        "input_ids": torch.tensor(flat, device=device),
    }
