"""Sharded work: every unit exactly once, whatever is killed and however many processes come back."""

from __future__ import annotations

import json

import pytest

from rrhf_peft.jobs import ShardedOutput
from rrhf_peft.records import UserError


def rows_of(unit):
    return [{"index": 2 * unit + i, "text": f"é🙂 {unit}"} for i in range(2)]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


EVERYTHING = [row for unit in range(7) for row in rows_of(unit)]


def test_two_processes_then_three_make_the_same_file(tmp_path):
    output = tmp_path / "out.jsonl"
    for process in range(2):
        shards = ShardedOutput(output, fingerprint="a", units=7, process=process, processes=2)
        if process == 0:
            assert shards.open() == 0
        for unit in shards.pending()[:2]:
            shards.write(unit, rows_of(unit))
    continued = [ShardedOutput(output, fingerprint="a", units=7, process=p, processes=3) for p in range(3)]
    assert continued[0].open() == 4
    todo = [shards.pending() for shards in continued]
    assert sorted(unit for units in todo for unit in units) == [4, 5, 6]
    for shards, units in zip(continued, todo, strict=True):
        for unit in units:
            shards.write(unit, rows_of(unit))
    assert continued[0].merge() == output
    assert read(output) == EVERYTHING
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_is_done_again(tmp_path, cut):
    shards = ShardedOutput(tmp_path / "out.jsonl", fingerprint="a", units=7)
    shards.open()
    for unit in range(3):
        shards.write(unit, rows_of(unit))
    part = tmp_path / "out.jsonl.parts" / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    assert shards.open() == 2
    assert shards.pending() == [2, 3, 4, 5, 6]
    for unit in shards.pending():
        shards.write(unit, rows_of(unit))
    shards.merge()
    assert read(tmp_path / "out.jsonl") == EVERYTHING


def test_other_work_and_finished_work_are_left_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    shards = ShardedOutput(output, fingerprint="a", units=1)
    shards.open()
    shards.write(0, rows_of(0))
    with pytest.raises(UserError, match="other work"):
        ShardedOutput(output, fingerprint="b", units=1).open()
    assert ShardedOutput(output, fingerprint="b", units=1).open(overwrite=True) == 0
    shards = ShardedOutput(output, fingerprint="b", units=1)
    shards.write(0, rows_of(0))
    shards.merge()
    with pytest.raises(UserError, match="already exists"):
        shards.open()
    assert read(output) == rows_of(0)


def test_merging_unfinished_work_is_a_defect(tmp_path):
    shards = ShardedOutput(tmp_path / "out.jsonl", fingerprint="a", units=2)
    shards.open()
    shards.write(1, rows_of(1))
    with pytest.raises(AssertionError, match="1 of 2"):
        shards.merge()
    assert not (tmp_path / "out.jsonl").exists()
