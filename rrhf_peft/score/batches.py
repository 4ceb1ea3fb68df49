"""Rows of tokens in batches of a bounded size, smaller ones where the GPU's memory asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from rrhf_peft.records import UserError

Result = TypeVar("Result")


class TokenBudget:
    """How many padded tokens a batch may hold; halved for good when the GPU runs out of memory.

    Args:
        tokens: rows times longest row of a batch. A single longer row is a batch by itself.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.halvings = 0

    def map(self, lengths: Sequence[int], compute: Callable[[list[int]], Sequence[Result]]) -> list[Result]:
        """Call `compute` with the indices of each batch, longest rows first, and put its results in order.

        The batches depend on `lengths` and the budget alone.

        Args:
            lengths: tokens of each row.
            compute: indices of a batch -> one result for each.

        Raises:
            UserError: a single row does not fit into the memory.
        """
        results: dict[int, Result] = {}
        todo = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        while todo:
            count = max(1, self.tokens // max(1, lengths[todo[0]]))
            batch = todo[:count]
            try:
                computed = compute(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise UserError(
                        f"a text of {lengths[batch[0]]} tokens does not fit into the accelerator's memory. Lower "
                        "scoring.scorer.max_tokens, or score on a larger device."
                    ) from None
                self.tokens = len(batch) // 2 * lengths[batch[0]]
                self.halvings += 1
                computed = None
            if computed is None:  # outside the handler, which still holds the failed batch's tensors
                torch.cuda.empty_cache()
                continue
            results.update(zip(batch, computed, strict=True))
            todo = todo[len(batch) :]
        return [results[index] for index in range(len(lengths))]
