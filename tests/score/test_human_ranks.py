"""Ranking sheets: blind, shuffled, back again with ties and gaps; agreement of several people."""

from __future__ import annotations

import csv
import json

import krippendorff
import pytest

from rrhf_peft.records import UserError
from rrhf_peft.score.people import agreement, key_path, merged_scores, read_ranks, write_sheet

GROUPS = [(f"prompt {g}", [f'answer {g}{i}, with\nlines; and "quotes"' for i in range(3 + g % 2)]) for g in range(6)]


@pytest.fixture(params=["csv", "jsonl"])
def sheet(request, tmp_path):
    path = tmp_path / f"sheet.{request.param}"
    write_sheet(path, GROUPS, seed=3)
    return path


def rows_of(path):
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fill(sheet, name, rank_of):
    """A filled copy; `rank_of` is given group number and response text."""
    rows = rows_of(sheet)
    for row in rows:
        row["rank"] = rank_of(int(row["group"][1:]) - 1, row["response"])
    path = sheet.with_name(name + sheet.suffix)
    if sheet.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_sheet_is_blind_and_shuffled(sheet):
    rows = rows_of(sheet)
    assert set(rows[0]) == {"group", "label", "prompt", "response", "rank"}
    assert all(not row["rank"] for row in rows)
    orders = []
    for number, (prompt, responses) in enumerate(GROUPS):
        own = [row for row in rows if row["prompt"] == prompt]
        assert sorted(row["response"] for row in own) == sorted(responses)
        assert [row["label"] for row in own] == list("ABCD"[: len(responses)])
        orders.append([responses.index(row["response"]) for row in own])
        assert own[0]["group"] == f"g{number + 1:05}"
    assert any(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) > 2


def test_ranks_come_back_to_their_responses(sheet):
    path = fill(sheet, "ann", lambda group, text: 1 + GROUPS[group][1].index(text) // 2 if group != 2 else "")
    ranks = read_ranks(path, sheet, GROUPS)
    assert ranks[1] == {0: 1, 1: 1, 2: 2, 3: 2}
    assert 2 not in ranks
    scores = merged_scores([ranks], [len(responses) for _, responses in GROUPS])
    assert scores[1] == pytest.approx([2.5 / 3, 2.5 / 3, 0.5 / 3, 0.5 / 3])
    assert scores[2] == [None, None, None]


def test_a_sheet_with_answers_is_not_overwritten(sheet):
    with pytest.raises(UserError, match="may hold answers"):
        write_sheet(sheet, GROUPS, seed=3)


def test_a_file_of_the_keys_name_is_not_overwritten_and_a_killed_hand_out_ends(sheet):
    key = key_path(sheet)
    sheet.unlink()  # killed between the key and the sheet
    write_sheet(sheet, GROUPS, seed=3)
    sheet.unlink()
    key.write_text("somebody's notes\n")
    with pytest.raises(UserError, match=r"sheet\.key\.jsonl: already exists, and it is not the key"):
        write_sheet(sheet, GROUPS, seed=3)
    assert key.read_text() == "somebody's notes\n"
    assert not sheet.exists()


FORMULAS = ["=HYPERLINK(1)", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", "'=1", "''+1", "plain", "'quoted'", ""]


def test_a_csv_sheet_holds_no_formula_and_loses_no_text(tmp_path):
    path = tmp_path / "sheet.csv"
    write_sheet(path, [(FORMULAS[0], FORMULAS)], seed=0)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝")) for cell in row.values())
    texts = [row["response"] for row in rows]
    is_guarded = [text[:1] == "'" and text.lstrip("'")[:1] in tuple("=+-@\t\r＝") for text in texts]
    assert sorted(text[guard:] for text, guard in zip(texts, is_guarded, strict=True)) == sorted(FORMULAS)
    assert {"'-2+3", "plain", "'quoted'", "''=1"} <= set(texts)
    assert rows[0]["prompt"] == "'=HYPERLINK(1)"
    write_sheet(tmp_path / "lines.jsonl", [("=1", ["=1", "+2"])], seed=0)
    assert {row["response"] for row in rows_of(tmp_path / "lines.jsonl")} == {"=1", "+2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(rank="good"), ":{line}: the rank 'good' is no number"),
        (lambda rows: rows[1].update(rank="0"), ":{line}: the rank '0' is no number"),
        (lambda rows: rows[1].update(rank="nan"), ":{line}: the rank 'nan' is no number"),
        (lambda rows: rows[1].update(group="g99999"), ":{line}: the sheet has no group 'g99999'"),
        (lambda rows: rows[1].update(rows[0]), ":{line}: response A of group g00001 stands here a second time"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(sheet, change, message):
    rows = [{**row, "response": "short", "rank": "1"} for row in rows_of(sheet)]
    change(rows)
    path = sheet.with_name(f"bad{sheet.suffix}")
    if sheet.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = 3 if sheet.suffix == ".csv" else 2
    with pytest.raises(UserError) as error:
        read_ranks(path, sheet, GROUPS)
    assert f"{path}{message.format(line=line)}" in str(error.value)


def test_a_sheet_of_other_data_or_without_its_key_is_refused(sheet):
    path = fill(sheet, "ann", lambda group, text: 1)
    with pytest.raises(UserError, match=r"key\.jsonl:2: group g00002 .* is not that group"):
        read_ranks(path, sheet, [GROUPS[0], ("other", ["a", "b"]), *GROUPS[2:]])
    key_path(sheet).unlink()
    with pytest.raises(UserError, match=r"the key of .* is not there"):
        read_ranks(path, sheet, GROUPS)


def test_a_broken_csv_names_its_line(tmp_path):
    write_sheet(tmp_path / "s.csv", GROUPS, seed=0)
    path = tmp_path / "bad.csv"
    path.write_text("group,label,rank\ng00001,A,1\ng00001,B\n")
    with pytest.raises(UserError, match=r"bad\.csv:3: has not as many cells"):
        read_ranks(path, tmp_path / "s.csv", GROUPS)
    path.write_text("group,label\ng00001,A\n")
    with pytest.raises(UserError, match=r"bad\.csv:1: the column 'rank' is missing"):
        read_ranks(path, tmp_path / "s.csv", GROUPS)
    path.write_text("group;label;rank\ng00001;A;1\ng00001;B;2\n")
    assert list(read_ranks(path, tmp_path / "s.csv", GROUPS)) == [0]


def test_agreement_of_people_who_agree_contradict_and_skip():
    one = {0: {0: 1.0, 1: 2.0, 2: 3.0}}
    same = {0: {0: 1.0, 1: 5.0, 2: 9.0}}
    tied = {0: {0: 1.0, 1: 2.0, 2: 2.0}}
    opposite = {0: {0: 3.0, 1: 2.0, 2: 1.0}}
    partial = {0: {0: 1.0, 1: 2.0}}
    both = agreement([one, same], [3])
    assert (both.comparisons, both.same, both.no_contradiction, both.answered) == (3, 1.0, 1.0, (1.0, 1.0))
    assert both.alpha is None  # only one value was given
    assert agreement([one, tied], [3]).same == pytest.approx(2 / 3)
    assert agreement([one, tied], [3]).no_contradiction == 1.0
    assert agreement([one, opposite], [3]).no_contradiction == 0.0
    gap = agreement([one, partial], [3])
    assert (gap.comparisons, gap.answered) == (1, (1.0, pytest.approx(2 / 3)))
    assert agreement([one], [3]).same is None


def test_alpha_is_the_librarys_over_pairwise_comparisons():
    ranks = [
        {0: {0: 1.0, 1: 2.0, 2: 3.0}, 1: {0: 2.0, 1: 1.0}},
        {0: {0: 1.0, 1: 3.0, 2: 2.0}, 1: {0: 1.0, 1: 1.0}},
        {0: {0: 2.0, 2: 1.0}},
    ]
    nan = float("nan")
    pairs = [[1, 1, 1, -1], [1, 1, -1, 0], [nan, -1, nan, nan]]  # (0,1), (0,2), (1,2) of group 0; (0,1) of group 1
    expected = krippendorff.alpha(reliability_data=pairs, level_of_measurement="ordinal", value_domain=[-1, 0, 1])
    assert agreement(ranks, [3, 2]).alpha == pytest.approx(expected)


def test_merged_scores_are_the_mean_over_those_who_compared():
    scores = merged_scores([{0: {0: 1.0, 1: 2.0}}, {0: {0: 2.0, 1: 1.0, 2: 3.0}}, {0: {2: 1.0}}], [3])
    assert scores == [[pytest.approx(0.75), pytest.approx(0.5), pytest.approx(0.0)]]
