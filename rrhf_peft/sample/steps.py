"""What the decoding strategies share: rows that grow by one token a step, stop strings, and what comes of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import UserError


class Generated(NamedTuple):
    """Token ids of one response, its end token included, and the sum of their log-probs."""

    ids: list[int]
    log_prob: float


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both int64 [rows, longest row]."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
    }


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

    Raises:
        UserError: the logits are not numbers, or the model keeps no cache whose rows can be copied.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int, copies: int) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = set(inspect.signature(base.forward).parameters)
        # Models whose every layer keeps a state (Mamba) call their cache by another name.
        self._cache_name = "past_key_values" if "past_key_values" in self._accepts else "cache_params"
        rows = left_padded(prompts, pad, model.device)
        self._mask = rows["attention_mask"]
        self._cache: Any = None  # the model makes the kind it needs
        logits = self._forward(rows["input_ids"])
        if not hasattr(self._cache, "reorder_cache"):
            raise UserError(
                f"{type(base).__name__}: keeps its state where rows cannot be copied, so it cannot be sampled here. "
                "Serve it, for example with vLLM, and set backend: endpoint."
            )
        self.logits = logits
        if copies > 1:
            # Not `batch_repeat_interleave`, which layers with a recurrent state do not have.
            self._select(torch.arange(len(prompts), device=logits.device).repeat_interleave(copies))

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Append `tokens` (int64 [R']) to the rows `parents` (int64 [R'], by default all in order)."""
        if parents is not None:
            self._select(parents)
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), 1)
        self.logits = self._forward(tokens[:, None])

    def _select(self, rows: torch.Tensor) -> None:
        self._cache.reorder_cache(rows)
        self._mask, self.logits = self._mask[rows], self.logits[rows]

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            # A state has passed over the padding already, and such a model takes the mask for that of the new tokens.
            "attention_mask": None if self._cache is not None and self._cache_name == "cache_params" else self._mask,
            "position_ids": (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            self._cache_name: self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(**{name: value for name, value in arguments.items() if name in self._accepts})
        self._cache = getattr(output, self._cache_name, None)
        logits: torch.Tensor = output.logits[:, -1].float()
        # The largest logit is NaN where any is. A draw from it would be a token all the same.
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise UserError(
                f"the model {self.model.config.name_or_path or type(self.model).__name__} gives logits that are not "
                "numbers. Its weights are damaged, or their dtype is too narrow: check the files, or set model.dtype: "
                "float32."
            )
        return logits


class StopStrings:
    """Says whether generated tokens spell one of the stop strings.

    Only the last tokens are looked at, as many as the longest stop string has bytes and a few more: a
    token that writes anything writes at least one byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self.reach = max((len(text.encode()) for text in strings), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self.strings)

    def hit(self, response: Sequence[int]) -> bool:
        """Whether the end of a response's token ids spells a stop string."""
        tail = self.tokenizer.decode(list(response[-self.reach :]), skip_special_tokens=True)
        return any(text in tail for text in self.strings)

    def cut(self, text: str) -> tuple[str, bool]:
        """The text before the first stop string, and whether there was one."""
        ends = [end for end in (text.find(stop) for stop in self.strings) if end >= 0]
        return (text[: min(ends)], True) if ends else (text, False)
