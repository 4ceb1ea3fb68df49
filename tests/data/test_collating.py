"""A batch holds exactly its groups: the tensors taken apart again are the groups that went in."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_peft.data import GroupCollator, source_names
from rrhf_peft.records import GroupBatch, RankedGroup, TokenizedGroup

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9).map(lambda values: array("i", values))


@st.composite
def tokenized(draw):
    k = draw(st.integers(1, 32))
    return TokenizedGroup(
        draw(ids),
        draw(st.lists(ids, min_size=k, max_size=k)),
        draw(st.lists(st.floats(allow_nan=False), min_size=k, max_size=k)),
        draw(st.lists(st.sampled_from("abc"), min_size=k, max_size=k)),
        draw(st.integers(0, 10**6)),
    )


@settings(deadline=None)
@given(st.lists(tokenized(), min_size=1, max_size=6))
def test_a_batch_taken_apart_is_its_groups(groups):
    names = source_names(groups)
    batch = GroupCollator(names)(groups)
    rest = batch["input_ids"].tolist()
    responses = list(
        zip(batch["group"].tolist(), batch["response_lengths"].tolist(), batch["scores"].tolist(),
            batch["source"].tolist(), strict=True)
    )  # fmt: skip
    for place, group in enumerate(groups):
        own = [entry for entry in responses if entry[0] == place]
        prompt, rest = rest[: batch["prompt_lengths"][place]], rest[batch["prompt_lengths"][place] :]
        assert prompt == list(group.prompt_ids)
        for (_, length, score, source), expected, *names_and_scores in zip(
            own, group.response_ids, group.scores, group.sources, strict=True
        ):
            response, rest = rest[:length], rest[length:]
            assert response == list(expected)
            assert [score, names[source]] == names_and_scores
        assert batch["index"][place] == group.index
    assert rest == []
    assert batch["group"].tolist() == sorted(batch["group"].tolist())


def test_keys_and_types_are_the_contract():
    group = TokenizedGroup(array("i", [1, 5]), [array("i", [6, 2]), array("i", [2])], [1.0, 0.1], ["x", "y"], 7)
    batch = GroupCollator(["x", "y"])([group])
    assert list(batch) == list(GroupBatch.__annotations__)
    assert next(iter(batch)) == "prompt_lengths"  # Trainer counts a batch by its first tensor
    for name, tensor in batch.items():
        assert tensor.dtype == (torch.float64 if name == "scores" else torch.int64)
        assert tensor.ndim == 1
    assert batch["input_ids"].tolist() == [1, 5, 6, 2, 2]
    assert batch["scores"].tolist() == [1.0, 0.1]


def test_source_names_are_ordered_by_frequency_then_name():
    groups = [
        TokenizedGroup([1], [[2]] * 3, [1.0] * 3, ["b", "c", "c"], 0),
        RankedGroup("p", ["r"] * 2, [1.0] * 2, ["a", "c"]),
    ]
    assert source_names(groups) == ["c", "a", "b"]


def test_an_unknown_source_is_an_error():
    group = TokenizedGroup([1], [[2]], [1.0], ["new"], 0)
    with pytest.raises(ValueError, match="source 'new' is not among"):
        GroupCollator(["old"])([group])
