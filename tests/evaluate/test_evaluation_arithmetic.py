"""Best-of-n, Kendall's tau, preference figures, repetition, wins: each against a slow oracle or a known answer."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from rrhf_peft.evaluate.statistics import (
    expected_best,
    kendall_tau,
    length_controlled_win_rate,
    mean_repetition,
    mean_reward,
    pair_accuracy,
    preference_figures,
    reward_verdicts,
    win_shares,
)


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rewards = [0.3, -1.0, 0.3, 2.0, 0.9]
    for n in range(1, 6):
        maxima = [max(own) for own in itertools.combinations(rewards, n)]
        assert expected_best(rewards, n) == pytest.approx(sum(maxima) / len(maxima), abs=1e-12)
    assert expected_best(rewards, 1) == pytest.approx(sum(rewards) / 5)
    assert expected_best(rewards, 5) == 2.0


def tau_by_loops(one: list[float], other: list[float]) -> float:
    agree = disagree = tied_one = tied_other = 0
    for i in range(len(one)):
        for j in range(i):
            if one[i] == one[j] and other[i] == other[j]:
                continue
            if one[i] == one[j]:
                tied_one += 1
            elif other[i] == other[j]:
                tied_other += 1
            elif (one[i] < one[j]) == (other[i] < other[j]):
                agree += 1
            else:
                disagree += 1
    scale = math.sqrt((agree + disagree + tied_one) * (agree + disagree + tied_other))
    return (agree - disagree) / scale if scale else math.nan


def test_kendalls_tau_b_with_ties() -> None:
    generator = random.Random(0)
    for _ in range(50):
        size = generator.randint(2, 7)
        one = [float(generator.randint(0, 3)) for _ in range(size)]
        other = [float(generator.randint(0, 3)) for _ in range(size)]
        assert kendall_tau(one, other) == pytest.approx(tau_by_loops(one, other), abs=1e-12, nan_ok=True)
    # Four pairs agree, one is tied in the first list only: 4 less 1 over sqrt(5 * 6).
    assert kendall_tau([1, 2, 2, 3], [1, 2, 3, 0]) == pytest.approx((2 - 3) / math.sqrt(5 * 6))


def test_preference_figures_leave_groups_without_order_out() -> None:
    preferences = [[-1.0, -2.0, -3.0], [-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0]]
    scores = [[3.0, 3.0, 1.0], [5.0, 5.0], [1.0, 0.0], [0.0, 1.0]]
    found = preference_figures(preferences, scores, resamples=200)
    assert found is not None
    assert (found.pairs, found.groups) == (4, 3)
    assert found.pair_accuracy.mean == pair_accuracy(preferences, scores) == 2 / 4
    assert found.pair_accuracy.low == 0.0  # groups of one wrong pair alone
    assert found.best_hit_rate == pytest.approx(1 / 3)  # of equal p_i the first is the favourite
    taus = [tau_by_loops(preferences[0], scores[0]), -1.0, 0.0]
    assert found.kendall_tau == pytest.approx(sum(taus) / 3)
    assert preference_figures([[1.0, 2.0]], [[4.0, 4.0]]) is None


def test_the_interval_of_many_groups_is_that_of_a_ratio() -> None:
    """Groups of one size: the ratio's interval is that of the groups' mean accuracies."""
    generator = np.random.default_rng(0)
    preferences, scores = generator.normal(size=(80, 4)).tolist(), [[0.0, 1.0, 2.0, 3.0]] * 80
    found = preference_figures(preferences, scores, resamples=500)
    per_group = [[pair_accuracy([p], [r])] for p, r in zip(preferences, scores, strict=True)]
    expected = mean_reward(per_group, resamples=500)
    assert found is not None
    assert found.pair_accuracy.low == pytest.approx(expected.low)
    assert found.pair_accuracy.high == pytest.approx(expected.high)


def test_repetition_is_the_share_of_4_grams_said_before() -> None:
    assert mean_repetition(["a b c d a b c d"]) == pytest.approx(1 - 4 / 5)
    assert mean_repetition(["a a a a a a", "one two three"]) == pytest.approx((2 / 3 + 0) / 2)
    assert mean_repetition([]) == 0.0


def test_wins_by_reward() -> None:
    assert reward_verdicts([1.0, 0.5, 0.0], [0.0, 0.45, 1.0]) == [1, 1, -1]
    assert reward_verdicts([1.0, 0.5, 0.0], [0.0, 0.45, 1.0], 0.1) == [1, 0, -1]
    shares = win_shares([[1, 1, 0, -1], [], [-1]], [[0.0] * 4, [], [0.0]])
    assert (shares.win, shares.tie, shares.lose, shares.prompts) == (0.25, 0.125, 0.625, 2)
    assert shares.length_controlled_win_rate == pytest.approx(0.25 + 0.125 / 2)  # nothing to control for
    assert win_shares([[]], [[]]).length_controlled_win_rate is None


def test_where_length_alone_decides_no_side_wins_at_equal_length() -> None:
    generator = np.random.default_rng(0)
    longer = generator.normal(60, 100, size=400)  # the longer one wins always, and it is longer mostly
    outcome = (longer > 0).astype(float)
    assert outcome.mean() > 0.68
    assert length_controlled_win_rate(outcome, longer, np.ones(400)) == pytest.approx(0.5, abs=0.1)
    noisy = (generator.random(4000) < 1 / (1 + np.exp(-generator.normal(size=4000) * 0))).astype(float)
    assert length_controlled_win_rate(noisy, generator.normal(size=4000), np.ones(4000)) == pytest.approx(0.5, abs=0.03)


def test_the_win_rate_at_equal_length_is_the_one_that_made_the_data() -> None:
    generator = np.random.default_rng(1)
    longer = generator.normal(50, 80, size=20000)
    x = np.tanh(longer / longer.std())
    outcome = (generator.random(20000) < 1 / (1 + np.exp(-(0.8 + 1.5 * x)))).astype(float)
    assert outcome.mean() > 0.75
    found = length_controlled_win_rate(outcome, longer, np.ones(20000))
    assert found == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.01)
    # A comparison of weight two is the comparison made twice.
    weights = np.where(np.arange(20000) % 2 == 0, 2.0, 1.0)
    twice = np.concatenate([np.arange(20000), np.arange(0, 20000, 2)])
    spread = longer.std() / longer[twice].std()
    assert length_controlled_win_rate(outcome, longer, weights) == pytest.approx(
        length_controlled_win_rate(outcome[twice], longer[twice], np.ones(30000)), abs=0.01 * spread
    )


def test_extremes_are_finite() -> None:
    longer = np.array([1.0, 5.0, -3.0, 2.0])
    assert length_controlled_win_rate(np.ones(4), longer, np.ones(4)) == 1.0
    assert length_controlled_win_rate(np.zeros(4), longer, np.ones(4)) == 0.0
    assert 0 < length_controlled_win_rate(np.array([1.0, 1.0, 0.0, 1.0]), longer, np.ones(4)) < 1
