"""One token at a time through a causal LM with its KV cache: what the decoding strategies share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from rrhf_peft.sample.token_rows import left_padded


class CachedSteps:
    """Prompts read once, then R rows that grow by one token a step.

    Row ``prompt * copies + copy`` continues that prompt. The prompts pass the model once, and the cache is
    repeated afterwards.

    Args:
        model: Causal LM, or a PEFT model around one, in evaluation mode.
        prompts: Token ids of each prompt; never empty.
        pad: Any token id; padded positions are masked.
        copies: Rows for each prompt.

    Attributes:
        logits: float32 [R, V], of the next token of every row.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int, copies: int) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = set(inspect.signature(base.forward).parameters)
        rows = left_padded(prompts, pad, model.device)
        self._mask = rows["attention_mask"]
        self._cache: Any = None  # the model makes the kind it needs
        logits = self._forward(rows["input_ids"])
        if copies > 1:
            cache: Any = self._cache
            cache.batch_repeat_interleave(copies)
            self._mask = self._mask.repeat_interleave(copies, 0)
            logits = logits.repeat_interleave(copies, 0)
        self.logits = logits

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Append `tokens` (int64 [R']) to the rows `parents` (int64 [R'], by default all in order)."""
        if parents is not None:
            self._cache.reorder_cache(parents)
            self._mask = self._mask[parents]
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), 1)
        self.logits = self._forward(tokens[:, None])

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": self._mask,
            "position_ids": (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(**{name: value for name, value in arguments.items() if name in self._accepts})
        self._cache = output.past_key_values
        return output.logits[:, -1].float()
