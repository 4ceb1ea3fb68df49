"""Win, tie and lose between two policies that answered the same prompts, and the win rate at equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Of the length's coefficient, for each comparison; keeps it finite where length alone decides.
RIDGE = 1e-3


@dataclass(frozen=True)
class WinShares:
    """Shares over prompts, and the win rate (a tie counts half) that the same policy would have at equal length.

    Attributes:
        win: share won.
        tie: share tied.
        lose: share lost.
        prompts: prompts with a comparison.
        length_controlled_win_rate: None where nothing was compared.
    """

    win: float
    tie: float
    lose: float
    prompts: int
    length_controlled_win_rate: float | None


def reward_verdicts(own: Sequence[float], other: Sequence[float], margin: float = 0.0) -> list[int]:
    """1 where response i is rewarded higher than the other policy's response i by more than `margin`, -1, or 0."""
    return [0 if abs(mine - theirs) <= margin else (1 if mine > theirs else -1) for mine, theirs in zip(own, other)]  # noqa: B905 - as many as both have


def win_shares(verdicts: Sequence[Sequence[int]], length_differences: Sequence[Sequence[float]]) -> WinShares:
    """Shares of wins, ties and losses; every prompt weighs the same.

    Args:
        verdicts: for each prompt, 1, 0 or -1 for each pair of responses; a prompt may have none.
        length_differences: for each of them, how much longer the policy's response is than the other's.
    """
    found = [(own, longer) for own, longer in zip(verdicts, length_differences, strict=True) if own]
    if not found:
        return WinShares(0.0, 0.0, 0.0, 0, None)
    win, tie, lose = (
        math.fsum(sum(one == value for one in own) / len(own) for own, _ in found) / len(found) for value in (1, 0, -1)
    )
    outcome = np.array([(one + 1) / 2 for own, _ in found for one in own])
    longer = np.array([one for _, own in found for one in own], dtype=np.float64)
    weight = np.array([1 / len(own) for own, _ in found for _ in own])
    return WinShares(win, tie, lose, len(found), length_controlled_win_rate(outcome, longer, weight))


def length_controlled_win_rate(outcome: np.ndarray, longer: np.ndarray, weight: np.ndarray) -> float:
    """Win rate at zero length difference, by a logistic regression on one covariate.

        logit P(win) = b0 + b1 tanh(d / std(d)),    d the difference in length;    sigmoid(b0) is returned

    A simplification of AlpacaEval 2 (https://arxiv.org/abs/2404.04475), whose regression has a term for each
    prompt's difficulty as well and is fitted for many policies together: the numbers are not comparable
    with its leaderboard. b1 is drawn towards 0 a little, so that it stays finite where length alone decides.

    Args:
        outcome: [n] 1 win, 0.5 tie, 0 lose.
        longer: [n] how much longer the winner-to-be's response is.
        weight: [n] weight of each comparison.
    """
    mean = float(np.average(outcome, weights=weight))
    spread = float(longer.std())
    if spread == 0 or mean in (0.0, 1.0):
        return mean  # no length to control for, or nothing that it could explain
    x = np.stack([np.ones(len(longer)), np.tanh(longer / spread)], axis=1)
    ridge = np.array([0.0, RIDGE * weight.sum()])
    b = np.zeros(2)

    def loss(at: np.ndarray) -> float:
        z = x @ at
        return float((weight * (np.logaddexp(0, z) - outcome * z)).sum() + (ridge * at**2).sum() / 2)

    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ b)))
        gradient = x.T @ (weight * (p - outcome)) + ridge * b
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        size = 1.0  # Newton's step may jump past the minimum; half of it is tried then
        while loss(b - size * step) > loss(b) and size > 1e-6:
            size /= 2
        b = b - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-b[0])))
