"""The statistics of an evaluation: from rewards, preferences, verdicts and texts to numbers and their intervals.

No model and no file: plain numbers in, plain numbers out. scipy, which takes a second to import, is imported where it
is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator

#: A JSON number, where null stands for one that is not finite.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; bounds that are not known are NaN."""

    mean: Number
    low: Number = math.nan
    high: Number = math.nan

    def __str__(self) -> str:
        return format(self)

    def __format__(self, form: str) -> str:
        """Mean and bounds in one form: 0.72 [0.68, 0.76]; the mean alone where a bound is not finite."""
        mean, low, high = (format(value, form or ".2f") for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if math.isfinite(self.low) and math.isfinite(self.high) else mean


def mean_reward(
    rewards: Sequence[Sequence[float]], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean reward over prompts with a percentile bootstrap interval.

    Prompts are resampled, not responses: responses to one prompt resemble each other, and counting each
    as a draw of its own would make the interval too narrow.

    Args:
        rewards: For each prompt, the rewards of its responses; every prompt weighs the same.
        confidence: Share of resamples that the interval holds.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
    """
    assert len(rewards) > 0, "no prompts"
    per_prompt = np.array([np.mean(group) for group in rewards], dtype=np.float64)
    return bootstrap_ratio(per_prompt, np.ones(len(per_prompt)), confidence=confidence, resamples=resamples, seed=seed)


def bootstrap_ratio(
    totals: np.ndarray, weights: np.ndarray, *, confidence: float, resamples: int, seed: int
) -> Interval:
    """sum(totals) / sum(weights) with its percentile bootstrap interval, drawing the same units of both.

    Args:
        totals: [n], of each unit (prompt, group).
        weights: [n], positive.
        confidence: share of resamples inside.
        resamples: how many.
        seed: of the draws.
    """
    from scipy.stats import bootstrap

    mean = float(totals.sum() / weights.sum())
    if len(totals) < 2:
        return Interval(mean, mean, mean)  # every resample is the sample

    def ratio(totals: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
        return totals.sum(axis) / weights.sum(axis)

    bounds = bootstrap(
        (totals, weights),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=resamples,
        batch=256,  # bounds the memory of the draws
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high))


def expected_best(rewards: Sequence[float], n: int) -> float:
    """Mean of the maximum over all subsets of n of the k rewards: an unbiased estimate of best-of-n.

    Of the rewards in ascending order the i-th (from 1) is the maximum of C(i - 1, n - 1) of the C(k, n) subsets.

    Args:
        rewards: k rewards of one prompt's responses.
        n: at least 1 and at most k.
    """
    assert 1 <= n <= len(rewards), (n, len(rewards))
    ordered = sorted(rewards)
    subsets = math.comb(len(ordered), n)
    return math.fsum(reward * (math.comb(index, n - 1) / subsets) for index, reward in enumerate(ordered))


def pair_accuracy(preferences: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> float:
    """Share of ordered pairs (score_i > score_j within a group) with preference_i > preference_j.

    The same number as the training metric `pair_accuracy`, pooled over all pairs: equal scores make no
    pair, equal preferences are not right. NaN where no two scores differ.

    Args:
        preferences: For each group, the policy's p_i (Eq. 1 of https://arxiv.org/abs/2304.05302).
        scores: For each group, as many scores.
    """
    right = pairs = 0
    for group in zip(preferences, scores, strict=True):
        more_right, more_pairs = _right_pairs(*group)
        right, pairs = right + more_right, pairs + more_pairs
    return right / pairs if pairs else math.nan


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two lists of one group: agreeing less disagreeing pairs, with ties taken into account.

        tau_b = (P - Q) / sqrt((P + Q + T) (P + Q + U)),    T, U: pairs tied in `one` only, in `other` only

    Kendall, "The treatment of ties in ranking problems" (Biometrika 33, 1945). NaN where either list has a
    single value.
    """
    from scipy.stats import kendalltau

    return float(kendalltau(one, other).statistic)


@dataclass(frozen=True)
class PreferenceFigures:
    """How a policy's p_i order labelled groups: the paper's Table 5, for any k.

    Attributes:
        pair_accuracy: pooled over pairs, with an interval over groups.
        kendall_tau: tau-b, mean over groups.
        best_hit_rate: share of groups whose likeliest response is among the best-scored.
        pairs: ordered pairs.
        groups: groups with an ordered pair; the others say nothing.
    """

    pair_accuracy: Interval
    kendall_tau: float
    best_hit_rate: float
    pairs: int
    groups: int


def preference_figures(
    preferences: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PreferenceFigures | None:
    """Compare p_i with scores, group by group; None where no two scores of a group differ.

    Args:
        preferences: for each group, the policy's p_i.
        scores: for each group, as many scores.
        confidence: of the interval, which resamples groups.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    counted = [_right_pairs(p, r) for p, r in zip(preferences, scores, strict=True)]
    ordered = [index for index, (_, pairs) in enumerate(counted) if pairs]
    if not ordered:
        return None
    right, pairs = np.array([counted[index] for index in ordered], dtype=np.float64).T
    accuracy = bootstrap_ratio(right, pairs, confidence=confidence, resamples=resamples, seed=seed)
    groups = [(preferences[index], scores[index]) for index in ordered]
    hits = [r[max(range(len(p)), key=p.__getitem__)] == max(r) for p, r in groups]
    taus = [0.0 if math.isnan(tau := kendall_tau(p, r)) else tau for p, r in groups]  # p all equal: no order at all
    return PreferenceFigures(
        accuracy,
        math.fsum(taus) / len(taus),
        sum(hits) / len(hits),
        int(pairs.sum()),
        len(ordered),
    )


def _right_pairs(preferences: Sequence[float], scores: Sequence[float]) -> tuple[int, int]:
    """(pairs ordered right, ordered pairs) of one group."""
    assert len(preferences) == len(scores), "one preference per score"
    p, r = np.asarray(preferences), np.asarray(scores)
    ordered = r[:, None] > r[None, :]
    return int((ordered & (p[:, None] > p[None, :])).sum()), int(ordered.sum())


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


def reward_verdicts(
    rewards: Sequence[float | None], others: Sequence[float | None], margin: float = 0.0
) -> list[int | None]:
    """1 where response i is rewarded higher than the other policy's response i by more than `margin`, -1, or 0.

    None where one of the two has no reward; as many as both policies have responses.
    """
    apart = [
        None if reward is None or other is None else reward - other
        for reward, other in zip(rewards, others)  # noqa: B905 - as many as both have
    ]
    return [None if one is None else 0 if abs(one) <= margin else int(math.copysign(1, one)) for one in apart]


def win_shares(verdicts: Sequence[Sequence[int]], length_differences: Sequence[Sequence[float]]) -> WinShares:
    """Shares of wins, ties and losses; every prompt weighs the same.

    Args:
        verdicts: for each prompt, 1, 0 or -1 for each pair of responses; a prompt may have none.
        length_differences: for each of them, how much longer the policy's response is than the other's.
    """
    compared = [(group, longer) for group, longer in zip(verdicts, length_differences, strict=True) if group]
    if not compared:
        return WinShares(0.0, 0.0, 0.0, 0, None)
    win, tie, lose = (
        math.fsum(sum(verdict == value for verdict in group) / len(group) for group, _ in compared) / len(compared)
        for value in (1, 0, -1)
    )
    outcome = np.array([(verdict + 1) / 2 for group, _ in compared for verdict in group])
    longer = np.array([difference for _, lengths in compared for difference in lengths], dtype=np.float64)
    weight = np.array([1 / len(group) for group, _ in compared for _ in group])
    return WinShares(win, tie, lose, len(compared), length_controlled_win_rate(outcome, longer, weight))


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
    from scipy.optimize import minimize

    x = np.stack([np.ones(len(longer)), np.tanh(longer / spread)], axis=1)
    weight, ridge = weight / weight.sum(), np.array([0.0, RIDGE])

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ b
        value = (weight * (np.logaddexp(0, z) - outcome * z)).sum() + (ridge * b**2).sum() / 2
        return value, x.T @ (weight * (1 / (1 + np.exp(-z)) - outcome)) + ridge * b

    b = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(1 / (1 + np.exp(-b[0])))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams, pooled over the texts; 0 where there are none.

    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (https://arxiv.org/abs/1510.03055). It falls with the amount of text, so compare like with like.
    """
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_words(texts: Sequence[str]) -> float:
    """Mean number of words per text; 0 where there are no texts."""
    return sum(len(text.split()) for text in texts) / len(texts) if texts else 0.0


def mean_repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of n-grams of words that a text has said before, mean over texts: 1 - different / all, within each text.

    seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training"
    (https://arxiv.org/abs/1908.04319), over words instead of tokens. A text of fewer than n words repeats nothing.
    """
    shares = []
    for words in map(str.split, texts):
        grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0
