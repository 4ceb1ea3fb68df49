"""Sizes, plans and files of weight shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rrhf_peft.merge.weights import PlannedTensor, parse_size, plan_shards, write_shards
from rrhf_peft.records import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("10KB", 10_000), (77, 77), ("77", 77)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0", "0.1", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="--shard-size"):
        parse_size(text)


def _planned(*sizes: int) -> list[PlannedTensor]:
    return [PlannedTensor(f"t{index}", (size,), torch.int8) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((4, 4, 4), 8, [[4, 4], [4]]),
        ((4, 4, 4), 100, [[4, 4, 4]]),
        ((1, 20, 1, 1), 8, [[1], [20], [1, 1]]),
        ((20, 20), 8, [[20], [20]]),
        ((3, 3, 3), 1, [[3], [3], [3]]),
    ],
)
def test_plans_fill_shards_in_order(sizes: tuple[int, ...], limit: int, expected: list[list[int]]) -> None:
    assert [[tensor.size for tensor in shard] for shard in plan_shards(_planned(*sizes), limit)] == expected


def test_a_tensor_knows_its_bytes() -> None:
    assert PlannedTensor("w", (3, 5), torch.bfloat16).size == 30
    assert PlannedTensor("w", (), torch.float32).size == 4


def test_files_and_index(tmp_path: Path) -> None:
    shards = plan_shards(_planned(4, 4, 4), 8)
    seen: list[str] = []
    write_shards(
        tmp_path,
        shards,
        lambda key: torch.full((4,), int(key[1]), dtype=torch.int8),
        lambda tensor: seen.append(tensor.key),
    )
    assert seen == ["t0", "t1", "t2"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00002.safetensors",
        "t1": "model-00001-of-00002.safetensors",
        "t2": "model-00002-of-00002.safetensors",
    }
    assert load_file(tmp_path / "model-00002-of-00002.safetensors")["t2"].tolist() == [2, 2, 2, 2]


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, plan_shards(_planned(4), 8), lambda key: torch.ones(4, dtype=torch.int8), lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_who_may_enter_the_folder_may_read_the_weights(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    write_shards(tmp_path, plan_shards(_planned(4), 8), lambda key: torch.ones(4, dtype=torch.int8), lambda _: None)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666
