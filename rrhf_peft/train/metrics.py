"""Training metrics as exact means: totals and weights are summed over micro-batches and processes first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from rrhf_peft.records import Mean, Metrics, ResponseLogProbs

#: More sources than this are not logged one by one.
MOST_SOURCES = 32


class MetricSums:
    """Running totals of named means. All processes must add the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one micro-batch's means; stays on their device, without waiting for it."""
        for name, mean in metrics.items():
            pair = torch.stack([mean.total.double(), mean.weight.double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over everything added on any process since the last call; collective."""
        if not self._sums:
            return {}
        names = list(self._sums)
        stacked = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
        self._sums = {}
        return {
            name: total / weight for name, (total, weight) in zip(names, stacked.tolist(), strict=True) if weight > 0
        }


def source_metrics(log_probs: ResponseLogProbs, source: torch.Tensor, names: Sequence[str]) -> Metrics:
    """Mean log-prob per token of each source's responses, as `logps/<source>`.

    Args:
        log_probs: per response, [N].
        source: int64 [N], index into `names`.
        names: all sources of the data set; the first `MOST_SOURCES` are logged.
    """
    p = log_probs.sum.detach() / log_probs.num_tokens
    total = p.new_zeros(len(names)).index_add(0, source, p)
    count = p.new_zeros(len(names)).index_add(0, source, torch.ones_like(p))
    return {f"logps/{name}": Mean(total[i], count[i]) for i, name in enumerate(names[:MOST_SOURCES])}
