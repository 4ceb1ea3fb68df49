"""The report's numbers are those of a slow count, it serialises, and its fingerprint sees every change."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rrhf_peft.data import report_table, tokenize_groups
from rrhf_peft.data.report import make_report
from rrhf_peft.data.tokenizing import Counts
from rrhf_peft.records import RankedGroup, TokenizedGroup

GROUPS = [
    RankedGroup("aa", ["x", "xx", "xxx"], [0.0, 1.0, 1.0], ["m", "m", "h"]),
    RankedGroup("bbb", ["y", "yyyy", " "], [4.0, 2.0, 9.0], ["h", "m", "h"]),
    RankedGroup("aa", ["z", "zz"], [5.0, 5.0], ["h", "m"]),
]


@pytest.fixture
def report(byte_tokenizer):
    return tokenize_groups(GROUPS, byte_tokenizer)[1]


def test_numbers_by_hand(report):
    assert (report.groups_read, report.groups_kept, report.groups_dropped) == (3, 2, {"no_ordered_pair": 1})
    assert (report.responses_read, report.responses_kept) == (8, 5)
    assert (report.empty_responses, report.responses_in_dropped_groups) == (1, 2)
    assert report.k_histogram == {2: 1, 3: 1}
    scores = [0, 1, 1, 4, 2]
    mean = sum(scores) / 5
    assert report.score_mean == pytest.approx(mean)
    assert report.score_std == pytest.approx(math.sqrt(sum((score - mean) ** 2 for score in scores) / 5))
    assert report.score_mean_of_max == pytest.approx((1 + 4) / 2)
    assert (report.pairs, report.ordered_pairs, report.tie_rate) == (4, 3, 0.25)
    assert report.tie_rate_read == pytest.approx(2 / (3 + 3 + 1))
    # Ranks of scores (1, 2.5, 2.5) and lengths (1, 2, 3) correlate with sqrt(3)/2; the second group with -1.
    assert report.score_length_correlation == pytest.approx((math.sqrt(3) / 2 - 1) / 2)
    assert report.prompt_tokens == {"p10": 3, "p50": 3, "p90": 4, "p99": 4, "max": 4}
    assert report.response_tokens == {"p10": 2, "p50": 3, "p90": 5, "p99": 5, "max": 5}
    assert report.tokens == (3 + 2 + 3 + 4) + (4 + 2 + 5)
    assert report.tokens_plain == (3 * 3 + 2 + 3 + 4) + (2 * 4 + 2 + 5)
    assert report.sharing_saves == pytest.approx(1 - 23 / 33)
    assert report.sources == {
        "m": {"count": 3, "mean_score": 1.0},
        "h": {"count": 2, "mean_score": 2.5},
    }
    assert list(report.sources) == ["m", "h"]
    assert report.settings["template"] == "raw"
    assert report.repeated_prompts == 0


def test_repeated_prompts(byte_tokenizer):
    assert tokenize_groups(GROUPS, byte_tokenizer, needs_pairs=False)[1].repeated_prompts == 1


def test_min_score_gap_counts_ordered_pairs(byte_tokenizer):
    group = RankedGroup("p", ["a", "b", "c"], [0.0, 1.0, 3.0], ["s"] * 3)
    assert tokenize_groups([group], byte_tokenizer, min_score_gap=1.0)[1].ordered_pairs == 2


lengths_and_scores = st.lists(st.tuples(st.integers(1, 6), st.integers(-2, 2)), min_size=1, max_size=32)


@settings(deadline=None)
@given(st.lists(lengths_and_scores, min_size=1, max_size=6))
def test_pairs_and_correlation_equal_a_slow_count(data):
    groups = [
        TokenizedGroup([1], [[0] * length for length, _ in own], [float(s) for _, s in own], ["s"] * len(own), n)
        for n, own in enumerate(data)
    ]
    counts = {**vars(Counts()), "end_of_response": "</s>", "chat_template_ignored": False}
    report = make_report(groups, counts, {"min_score_gap": 1.0})
    pairs = [pair for group in groups for pair in itertools.combinations(group.scores, 2)]
    assert report.pairs == len(pairs)
    assert report.ordered_pairs == sum(abs(a - b) > 1 for a, b in pairs)
    assert report.tie_rate == pytest.approx(sum(a == b for a, b in pairs) / len(pairs) if pairs else 0)
    slow = [value for own in data if (value := spearman(*zip(*own, strict=True))) is not None]
    expected = pytest.approx(sum(slow) / len(slow), abs=1e-9) if slow else None
    assert report.score_length_correlation == expected


def spearman(one, other):
    """Pearson's correlation of average ranks, by definition."""
    ranks = [[sum(y < x for y in v) + sum(y == x for y in v) / 2 for x in v] for v in (one, other)]
    a, b = ([x - sum(r) / len(r) for x in r] for r in ranks)
    norm = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else None


def test_to_dict_is_json(report):
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(report)}


def test_the_fingerprint_sees_every_change_and_nothing_else(byte_tokenizer):
    def fingerprint(*groups, **keys):
        return tokenize_groups(list(groups), byte_tokenizer, **keys)[1].fingerprint

    one, two, _ = GROUPS
    prints = [
        fingerprint(one, two),
        fingerprint(two, one),
        fingerprint(one),
        fingerprint(one, two, template="hh"),
        fingerprint(one, dataclasses.replace(two, prompt="bbc")),
        fingerprint(one, dataclasses.replace(two, responses=["y", "yyyx", " "])),
        fingerprint(one, dataclasses.replace(two, scores=[4.0, 2.5, 9.0])),
        fingerprint(one, dataclasses.replace(two, sources=["h", "x", "h"])),
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 64 for text in prints)
    # What is dropped or only described does not matter.
    assert prints[0] == fingerprint(one, two, GROUPS[2]) == fingerprint(dataclasses.replace(one, columns={"a": 1}), two)


def shown(renderable, width=80, **keys):
    console = Console(file=io.StringIO(), width=width, **keys)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_reads_at_80_columns(report):
    text = shown(report)
    assert text == shown(report_table(report))
    assert max(map(len, text.splitlines())) <= 80
    for fact in (
        "2 kept of 3 read, 1 dropped",
        "- 1 with no two scores far enough apart",
        "5 kept of 8 read",
        "- 1 empty, rejected",
        "3 in 1 groups, 2 in 1",
        "4, of which 3 ordered",
        "25.0% tied (28.6% as read)",
        "saves 30.3%",
        report.fingerprint[:16],
    ):
        assert fact in text
    assert [line.split() for line in text.splitlines()[-2:]] == [["m", "3", "1"], ["h", "2", "2.5"]]


def test_every_reason_has_words(byte_tokenizer):
    """A reason or kind of duplicate without its line in the table would be a KeyError here."""
    groups = [
        *GROUPS,
        RankedGroup("p", ["a"], [1.0], ["s"]),
        RankedGroup("p", [""], [1.0], ["s"]),
        RankedGroup("p" * 30, ["a"], [1.0], ["s"]),
        RankedGroup("", ["abcdefghijklmnX", "abcdefghijklmnY", "b", "b"], [1.0, 1.0, 2.0, 5.0], ["[red]s"] * 4),
    ]
    _, report = tokenize_groups(groups, byte_tokenizer, max_prompt_tokens=8, max_tokens=12, overlong_prompt="drop")
    text = shown(report)
    assert len(report.groups_dropped) == 4
    for fact in ("over the limit", "not empty", "single response", "equal after truncation", "equal text", "mean was"):
        assert fact in " ".join(text.split())
    assert "[red]s" in text  # data is not read as markup
    assert "raise max_tokens or set max_prompt_tokens lower" in " ".join(text.split())


def test_the_prompt_limit_has_words_whether_set_or_not(byte_tokenizer):
    for keys, words in (({}, "the longest response comes first, up to half"), ({"max_prompt_tokens": 8}, "limit 8")):
        text = shown(tokenize_groups(GROUPS, byte_tokenizer, **keys)[1])
        assert f"0 lost their beginning ({words})" in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 80


def test_many_sources_are_summed_up(byte_tokenizer):
    names = [f"response-{n:02}" for n in range(30)]
    group = RankedGroup("p", [f"r{n}" for n in range(30)], [float(n) for n in range(30)], names)
    text = shown(tokenize_groups([group], byte_tokenizer)[1])
    assert "response-19" in text
    assert "response-20" not in text
    assert "and 10 more" in text
