"""Two responses before a judge, in both orders, against a scripted server."""

from __future__ import annotations

import json

import pytest
from judge_server import judge_server, labelled_in

from rrhf_peft.evaluate.measure import PairJudge
from rrhf_peft.recipe.stages import JudgeScorer
from rrhf_peft.records import UserError

GROUPS = [("Q1", [("long answer", "short"), ("same", "same")]), ("Q2", [("x", "longer one")])]


def compare(script, groups=GROUPS, **settings):
    with judge_server(script) as (url, server):
        section = JudgeScorer(name="judge", base_url=url, model="judge", first_wait=0.0, max_retries=1, **settings)
        return PairJudge(section).compare(groups), server


def ranks(first, second):
    return json.dumps({"ranks": {"A": first, "B": second}})


def test_a_judge_who_favours_a_position_gives_ties_only():
    for reply in (ranks(1, 2), ranks(2, 1)):
        rows, server = compare(lambda call, reply=reply: reply)
        assert [row["verdicts"] for row in rows] == [[0, 0], [0]]
        assert len(server.calls) == 4  # two pairs in both orders; equal texts need no judge


def test_a_judge_who_reads_decides_whatever_the_order():
    def longest(call):
        shown = labelled_in(call["messages"])
        return ranks(1, 2) if len(shown["A"]) > len(shown["B"]) else ranks(2, 1)

    rows, _ = compare(longest)
    assert [row["verdicts"] for row in rows] == [[1, 0], [-1]]
    assert all(row["failures"] == {} for row in rows)


def test_a_tie_in_one_order_is_a_tie():
    rows, _ = compare(lambda call: ranks(1, 1) if labelled_in(call["messages"])["A"] == "short" else ranks(1, 2))
    assert rows[0]["verdicts"][0] == 0


def test_what_fails_is_counted_and_not_a_verdict():
    def script(call):
        return "no idea" if "Q2" in call["messages"][-1]["content"] else ranks(1, 1)

    rows, _ = compare(script)
    assert rows[1] == {"verdicts": [None], "failures": {"0": "bad reply: not JSON"}}
    assert rows[0]["verdicts"] == [0, 0]


def test_an_endpoint_that_never_answers_is_an_error():
    with pytest.raises(UserError, match="not one of 4 requests in a row was answered"):
        compare(lambda call: ("status", 500))
