"""PPO as RRHF's paper compares with it: clipped, GAE, a value head on the adapter, KL against the adapter-off policy.

    r_t     = [t is last] R(x, y) - b log (pi_old(y_t|..) / pi_off(y_t|..))         the penalty is in the reward
    delta_t = r_t + gamma V(s_t+1) - V(s_t),          V after the end is 0
    A_t     = sum_l (gamma lambda)^l delta_t+l                                      https://arxiv.org/abs/1506.02438
    L_pi    = - min(w_t A_t, clip(w_t, 1 - e, 1 + e) A_t)    w_t = pi(y_t|..) / pi_old(y_t|..)
    L_V     = 1/2 (V(s_t) - (A_t + V_old(s_t)))^2            w, e: https://arxiv.org/abs/1707.06347, Eq. 7
    L       = L_pi + c L_V                                   means over all tokens of a minibatch

The value head is one linear layer on the adapted model's last hidden state. Shapes: N responses, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from study_measure import Policy, padded
from torch import nn


@dataclass(frozen=True)
class PPO:
    """Settings, under the symbols above.

    Attributes:
        kl_coefficient: b.
        gamma, lam: of the advantages.
        epsilon: e.
        value_weight: c.
        epochs: passes over the responses of a step.
        minibatch: responses of one update.
        max_grad_norm: longer gradients are cut.
    """

    learning_rate: float = 1e-3
    kl_coefficient: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    epsilon: float = 0.2
    value_weight: float = 0.1
    epochs: int = 3
    minibatch: int = 16
    max_grad_norm: float = 1.0


def advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """A_t [N, T] of rewards and values [N, T] whose mask is 1 on the tokens of a response, one stretch in each row."""
    result, after = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(after)
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t].to(values.dtype)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = inside * (delta + gamma * lam * after)
        next_value = inside * values[:, t]
        result[:, t] = after
    return result


def policy_loss(
    log_probs: torch.Tensor, old: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """L_pi: the mean over all tokens, of log-probs and advantages (`weights`) [N, T]."""
    ratio = (log_probs - old).exp()
    losses = -torch.minimum(ratio * weights, ratio.clamp(1 - epsilon, 1 + epsilon) * weights)
    return (losses * mask).sum() / mask.sum()


def train_ppo(
    policy: Policy,
    batches: Sequence[Sequence[str]],
    reward: Callable[[list[str]], list[float]],
    decoding: dict[str, Any],
    settings: PPO,
    seed: int,
) -> list[float]:
    """Train the policy's adapter, one step per batch of prompts; returns the mean reward of each step's responses."""
    torch.manual_seed(seed)
    head = nn.Linear(policy.model.config.hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    trained = [p for p in policy.model.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    history = []
    for step, prompts in enumerate(batches):
        policy.model.eval()
        answers = policy.sample(prompts, decoding, seed=seed * 100_003 + step)
        scores = torch.tensor(reward([answer["text"] for answer in answers]), dtype=torch.float32)
        history.append(scores.mean().item())
        tokens, attention, mask = _layout(policy, answers)
        with torch.no_grad():
            old, values = _evaluate(policy, head, tokens, attention)
            with policy.model.disable_adapter():
                off, _ = _evaluate(policy, head, tokens, attention)
        rewards = -settings.kl_coefficient * (old - off) * mask
        last = mask.cumsum(1).argmax(1)  # the first position at which all tokens of the response are counted
        rewards[torch.arange(len(answers)), last] += scores
        gae = advantages(rewards, values, mask, settings.gamma, settings.lam)
        returns = gae + values
        chosen = gae[mask.bool()]
        weights = (gae - chosen.mean()) / (chosen.std() + 1e-8)
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(answers)).split(settings.minibatch):
                new, value = _evaluate(policy, head, tokens[rows], attention[rows])
                loss = policy_loss(new, old[rows], weights[rows], mask[rows], settings.epsilon)
                miss = ((value - returns[rows]) ** 2 * mask[rows]).sum() / mask[rows].sum()
                optimizer.zero_grad()
                (loss + settings.value_weight * 0.5 * miss).backward()
                nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
    return history


def _layout(policy: Policy, answers: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [N, T + 1], and which of the T predictions are of a response's tokens."""
    ids = [answer["prompt_ids"] + answer["ids"] for answer in answers]
    tokens, attention = padded(ids, policy.tokenizer.pad_token_id, left=False)
    mask = torch.zeros(tokens[:, 1:].shape)
    for row, answer in enumerate(answers):
        first = len(answer["prompt_ids"]) - 1
        mask[row, first : first + len(answer["ids"])] = 1
    return tokens, attention, mask


def _evaluate(
    policy: Policy, head: nn.Module, tokens: torch.Tensor, attention: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi of each next token and V of the state before it, [N, T] both."""
    output = policy.model(input_ids=tokens, attention_mask=attention, output_hidden_states=True, use_cache=False)
    log_probs = output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return log_probs, head(output.hidden_states[-1][:, :-1]).squeeze(-1)
