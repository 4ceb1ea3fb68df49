"""Stop strings: noticed while tokens come in, cut off the text at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


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
        places = [place for place in (text.find(stop) for stop in self.strings) if place >= 0]
        return (text[: min(places)], True) if places else (text, False)


class StopStringCriteria(StoppingCriteria):
    """`StopStrings` for transformers' `generate`; sees the response only, not the prompt."""

    def __init__(self, stop: StopStrings, prompt_width: int) -> None:
        self.stop, self.prompt_width = stop, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, self.prompt_width :][:, -self.stop.reach :].tolist()
        return torch.tensor([self.stop.hit(tail) for tail in tails], device=input_ids.device)
