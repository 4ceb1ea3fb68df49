"""Combining scores: normalised, added, the least, or a reward under a cost limit; a missing part stays missing."""

from __future__ import annotations

import pytest

from rrhf_peft.score.combine import NORMALIZATIONS, least, reward_under_cost, share_beaten, weighted_sum

A = [[1.0, 3.0, None], [5.0, 3.0]]
B = [[0.0, -1.0, 2.0], [None, 4.0]]


def test_share_beaten_counts_ties_half_and_leaves_out_what_is_missing():
    assert share_beaten([5.0, 1.0, 5.0, 0.0]) == [2.5 / 3, 1 / 3, 2.5 / 3, 0.0]
    assert share_beaten([2.0, None, 1.0]) == [1.0, None, 0.0]
    assert share_beaten([None, 7.0]) == [None, 0.5]


def test_normalizations():
    assert NORMALIZATIONS["none"](A) == A
    assert NORMALIZATIONS["rank"](A) == [[0.0, 1.0, None], [1.0, 0.0]]
    z = NORMALIZATIONS["zscore"](A)
    known = [score for group in z for score in group if score is not None]
    assert sum(known) == pytest.approx(0)
    assert sum(score**2 for score in known) / len(known) == pytest.approx(1)
    assert z[0][2] is None
    assert NORMALIZATIONS["zscore"]([[2.0, 2.0], [2.0]]) == [[0.0, 0.0], [0.0]]


def test_weighted_sum_and_least():
    assert weighted_sum({"a": A, "b": B}, {"a": 2.0, "b": 1.0}) == [[2.0, 5.0, None], [None, 10.0]]
    assert least({"a": A, "b": B}) == [[0.0, -1.0, None], [None, 3.0]]


def test_a_response_over_the_cost_limit_is_below_all_others_and_the_costlier_the_lower():
    reward = [[9.0, 1.0, 8.0], [-2.0, 5.0]]
    cost = [[3.0, 0.5, 2.0], [1.0, 1.5]]
    scores = reward_under_cost({"reward": reward, "cost": cost}, "reward", "cost", 1.0)
    assert scores == [[-4.0, 1.0, -3.0], [-2.0, -2.5]]
