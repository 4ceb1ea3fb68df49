"""PPO: its advantages and loss against loops, and that it learns; the penalty holds it near the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ppo import PPO, advantages, policy_loss, train_ppo
from study_measure import Policy
from train.online_rules import PROMPTS, letters

DECODING = {"temperature": 1.0, "max_new_tokens": 8}


def by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Each advantage as the sum that defines it, from the response's own tokens alone."""
    found = []
    for t in range(len(rewards)):
        total = 0.0
        for ahead in range(len(rewards) - t):
            at = t + ahead
            following = values[at + 1] if at + 1 < len(values) else 0.0
            total += (gamma * lam) ** ahead * (rewards[at] + gamma * following - values[at])
        found.append(total)
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_equal_the_sums_that_define_them(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(4)
    stretches = [(3, 5), (0, 1), (7, 9), (2, 8)]  # first and one past the last token of each response
    rewards, values = (torch.randn(4, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(4, 10)
    for row, (first, end) in enumerate(stretches):
        mask[row, first:end] = 1
    found = advantages(rewards * mask, values, mask, gamma, lam)
    for row, (first, end) in enumerate(stretches):
        expected = by_hand(rewards[row, first:end].tolist(), values[row, first:end].tolist(), gamma, lam)
        assert found[row, first:end].tolist() == pytest.approx(expected, rel=1e-12)
        assert found[row, :first].abs().sum() == 0 == found[row, end:].abs().sum()


def test_the_loss_is_cut_where_a_token_has_moved_too_far() -> None:
    old = torch.zeros(1, 5, dtype=torch.float64)
    log_probs = torch.tensor([[0.5, 0.5, -0.5, -0.5, 9.0]], dtype=torch.float64, requires_grad=True)
    weights, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0, 7.0]], dtype=torch.float64), torch.tensor([[1, 1, 1, 1, 0]])
    loss = policy_loss(log_probs, old, weights, mask, 0.2)
    ratios = [torch.tensor(x).double().exp().item() for x in (0.5, 0.5, -0.5, -0.5)]
    expected = -(1.2 - ratios[1] + ratios[2] - 0.8) / 4
    assert loss.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert [value != 0 for value in gradient[0].tolist()] == [False, True, True, False, False]


def run(model: Path, coefficient: float, steps: int) -> tuple[list[float], float]:
    policy = Policy(str(model))
    policy.add_adapter(8, seed=0)
    batches = [[prompt for prompt in PROMPTS for _ in range(2)]] * steps
    history = train_ppo(
        policy,
        batches,
        lambda texts: letters("", texts),
        DECODING,
        PPO(learning_rate=3e-3, kl_coefficient=coefficient, minibatch=12),
        seed=3,
    )
    answers = policy.sample(PROMPTS, DECODING, seed=1)
    return history, sum(policy.kl_to_base(answers)) / len(answers)


def test_it_learns_and_the_penalty_holds_it_back(sharper_model: Path) -> None:
    history, far = run(sharper_model, 0.0, 12)
    assert sum(history[-4:]) / 4 > sum(history[:4]) / 4 + 0.1
    _, near = run(sharper_model, 0.1, 12)
    assert far > 5
    assert near < far / 2


@pytest.fixture(scope="module")
def sharper_model(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model with a larger head: what its layers say reaches its tokens."""
    policy = Policy(str(tiny_model_folder))
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(20)
    folder = tmp_path_factory.mktemp("sharper")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder
