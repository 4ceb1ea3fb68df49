"""Figures that need no model: mean reward with its interval, pair accuracy, text figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rrhf_peft.evaluate.statistics import distinct_n, mean_reward, mean_words, pair_accuracy
from rrhf_peft.objectives import rrhf
from rrhf_peft.records import ResponseLogProbs


def test_every_prompt_weighs_the_same() -> None:
    assert mean_reward([[1.0], [0.0, 0.0, 0.0]]).mean == 0.5


def test_the_interval_is_that_of_the_normal_approximation_for_many_prompts() -> None:
    rewards = np.random.default_rng(1).normal(0.3, 0.8, size=(400, 1))
    interval = mean_reward(rewards.tolist(), resamples=8000)
    error = rewards.std() / 20
    assert interval.mean == pytest.approx(rewards.mean())
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.1 * error)
    assert mean_reward(rewards.tolist(), resamples=8000) == interval


def test_more_responses_of_the_same_prompt_do_not_feign_certainty() -> None:
    few = [[value] for value in np.random.default_rng(2).normal(size=30)]
    many = [own * 50 for own in few]
    once, repeated = mean_reward(few), mean_reward(many)
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(200):
        interval = mean_reward(rng.uniform(-1, 1, size=(60, 1)).tolist(), confidence=0.8, resamples=400, seed=trial)
        inside += interval.low <= 0 <= interval.high
    assert 0.7 < inside / 200 < 0.9


def test_pair_accuracy_counts_ordered_pairs_over_all_groups() -> None:
    preferences = [[-1.0, -2.0, -3.0], [-1.0, -1.0], [-5.0, -4.0]]
    scores = [[3.0, 3.0, 1.0], [0.0, 1.0], [2.0, 9.0]]
    # Two right pairs and a tie in the first, an undecided pair, a right one.
    assert pair_accuracy(preferences, scores) == 3 / 4
    assert math.isnan(pair_accuracy([[1.0, 2.0]], [[0.5, 0.5]]))


def test_pair_accuracy_is_the_training_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [2, 5, 3, 7]
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    sums = -50 * torch.rand(17, generator=generator)
    lengths = torch.randint(1, 30, (17,), generator=generator)
    scores = torch.randint(0, 4, (17,), generator=generator).double()
    _, metrics = rrhf(ResponseLogProbs(sums, lengths, lengths + 9, group), scores)
    total, count = metrics["pair_accuracy"]
    parts = [(sums / lengths).split(sizes), scores.split(sizes)]
    ours = pair_accuracy(*([part.tolist() for part in values] for values in parts))
    assert ours == pytest.approx(float(total / count))


def test_distinct_n_and_length() -> None:
    assert distinct_n(["a b a b", "a"], 1) == 2 / 5
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a", ""], 2) == 0.0
    assert mean_words(["a b", " c \n"]) == 1.5
    assert mean_words([]) == 0.0
