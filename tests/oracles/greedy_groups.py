"""Coupled greedy decodings by brute force: the whole text through the model for every token, no cache, no batch."""

from __future__ import annotations

import torch


def coupled_greedy(model, prompt, *, groups, penalty, temperature, max_new_tokens, ends):
    """G greedy decodings side by side; a token costs `penalty` for each earlier group that goes on with it."""
    responses = [[] for _ in range(groups)]
    log_probs = [0.0] * groups
    finished = [False] * groups
    for _ in range(max_new_tokens):
        taken = {}
        for group in range(groups):
            if finished[group]:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([prompt + responses[group]])).logits[0, -1].double()
            scores = (logits / temperature).log_softmax(-1)
            for token, times in taken.items():
                scores[token] -= penalty * times
            best = int(scores.argmax())
            responses[group].append(best)
            log_probs[group] += float(logits.log_softmax(-1)[best])
            if best in ends:
                finished[group] = True
            else:
                taken[best] = taken.get(best, 0) + 1
    return responses, log_probs
