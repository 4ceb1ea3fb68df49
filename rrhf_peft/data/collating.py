"""Tokenized groups into the flat tensors of a `GroupBatch`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from rrhf_peft.records import GroupBatch, RankedGroup, TokenizedGroup


def source_names(groups: Iterable[TokenizedGroup | RankedGroup]) -> list[str]:
    """Every source of these groups once, the most frequent first, equally frequent ones by name."""
    counts = Counter(source for group in groups for source in group.sources)
    return sorted(counts, key=lambda source: (-counts[source], source))


class GroupCollator:
    """Data collator: a list of groups becomes one `GroupBatch`; k may differ from group to group.

    Args:
        source_names: The list that ``GroupBatch.source`` points into; holds every source of the data.
    """

    def __init__(self, source_names: Sequence[str]) -> None:
        self.source_names = list(source_names)
        self._place = {source: place for place, source in enumerate(self.source_names)}

    def __call__(self, groups: Sequence[TokenizedGroup]) -> GroupBatch:
        """Shapes as in `GroupBatch`.

        Raises:
            ValueError: a group has a source that is not among the collator's names.
        """
        unknown = sorted({source for group in groups for source in group.sources} - self._place.keys())
        if unknown:
            raise ValueError(
                f"source {unknown[0]!r} is not among the collator's source_names. Make these from training and "
                "evaluation groups together."
            )
        stretches = (chain(group.prompt_ids, *group.response_ids) for group in groups)
        # prompt_lengths comes first: Trainer takes the batch size, which is in groups, from the first tensor.
        return GroupBatch(
            prompt_lengths=_int64(len(group.prompt_ids) for group in groups),
            response_lengths=_int64(len(ids) for group in groups for ids in group.response_ids),
            group=_int64(place for place, group in enumerate(groups) for _ in group.response_ids),
            scores=torch.tensor([score for group in groups for score in group.scores], dtype=torch.float64),
            source=_int64(self._place[source] for group in groups for source in group.sources),
            index=_int64(group.index for group in groups),
            input_ids=_int64(chain.from_iterable(stretches)),
        )


def _int64(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
