"""The objectives against loop-written float64 oracles: value, gradient, invariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from objectives.random_groups import random_log_probs
from oracles.losses import rrhf_group

from rrhf_peft.objectives import OBJECTIVES, rrhf, sft
from rrhf_peft.records import ResponseLogProbs


def oracle(log_probs: ResponseLogProbs, scores: torch.Tensor, **options) -> tuple[float, float, float]:
    groups = sorted(set(log_probs.group.tolist()))
    total = [0.0, 0.0, 0.0]
    for g in groups:
        members = [i for i, owner in enumerate(log_probs.group.tolist()) if owner == g]
        values = rrhf_group(
            [log_probs.sum[i].item() for i in members],
            [log_probs.num_tokens[i].item() for i in members],
            log_probs.padded_length[members[0]].item(),
            [scores[i].item() for i in members],
            **options,
        )
        total = [a + b / len(groups) for a, b in zip(total, values, strict=True)]
    return total[0], total[1], total[2]


OPTIONS = [
    {},
    {"rank_weight": 3.0, "sft_weight": 0.25},
    {"length_penalty": 0.5, "margin": 0.3},
    {"min_score_gap": 1.0, "pair_reduction": "mean"},
    {"pair_function": "logistic", "tied_best": "mean"},
]


@pytest.mark.parametrize("variant", ["balanced", "paper", "released"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [[2], [1, 5, 2], [32], [3, 1, 4, 1, 5, 9, 2, 6]], ids=str)
def test_equals_the_oracle(variant, options, sizes):
    log_probs, scores = random_log_probs(len(sizes) * 7 + sum(sizes), sizes)
    loss, metrics = rrhf(log_probs, scores, variant=variant, **options)
    expected, rank, fine_tuning = oracle(log_probs, scores, variant=variant, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert (metrics["rank_loss"].total / metrics["rank_loss"].weight).item() == pytest.approx(rank, rel=1e-5)
    assert (metrics["sft_loss"].total / metrics["sft_loss"].weight).item() == pytest.approx(fine_tuning, rel=1e-5)


def test_sft_reduction_turns_one_variant_into_the_other():
    log_probs, scores = random_log_probs(3, [4, 2])
    assert rrhf(log_probs, scores, variant="paper", sft_reduction="mean")[0] == rrhf(log_probs, scores)[0]
    assert rrhf(log_probs, scores, sft_reduction="sum")[0] == rrhf(log_probs, scores, variant="paper")[0]


@pytest.mark.parametrize("variant", ["balanced", "paper", "released"])
@pytest.mark.parametrize("pair_function", ["hinge", "logistic"])
def test_gradcheck(variant, pair_function):
    log_probs, scores = random_log_probs(11, [3, 5, 2])

    def loss_of(sums):
        return rrhf(log_probs._replace(sum=sums), scores, variant=variant, pair_function=pair_function)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs.sum,))


def test_gradient_of_the_rank_loss_is_an_integer_per_response():
    log_probs, scores = random_log_probs(5, [6])
    p = (log_probs.sum.detach() / log_probs.num_tokens).requires_grad_()
    unit = log_probs._replace(sum=p, num_tokens=torch.ones_like(log_probs.num_tokens))
    (gradient,) = torch.autograd.grad(rrhf(unit, scores, sft_weight=0.0)[0], p)
    violations = [0] * 6
    for i, j in itertools.permutations(range(6), 2):
        if scores[i] < scores[j] and p[i] > p[j]:
            violations[i] += 1
            violations[j] -= 1
    assert gradient.tolist() == violations


@pytest.mark.parametrize("name", ["rrhf", "sft"])
def test_order_of_responses_does_not_matter(name):
    log_probs, scores = random_log_probs(8, [7], levels=100)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = ResponseLogProbs(
        log_probs.sum[order], log_probs.num_tokens[order], log_probs.padded_length[order], log_probs.group
    )
    objective = OBJECTIVES[name]
    assert objective(shuffled, scores[order])[0].item() == pytest.approx(objective(log_probs, scores)[0].item())


def test_tied_best_takes_the_first_or_the_mean():
    sums = torch.tensor([-3.0, -4.0, -8.0])
    log_probs = ResponseLogProbs(sums, torch.tensor([1, 2, 4]), torch.tensor([9, 9, 9]), torch.tensor([0, 0, 0]))
    scores = torch.tensor([0.0, 1.0, 1.0])
    assert sft(log_probs, scores)[0].item() == pytest.approx(2.0)
    assert sft(log_probs, scores, tied_best="mean")[0].item() == pytest.approx((4 / 2 + 8 / 4) / 2)
    assert sft(log_probs, scores, sft_reduction="sum")[0].item() == pytest.approx(4.0)


def test_metrics_count_pairs_and_groups():
    # Group 0: scores 0 < 1 < 2, policy orders (0,2) and (1,2) right, (0,1) wrong. Group 1: a tie, no pair.
    p = torch.tensor([-2.0, -3.0, -1.0, -1.0, -5.0])
    ones = torch.ones(5, dtype=torch.int64)
    log_probs = ResponseLogProbs(p, ones, ones, torch.tensor([0, 0, 0, 1, 1]))
    _, metrics = rrhf(log_probs, torch.tensor([0.0, 1.0, 2.0, 4.0, 4.0]))
    assert [value.item() for value in metrics["pair_accuracy"]] == [2, 3]
    assert [value.item() for value in metrics["active_pairs"]] == [1, 3]
    assert [value.item() for value in metrics["best_hit_rate"]] == [2, 2]
    assert [value.item() for value in metrics["rank_loss"]] == [1, 2]


def test_all_tied_group_has_only_the_sft_loss():
    log_probs, _ = random_log_probs(2, [4])
    loss, metrics = rrhf(log_probs, torch.zeros(4))
    assert metrics["rank_loss"].total == 0
    assert loss.item() == pytest.approx(-(log_probs.sum[0] / log_probs.num_tokens[0]).item())
    loss.backward()
    assert log_probs.sum.grad.nonzero().flatten().tolist() == [0]


def test_arguments_are_not_mutated():
    log_probs, scores = random_log_probs(4, [3, 3])
    before = [tensor.detach().clone() for tensor in (*log_probs, scores)]
    rrhf(log_probs, scores, variant="released")
    assert all(torch.equal(a, b) for a, b in zip(before, (*log_probs, scores), strict=True))
