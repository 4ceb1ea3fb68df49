"""The arithmetic of the released RRHF trainer for one group of equal k, in float64.

Written from the description of what that code does, quirks included: labels aligned with the logits
by the collator, -100 overwritten by 0 before the length mask is taken, hence a mask of all ones.
"""

from __future__ import annotations

import torch


def released_loss(logits, labels, scores):
    """logits [k, L, V] and labels [k, L] (-100 where not a response token), scores [k] -> scalar loss."""
    log_probs = torch.log_softmax(logits, dim=-1)
    is_response = (labels != -100).to(logits.dtype)
    overwritten = labels.clone()
    overwritten[overwritten == -100] = 0
    picked = torch.gather(log_probs, -1, overwritten.unsqueeze(-1)).squeeze(-1) * is_response
    mask_taken_too_late = (overwritten != -100).to(logits.dtype)
    p = picked.sum(-1) / mask_taken_too_late.sum(-1)
    difference = p.unsqueeze(0) - p.unsqueeze(-1)  # [i, j] = p_j - p_i
    reward_difference = scores.unsqueeze(0) - scores.unsqueeze(-1)
    wrong = (reward_difference > 0) & (difference < 0)
    rank = -difference[wrong].sum()
    sft = -picked[torch.argmax(scores)].mean()
    return rank + sft
