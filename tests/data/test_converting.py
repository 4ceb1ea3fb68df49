"""Converting writes what was rated, counts what was not, says what is not kept, and never overwrites unasked."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rrhf_peft.data import convert, read_groups
from rrhf_peft.records import UserError

ROWS = [
    {"instruction": "i1", "output_1": "a", "output_2": "b", "preference": 2, "annotator": "w"},
    {"instruction": "i2", "output_1": "a", "output_2": "b", "preference": None, "annotator": "w"},
    {"instruction": "i3", "output_1": "c", "output_2": "c", "preference": 1.5, "annotator": "w"},
]


def test_what_is_rated_is_written_and_the_rest_counted(jsonl, tmp_path):
    out = tmp_path / "new" / "ranked.jsonl"
    report = convert(jsonl(*ROWS), format="alpaca_farm", output=out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    sources = ["output_1", "output_2"]
    assert rows == [
        {"prompt": "i1", "responses": ["a", "b"], "scores": [0, 1], "sources": sources},
        {"prompt": "i3", "responses": ["c", "c"], "scores": [0.5, 0.5], "sources": sources},
    ]
    assert report.to_dict() == {
        "output": str(out),
        "groups_read": 3,
        "groups_written": 2,
        "groups_without_response": 1,
        "responses_written": 4,
        "unrated_responses": 2,
        "single_response_groups": 0,
        "groups_without_order": 1,
        "sources": 2,
        "columns_left_out": ["annotator"],
    }
    assert len(read_groups(out)) == 2


def test_the_report_reads_at_80_columns(jsonl, tmp_path):
    report = convert(jsonl(*ROWS), output=tmp_path / "r.jsonl")
    console = Console(file=io.StringIO(), width=80)
    console.print(report)
    text = " ".join(console.file.getvalue().split())
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    for fact in (
        "2 of 3 read",
        "1 without a rated response, left out",
        "1 have only ties",
        "4, by 2 sources",
        "2 without a rating, left out",
        "annotator (a ranked file has four columns)",
    ):
        assert fact in text


def test_an_existing_file_is_replaced_only_when_asked(jsonl, tmp_path):
    source, out = jsonl(*ROWS), tmp_path / "r.jsonl"
    out.write_text("old")
    with pytest.raises(UserError, match=r"r\.jsonl: already exists"):
        convert(source, output=out)
    assert out.read_text() == "old"
    with pytest.raises(UserError, match=r"r\.jsonl: has no mark of rrhf-peft"):  # a user's own, for all we know
        convert(source, output=out, overwrite=True)
    out.unlink()
    convert(source, output=out)
    convert(source, output=out, overwrite=True)
    assert len(read_groups(out)) == 2
    with pytest.raises(UserError, match="is what this run reads"):
        convert(out, output=out, overwrite=True)


def test_a_failed_conversion_leaves_nothing(jsonl, tmp_path):
    source = jsonl(ROWS[0], {**ROWS[0], "preference": 9})
    with pytest.raises(UserError, match=r"data\.jsonl:2: preference is 9"):
        convert(source, output=tmp_path / "r.jsonl")
    with pytest.raises(UserError, match=r"none of the 1 groups has a rated response"):
        convert(jsonl(ROWS[1]), output=tmp_path / "r.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_the_output_is_json_lines(jsonl, tmp_path):
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        convert(jsonl(*ROWS), output=tmp_path / "r.parquet")


def test_read_arguments_are_passed_on(jsonl, tmp_path):
    jsonl(ROWS[0], name="data/test.jsonl")
    jsonl(*ROWS, name="data/train.jsonl")
    assert convert(tmp_path / "data", output=tmp_path / "a.jsonl", split="test").groups_read == 1
    assert convert(tmp_path / "data", output=tmp_path / "b.jsonl", max_groups=2).groups_read == 2
