"""Response log-probs from a float64 copy of the model, one sequence at a time, position by position."""

from __future__ import annotations

import copy

import torch


def float64_copy(model):
    """The same model in float64, without the engine, dropout off."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        module.__dict__.pop("forward", None)
    return twin.eval()


def response_sums(model, groups):
    """Sum of log P per response, for `groups` a list of (prompt ids, [response ids, ...])."""
    sums = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([[*prompt, *response]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            total = logits.new_zeros(())
            for step, token in enumerate(response):
                row = logits[len(prompt) + step - 1]
                total = total + row[token] - torch.logsumexp(row, dim=0)
            sums.append(total)
    return torch.stack(sums)
