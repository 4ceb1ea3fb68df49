"""RLOO and GRPO against loops, against TRL's own loss code, and at the points where clipping begins."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from objectives.random_groups import random_log_probs

from rrhf_peft.objectives import OBJECTIVES, ONLINE_ONLY
from rrhf_peft.records import ResponseLogProbs

CASES = [
    ("rloo", {}),
    ("rloo", {"epsilon": 0.1, "epsilon_high": 0.4}),
    ("grpo", {}),
    ("grpo", {"epsilon": 0.05, "epsilon_high": 0.1, "scale_rewards": "none"}),
]


def sampled_by(log_probs: ResponseLogProbs, seed: int) -> ResponseLogProbs:
    """The policy some steps before: ratios of whole responses between 0.5 and 2, those per token nearer to 1."""
    generator = torch.Generator().manual_seed(seed)
    shift = 1.4 * torch.rand(len(log_probs.sum), generator=generator, dtype=log_probs.sum.dtype) - 0.7
    return log_probs._replace(sum=log_probs.sum.detach() + shift)


def oracle(name, log_probs, scores, old, epsilon=0.2, epsilon_high=None, scale_rewards="group"):
    total, groups = 0.0, sorted(set(log_probs.group.tolist()))
    for g in groups:
        rows = [i for i, owner in enumerate(log_probs.group.tolist()) if owner == g]
        rewards = [scores[i].item() for i in rows]
        if len(rows) == 1:
            continue  # nothing to compare with
        for i in rows:
            others = [scores[j].item() for j in rows if j != i]
            log_weight = log_probs.sum[i].item() - old.sum[i].item()
            if name == "rloo":
                advantage = scores[i].item() - sum(others) / len(others)
            else:
                advantage = scores[i].item() - sum(rewards) / len(rewards)
                if scale_rewards == "group":
                    advantage /= statistics.stdev(rewards) + 1e-4
                log_weight /= log_probs.num_tokens[i].item()
            weight = math.exp(log_weight)
            clipped = min(max(weight, 1 - epsilon), 1 + (epsilon if epsilon_high is None else epsilon_high))
            total -= min(weight * advantage, clipped * advantage) / len(rows)
    return total / len(groups)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("sizes", [[2], [1, 5, 2], [16], [3, 1, 4, 1, 5]], ids=str)
def test_value_equals_the_loops_and_gradient_is_its_own(name, options, sizes):
    log_probs, scores = random_log_probs(sum(sizes), sizes, levels=4)
    old = sampled_by(log_probs, 3)
    loss, metrics = OBJECTIVES[name](log_probs, scores, reference=old, **options)
    assert loss.item() == pytest.approx(oracle(name, log_probs, scores, old, **options), rel=1e-10, abs=1e-14)
    assert all(torch.isfinite(torch.stack(mean)).all() for mean in metrics.values())

    def loss_of(sums):
        return OBJECTIVES[name](log_probs._replace(sum=sums), scores, reference=old, **options)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs.sum,))


@pytest.mark.parametrize("name", sorted(ONLINE_ONLY))
def test_ties_teach_nothing_and_order_does_not_matter(name):
    log_probs, scores = random_log_probs(8, [5, 3], levels=100)
    old = sampled_by(log_probs, 1)
    tied = OBJECTIVES[name](log_probs, torch.full((8,), 0.1), reference=old)[0]
    assert tied == 0
    assert torch.autograd.grad(tied, log_probs.sum)[0].abs().max() == 0
    order = torch.tensor([3, 0, 4, 2, 1, 7, 5, 6])
    shuffled, its_old = (ResponseLogProbs(*(column[order] for column in item)) for item in (log_probs, old))
    one = OBJECTIVES[name](log_probs, scores, reference=old)[0].item()
    assert OBJECTIVES[name](shuffled, scores[order], reference=its_old)[0].item() == pytest.approx(one, rel=1e-12)
    moved = OBJECTIVES[name](log_probs, scores + 7.5, reference=old)[0].item()
    assert moved == pytest.approx(one, rel=1e-9)  # only differences of scores count


def test_at_the_sampling_policy_it_is_reinforce():
    """Ratio 1: the gradient of a response's log-prob is minus its advantage, whatever the clipping."""
    log_probs, scores = random_log_probs(2, [4], levels=100)
    loss, metrics = OBJECTIVES["rloo"](log_probs, scores, reference=log_probs)
    (gradient,) = torch.autograd.grad(loss, log_probs.sum)
    baseline = (scores.sum() - scores) / 3
    torch.testing.assert_close(gradient, -(scores - baseline) / 4)
    assert metrics["clip_ratio"].total == 0


def test_a_response_that_has_moved_far_enough_moves_no_further():
    sums = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(2, dtype=torch.int64)
    log_probs = ResponseLogProbs(sums, ones, ones, torch.zeros(2, dtype=torch.int64))
    old = log_probs._replace(sum=torch.tensor([-1.5, -1.5], dtype=torch.float64))  # both are likelier by exp(0.5)
    loss, metrics = OBJECTIVES["rloo"](log_probs, torch.tensor([1.0, 0.0]), reference=old)
    (gradient,) = torch.autograd.grad(loss, sums)
    assert gradient[0] == 0  # good, and beyond 1.2
    assert gradient[1] > 0  # bad, and on its way up: no clipping keeps it from coming down
    assert (metrics["clip_ratio"].total / metrics["clip_ratio"].weight).item() == 0.5


# ---- TRL ----

LENGTHS, WIDTH, K = [5, 1, 7, 4, 3, 6, 2, 4], 8, 4


class Accelerator:
    """One process, on the CPU."""

    device = torch.device("cpu")

    def gather(self, values):
        return values

    def reduce(self, values, reduction):
        return values

    gather_for_metrics = gather


def trl_loss(kind, tokens, old, scores, **attributes):
    """The trainer's own `_compute_loss` on given log-probs [B, T] of two groups of four responses."""
    trainer = object.__new__(kind)
    trainer.__dict__.update(
        {
            "model": SimpleNamespace(training=True),
            "accelerator": Accelerator(),
            "aux_loss_enabled": False,
            "_metrics": {"train": defaultdict(list)},
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            "beta": 0.0,
            "args": SimpleNamespace(delta=None),
            "current_gradient_accumulation_steps": 1,
            **attributes,
        }
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (tokens, torch.zeros_like(tokens), None)
    mask = torch.tensor([[1] * n + [0] * (WIDTH - n) for n in LENGTHS])
    prompt = torch.ones(len(LENGTHS), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "advantages": scores,
    }
    return trainer._compute_loss(None, inputs)


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.02, 0.05)])
@pytest.mark.parametrize("name", sorted(ONLINE_ONLY))
def test_trl(name, epsilons):
    pytest.importorskip("trl")
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer.utils import nanstd

    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * n + [0] * (WIDTH - n) for n in LENGTHS])
    tokens = (-3 * torch.rand(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)).requires_grad_()
    old = tokens.detach() + 0.2 * torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.4, -1.0, 2.0, 0.5, 0.0], dtype=torch.float64)

    grouped = rewards.view(-1, K)
    if name == "rloo":
        advantages = grouped - (grouped.sum(1, keepdim=True) - grouped) / (K - 1)
    else:
        advantages = (grouped - grouped.mean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    low, high = epsilons
    attributes = {"epsilon_low": low, "epsilon_high": high}
    if name == "grpo":
        attributes |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    theirs = trl_loss(RLOOTrainer if name == "rloo" else GRPOTrainer, tokens, old, advantages.flatten(), **attributes)

    lengths, group = torch.tensor(LENGTHS), torch.arange(2).repeat_interleave(K)
    log_probs, sampled = (
        ResponseLogProbs((values * mask).sum(1), lengths, lengths + 1, group) for values in (tokens, old)
    )
    ours, metrics = OBJECTIVES[name](log_probs, rewards, reference=sampled, epsilon=low, epsilon_high=high)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
    one, other = (torch.autograd.grad(loss, tokens)[0] for loss in (ours, theirs))
    assert other.abs().sum() > 0
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    if epsilons == (0.02, 0.05):
        assert metrics["clip_ratio"].total > 0
