"""Token ids in rows and back: padding on the left, end tokens, and the text of a response after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both int64 [rows, longest row]."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
    }


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and whatever else the model's own generation settings stop at."""
    own = model.generation_config.eos_token_id
    stops = own if isinstance(own, list) else [own]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})


def response_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]) -> str:
    """The response as it reads after its prompt: decoded alone, some tokenizers lose its first space."""
    before, whole = (
        str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt, [*prompt, *response])
    )
    return whole[len(before) :]
