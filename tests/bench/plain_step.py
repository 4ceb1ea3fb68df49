"""The step to beat, the way the released trainer works: k padded rows, full logits, float32 log-softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def plain_loss(model, groups, scores, pad_id=0):
    """Mean balanced RRHF loss over groups [(prompt ids, [response ids, ...]), ...] with scores [[...], ...]."""
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), -100)
    attention = torch.zeros((len(rows), longest), dtype=torch.int64)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(response)
        attention[row, :end] = 1
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    log_probs = F.log_softmax(logits.float(), dim=-1)
    mask = labels != -100
    picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
    means = picked.sum(-1) / mask.sum(-1)
    loss, row = means.new_zeros(()), 0
    for (_, responses), reward in zip(groups, scores, strict=True):
        p, r = means[row : row + len(responses)], torch.tensor(reward)
        row += len(responses)
        difference = p.unsqueeze(1) - p.unsqueeze(0)  # [i, j] = p_i - p_j
        worse = r.unsqueeze(1) < r.unsqueeze(0)
        loss = loss + F.relu(difference[worse]).sum() - p[r.argmax()]
    return loss / len(groups)
