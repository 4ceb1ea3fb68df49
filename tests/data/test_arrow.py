"""Data too large for memory is the same data, read and tokenized once, and mapped from disk afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from rrhf_peft.data import (
    GroupCollator,
    GroupTable,
    TokenTable,
    hold_out,
    open_groups,
    read_groups,
    source_names,
    tokenize_groups,
    tokenizing,
)
from rrhf_peft.records import UserError

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Why {n}?"}] if n % 7 == 0 else f"Why {n % 50}?",
        "responses": ["because é😀", "x" * (n % 9), f"so {n}", "so"][: 2 + n % 3],
        "scores": [1, 0.1 * n, -3.0, n % 2][: 2 + n % 3],
        "sources": ["a", "b", "a", "c"][: 2 + n % 3],
        "finish_reasons": [None, "length", "eos", None][: 2 + n % 3],
        "truth": None if n % 5 else {"answer": [n]},
    }
    for n in range(2300)
]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as too large for memory, and a cache of its own."""
    monkeypatch.setattr("rrhf_peft.data.reading.HELD_IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_table_of_groups_is_the_list_of_groups(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, table = read_groups(large), open_groups(large)
    assert isinstance(table, GroupTable)
    assert len(table) == len(groups) == 2300
    for one, other in zip(groups, table, strict=True):
        assert (one.row(), one.columns, one.origin, one.index) == (
            other.row(),
            other.columns,
            other.origin,
            other.index,
        )
    assert [group.index for group in table[5:8]] == [5, 6, 7]
    assert (table[-1].prompt, table[2299].where) == (groups[-1].prompt, groups[-1].where)
    train, held = hold_out(groups, 0.1, seed=3)
    train_table, held_table = hold_out(table, 0.1, seed=3)
    assert isinstance(held_table, GroupTable)
    assert [group.index for group in train] == [group.index for group in train_table]
    assert [group.index for group in held] == [group.index for group in held_table]
    assert len(open_groups(large, max_groups=10)) == 10
    # Not read a second time, unless it has changed.
    monkeypatch.setattr("rrhf_peft.data.reading.rows_of", lambda *_, **__: pytest.fail("reads the file again"))
    assert len(open_groups(large)) == 2300
    large.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(pytest.fail.Exception, match="reads the file again"):
        open_groups(large)


def test_a_table_becomes_the_tokens_that_a_list_becomes(large, byte_tokenizer, monkeypatch) -> None:
    settings = {"max_tokens": 40, "min_score_gap": 0.5}
    groups, report = tokenize_groups(read_groups(large), byte_tokenizer, **settings)
    table, table_report = tokenize_groups(open_groups(large), byte_tokenizer, **settings)
    assert isinstance(table, TokenTable)
    assert table_report.groups_dropped  # batches of which a part is left out
    assert table_report == report
    assert source_names(table) == source_names(groups)
    collate = GroupCollator(source_names(table))
    for start in (0, 1, 700, len(groups) - 3):
        one, other = collate(groups[start : start + 3]), collate([table[start], *table[start + 1 : start + 3]])
        assert all(one[name].equal(other[name]) for name in one)  # type: ignore[literal-required]
    monkeypatch.setattr(tokenizing, "tokenized", lambda *_: pytest.fail("tokenizes again"))
    again, same = tokenize_groups(open_groups(large), byte_tokenizer, **settings)
    assert (len(again), same) == (len(table), table_report)
    with pytest.raises(pytest.fail.Exception, match="tokenizes again"):
        tokenize_groups(open_groups(large, max_groups=99), byte_tokenizer, **settings)


def test_errors_of_large_data_are_those_of_small_data(large: Path, byte_tokenizer) -> None:
    with pytest.raises(UserError, match=r"large\.jsonl:1: the prompt has \d+ tokens and the limit is 3"):
        tokenize_groups(open_groups(large), byte_tokenizer, max_prompt_tokens=3, overlong_prompt="error")
    with pytest.raises(UserError, match="no data is left: of 2300 groups read"):
        tokenize_groups(open_groups(large), byte_tokenizer, min_score_gap=1e9)
    large.write_text(large.read_text() + "{\n")
    with pytest.raises(UserError, match=r"large\.jsonl:2301: this is not valid JSON"):
        open_groups(large)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "rrhf_peft"
    assert [path.name for path in cache.iterdir() if path.name.startswith(".unfinished")] == []


def test_a_cache_that_cannot_be_written_says_where_it_is(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", large / "cache")
    with pytest.raises(UserError, match="set HF_DATASETS_CACHE"):
        open_groups(large)
