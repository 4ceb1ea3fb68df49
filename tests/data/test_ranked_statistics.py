"""The statistics are those of a slow count, by hand and on random groups; the picture shows what it says."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rrhf_peft.data import plot_scores, ranked_statistics, read_groups
from rrhf_peft.records import RankedGroup, UserError

GROUPS = [
    RankedGroup("p", ["one two", "One, two!", "three three three"], [0.0, 1.0, 1.0], ["a", "a", "b"]),
    RankedGroup("q", ["x", "x", " "], [4.0, 2.0, 3.0], ["b", "c", "a"]),
    RankedGroup("p", ["same", "same"], [5.0, 5.0], ["a", "c"]),
    RankedGroup("r", [], [], []),
]


@pytest.fixture
def statistics():
    return ranked_statistics(GROUPS)


def test_numbers_by_hand(statistics):
    s = statistics
    assert (s.groups, s.responses, s.k_histogram) == (4, 8, {0: 1, 2: 1, 3: 2})
    assert s.score_mean == pytest.approx(21 / 8)
    assert s.score_mean_of_max == pytest.approx((1 + 4 + 5) / 3)
    assert (s.pairs, s.tied_pairs, s.groups_without_order, s.repeated_prompts) == (7, 2, 2, 1)
    # Lengths 7, 9, 17 rank like scores 0, 1, 1 by sqrt(3)/2; the second group's lengths are all the same.
    assert s.length_correlation == pytest.approx(math.sqrt(3) / 2)
    assert s.longer_wins == 1.0
    assert (s.empty_responses, s.duplicates, s.conflicting_duplicates) == (1, 2, 1)
    assert (s.near_identical_pairs, s.groups_with_near_identical) == (1, 1)
    assert list(s.sources) == ["c", "a", "b"]  # means of their best: 3.5, 3, 2.5
    a = s.sources["a"]
    assert (a.responses, a.groups, a.mean) == (4, 3, pytest.approx(9 / 4))
    assert a.std == pytest.approx(math.sqrt(sum((x - 9 / 4) ** 2 for x in (0, 1, 3, 5)) / 4))
    assert a.mean_of_max == pytest.approx((1 + 3 + 5) / 3)
    assert a.best_share == pytest.approx(2 / 3)  # tied with b, beaten by b, tied with c
    assert a.win_rate == pytest.approx(1 / 3)  # 0 < 1, 3 < 4, 3 > 2; its own two do not meet
    assert a.ties == 2
    assert a.mean_characters == pytest.approx((7 + 9 + 1 + 4) / 4)


words = st.text("ab ", max_size=6)
entries = st.lists(st.tuples(words, st.integers(-2, 2), st.sampled_from("xyz")), max_size=8)


@settings(deadline=None)
@given(st.lists(entries, min_size=1, max_size=5).filter(any))
def test_statistics_equal_a_slow_count(data):
    groups = [
        RankedGroup(f"p{n}", [r for r, _, _ in own], [float(s) for _, s, _ in own], [o for *_, o in own])
        for n, own in enumerate(data)
    ]
    report = ranked_statistics(groups)
    pairs = [pair for own in data for pair in itertools.combinations(own, 2)]
    ordered = [(x, y) if x[1] > y[1] else (y, x) for x, y in pairs if x[1] != y[1]]
    assert report.pairs == len(pairs)
    assert report.tied_pairs == len(pairs) - len(ordered)
    unequal = [len(x[0]) > len(y[0]) for x, y in ordered if len(x[0]) != len(y[0])]
    assert report.longer_wins == (pytest.approx(sum(unequal) / len(unequal)) if unequal else None)
    assert report.near_identical_pairs == sum(
        bool(set(x.split())) and set(x.split()) == set(y.split())
        for own in data
        for x, y in itertools.combinations(dict.fromkeys(r for r, _, _ in own), 2)
    )  # with at most two different words, nine tenths means all
    for source, own in report.sources.items():
        met = [(x, y) for x, y in ordered if x[2] != y[2] and source in (x[2], y[2])]
        won = sum(x[2] == source for x, _ in met)
        assert own.win_rate == (pytest.approx(won / len(met)) if met else None)
        assert own.ties == sum(x[1] == y[1] and x[2] != y[2] and source in (x[2], y[2]) for x, y in pairs)
        of = [group for group in data if any(entry[2] == source for entry in group)]
        best = [max(s for _, s, o in group if o == source) for group in of]
        assert own.mean_of_max == pytest.approx(sum(best) / len(best))
        share = sum(b == max(s for _, s, _ in group) for b, group in zip(best, of, strict=True)) / len(of)
        assert own.best_share == pytest.approx(share)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("a b c d e f g h i j", "J i h g, f e d c b A A", True),
        ("a b c d e f g h i", "a b c d e f g h i j", True),  # 9 of 10
        ("a b c d e f g h", "a b c d e f g h i", False),  # 8 of 9
        ("!!!", "???", False),  # without words there is nothing to compare
    ],
)
def test_near_identical_is_nine_tenths_of_the_words(one, other, near):
    report = ranked_statistics([RankedGroup("p", [one, other], [1.0, 0.0], ["s", "t"])])
    assert report.near_identical_pairs == near


def test_to_dict_is_json(statistics):
    values = statistics.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(statistics)}


def test_without_any_response_there_is_nothing_to_describe():
    with pytest.raises(UserError, match="none of the 1 groups has a response"):
        ranked_statistics(GROUPS[3:])


def test_the_tables_read_at_80_columns(statistics):
    console = Console(file=io.StringIO(), width=80)
    console.print(statistics)
    lines = console.file.getvalue().splitlines()
    text = " ".join(console.file.getvalue().split())
    assert max(map(len, lines)) <= 80
    for fact in (
        "4, with 8 responses",
        "3 in 2 groups, 2 in 1, 0 in 1",
        "7, of which 2 tied (28.6%)",
        "score and characters +0.87",
        "wins 100.0% of the untied pairs",
        "2 responses repeat another",
        "1 pairs share 90% of their words, in 1 group",
        "1 equal texts have different scores",
        "1 responses are white space only",
        "1 groups repeat the prompt",
        "a 4 2.25 1.92 3 66.7% 33.3% 5",
    ):
        assert fact in text


def test_what_is_known_about_the_real_files(shared_data):
    folder = shared_data / "ranked"
    report = ranked_statistics(read_groups(folder / "alpaca_eval_k16_300.jsonl"))
    assert (report.groups, report.responses, len(report.sources), report.empty_responses) == (300, 4800, 16, 5)
    assert report.length_correlation > 0.5  # this judge is known to like length
    report = ranked_statistics(read_groups(folder / "hh_harmless_test_k2.jsonl"))
    assert report.sources["chosen"].win_rate == report.sources["chosen"].best_share == 1
    assert (report.tied_pairs, report.empty_responses, report.repeated_prompts) == (0, 4, 2)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_has_a_box_for_each_source(ending, tmp_path):
    pytest.importorskip("matplotlib")
    groups = [*GROUPS, RankedGroup("s", ["t"], [0.0], ["$cost_{a}$ " * 8])]
    path = tmp_path / "new" / f"scores.{ending}"
    plot_scores(groups, path)
    if ending == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        text = path.read_text()  # matplotlib writes each label as a comment beside its glyphs
        for label in ("a  (4)", "b  (2)", "c  (2)", "$cost_{a}$ $cost…{a}$ $cost_{a}$  (1)", "characters", "+0.87"):
            assert label in text
        assert "mathdefault" not in text  # powers of ten are written out


def test_many_sources_and_points_are_drawn_in_part(tmp_path):
    pytest.importorskip("matplotlib")
    groups = [RankedGroup(f"p{n}", ["x" * (n % 50), "y"], [n, -n], [f"s{n % 40}", "other"]) for n in range(1, 3001)]
    path = tmp_path / "many.svg"
    plot_scores(groups, path)
    text = path.read_text()
    assert "the best 24 of 41 sources" in text
    assert text.count("<use ") < 13_000


def test_a_picture_that_cannot_be_written_says_why(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"scores\.txt: cannot tell what kind of picture .* \.png"):
        plot_scores(GROUPS, tmp_path / "scores.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        plot_scores(GROUPS, tmp_path / "file" / "scores.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'rrhf-peft\[plots\]'"):
        plot_scores(GROUPS, tmp_path / "scores.png")


@pytest.mark.parametrize("name", ["scores.png", "scores.svg", "scores.pdf"])
def test_a_picture_replaces_its_own_kind_and_no_other_file(tmp_path, name):
    pytest.importorskip("matplotlib")
    groups = [RankedGroup("p", ["a", "bb"], [1.0, 0.0])]
    path = tmp_path / name
    plot_scores(groups, path)
    plot_scores(groups, path)  # the same command again
    path.write_bytes(b"a file of the user's")
    with pytest.raises(UserError, match="is there already, and rrhf-peft did not draw it"):
        plot_scores(groups, path)
    assert path.read_bytes() == b"a file of the user's"
    assert [file.name for file in tmp_path.iterdir()] == [name]
