"""The paper's claims as rules over seeds, with the controls that would refute them: holds, does not hold, or undecided.

A claim has parts. A part is one number for each seed, and a range that the number must lie in; parts with a `control`
compare RRHF with what would do as well if the claim were hollow. From the seeds' numbers comes an interval of their
mean (Student's t), at a level corrected for the number of claims (Bonferroni). The part *holds* where the whole
interval lies in the range, *does not hold* where the whole interval lies outside of it, and is *undecided* where the
interval crosses the border, or where there are fewer than two seeds. A claim holds if all parts hold, does not hold if
one does not, and is undecided otherwise: parts make it harder to hold and not easier, so that claims are what is
corrected for.

Numbers of the same seed are compared with each other before anything is averaged: they share prompts, candidates and
pairs. `without_ranking` puts the run at rank_weight 0 in the place of DP: what would be said if ranking did nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from rrhf_peft.evaluate.statistics import Interval

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"

#: Doublings of the perplexity under the base, and halvings of distinct-2, from those of the base's text, from which on
#: text counts as fallen apart.
COLLAPSE = 1.0
#: What counts as near a goal: nearer to it than to the start, and no further beyond it than that.
NEAR = (0.5, 1.5)
#: Points of reward model accuracy that count as a gain: a tenth of the paper's, from 45.13% to 61.75%.
LEAST_ACCURACY_GAIN = 1.66
SETTINGS = ("bp", "sp", "dp", "d", "p")
#: Setting -> fine-tuning alone on the best of its groups' responses, where that was run.
SFT_ON_BEST = {"dp": "without_rank", "p": "sft"}


@dataclass(frozen=True)
class Part:
    """One number for each seed, and the range it has to lie in.

    Attributes:
        measure: the number, in words.
        values: by seed.
        low: the least that is right.
        high: the most that is right.
        control: what is compared with, in words; empty where the number stands for itself.
        comparisons: claims in the table, for which the interval is corrected.
    """

    measure: str
    values: Sequence[float]
    low: float = -math.inf
    high: float = math.inf
    control: str = ""
    comparisons: int = 1

    @property
    def range(self) -> str:
        """The range in words."""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"

    @property
    def interval(self) -> Interval:
        """Mean over seeds with its corrected interval."""
        return interval_of(self.values, confidence=1 - 0.05 / self.comparisons)

    @property
    def verdict(self) -> str:
        """Whether the interval lies in the range, outside of it, or across its border."""
        low, high = self.interval.low, self.interval.high
        if self.low < low and high < self.high:
            return HOLDS
        return FAILS if high < self.low or low > self.high else UNDECIDED


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what must be true of the numbers for it to hold here."""

    name: str
    says: str
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> str:
        """holds, does not hold, or undecided."""
        return combined([part.verdict for part in self.parts])


def interval_of(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over seeds with its t interval; infinitely wide with one seed."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return Interval(mean, mean - half, mean + half)


def combined(verdicts: Sequence[str]) -> str:
    """Of a claim with these parts."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if all(verdict == HOLDS for verdict in verdicts) else UNDECIDED


def all_claims(results: dict[str, Any]) -> list[Claim]:
    """Every claim with the numbers of a run, corrected for their number."""
    claims = [rule(results) for rule in RULES]
    return [
        replace(claim, parts=tuple(replace(part, comparisons=len(claims)) for part in claim.parts)) for claim in claims
    ]


def without_ranking(results: dict[str, Any]) -> dict[str, Any]:
    """The results with DP at rank_weight 0 in the place of DP."""
    return {**results, "rows": {**results["rows"], "dp": results["rows"]["without_rank"]}}


def mean_of_max(results: dict[str, Any]) -> Claim:
    """Of the way from the candidates' mean reward to the mean of their groups' maximum: how much is learnt."""
    rows = results["rows"]
    parts = [
        Part(f"{name.upper()}: share of the way", share_of_the_way(results, name, name), *NEAR) for name in SETTINGS
    ]
    parts += [
        Part(
            f"{name.upper()}: share of the way, less the control's",
            _less(share_of_the_way(results, name, name), share_of_the_way(results, name, control)),
            low=0.0,
            control="SFT on the groups' best",
        )
        for name, control in SFT_ON_BEST.items()
        if control in rows
    ]
    return Claim("mean of max", "The learned reward approaches the mean of max.", tuple(parts))


def best_of_n(results: dict[str, Any]) -> Claim:
    """One draw of the trained policy is about as good as the best of four of the base."""
    rows = results["rows"]
    goal = _less(rows["best_of_4"]["reward"], rows["base"]["reward"])
    ways = {
        name: [
            gain / best for gain, best in zip(_less(rows[name]["reward"], rows["base"]["reward"]), goal, strict=True)
        ]
        for name in ("dp", "without_rank")
    }
    return Claim(
        "best of n",
        "RRHF learns the best of n.",
        (
            Part("DP, one draw: share of the way from the base to its best of 4", ways["dp"], *NEAR),
            Part(
                "the same, less the control's",
                _less(ways["dp"], ways["without_rank"]),
                low=0.0,
                control="SFT on the groups' best",
            ),
        ),
    )


def iterations(results: dict[str, Any]) -> Claim:
    """Each round of sampling and training gives more reward than the one before, and the text stays text."""
    return Claim(
        "iterations",
        "IP-n keeps improving.",
        (
            _gain(results, "ip_2", "ip_1", "reward of IP-2 less that of IP-1"),
            _gain(results, "ip_3", "ip_2", "reward of IP-3 less that of IP-2"),
            *_text_stays(results, "ip_3", "IP-3"),
        ),
    )


def ranking(results: dict[str, Any]) -> Claim:
    """The ranking loss gives more reward than fine-tuning on the best responses of the same groups."""
    return Claim(
        "ranking loss",
        "The ranking loss beats SFT alone.",
        tuple(
            _gain(
                results,
                name,
                control,
                f"{name.upper()}: reward, less the control's",
                control="SFT on the groups' best",
            )
            for name, control in SFT_ON_BEST.items()
        ),
    )


def collapse(results: dict[str, Any]) -> Claim:
    """Without the fine-tuning loss the text falls apart, and with it it does not."""
    return Claim(
        "fine-tuning loss",
        "Without L_ft training collapses.",
        (
            Part(
                "doublings of perplexity from the base to DP without L_ft",
                _doublings(results, "perplexity", "without_ft", "base"),
                low=COLLAPSE,
            ),
            Part(
                "doublings of perplexity from the base to DP",
                _doublings(results, "perplexity", "dp", "base"),
                high=COLLAPSE,
                control="DP with L_ft",
            ),
        ),
    )


def own_samples(results: dict[str, Any]) -> Claim:
    """The policy's own samples beside the data set's responses give more than these alone, whatever the loss."""
    return Claim(
        "own samples",
        "Sampling from the policy helps: DP beats P.",
        (
            _gain(results, "dp", "p", "reward of DP less that of P"),
            _gain(
                results, "d", "p", "reward of D less that of P", control="as many sources: D has no provided response"
            ),
        ),
    )


def over_optimisation(results: dict[str, Any]) -> Claim:
    """Online without KL: more reward, text fallen apart."""
    return Claim(
        "over-optimisation",
        "Online training without KL over-optimises the reward.",
        (
            _gain(results, "op_8", "base", "reward of OP-8 less the base's"),
            Part(
                "doublings of perplexity from the base to OP-8",
                _doublings(results, "perplexity", "op_8", "base"),
                low=COLLAPSE,
            ),
            Part(
                "halvings of distinct-2 from the base to OP-8",
                _doublings(results, "distinct_2", "base", "op_8"),
                low=COLLAPSE,
            ),
        ),
    )


def kl(results: dict[str, Any]) -> Claim:
    """Online with KL: the text stays text, and there is more reward than offline training gives."""
    return Claim(
        "KL penalty",
        "A KL penalty tames online training.",
        (
            Part(
                "doublings of perplexity from the control to OP-8 with KL",
                _doublings(results, "perplexity", "op_8_kl", "op_8"),
                high=0.0,
                control="OP-8 without KL",
            ),
            *_text_stays(results, "op_8_kl", "OP-8 with KL"),
            _gain(results, "op_8_kl", "dp", "reward of OP-8 with KL, less the control's", control="offline DP"),
        ),
    )


def reward_model(results: dict[str, Any]) -> Claim:
    """The trained policy's p_i orders held-out pairs better than the base's, and better than fine-tuning alone does."""
    rows = results["rows"]

    def gain(other: str) -> list[float]:
        return [100 * one for one in _less(rows["dp"]["pair_accuracy"], rows[other]["pair_accuracy"])]

    measure = "points of pairs that DP's p_i orders right, less "
    return Claim(
        "reward model",
        "RRHF raises reward model accuracy.",
        (
            Part(f"{measure}the base's", gain("base"), low=LEAST_ACCURACY_GAIN),
            Part(f"{measure}the control's", gain("without_rank"), low=LEAST_ACCURACY_GAIN, control="DP without L_rank"),
        ),
    )


#: In the order of the document.
RULES = (
    mean_of_max,
    best_of_n,
    iterations,
    ranking,
    collapse,
    own_samples,
    over_optimisation,
    kl,
    reward_model,
)


def share_of_the_way(results: dict[str, Any], setting: str, policy: str) -> list[float]:
    """Of the way from a setting's candidates' mean reward to their mean of max: how far a policy's reward has come."""
    candidates, rewards = results["candidates"][setting], results["rows"][policy]["reward"]
    return [
        (learned - mean) / (best - mean)
        for learned, mean, best in zip(rewards, candidates["mean"], candidates["mean_of_max"], strict=True)
    ]


def _gain(results: dict[str, Any], better: str, worse: str, measure: str, control: str = "") -> Part:
    """That one row has more reward than another."""
    rows = results["rows"]
    return Part(measure, _less(rows[better]["reward"], rows[worse]["reward"]), low=0.0, control=control)


def _text_stays(results: dict[str, Any], name: str, title: str) -> tuple[Part, Part]:
    """The guards against collapse: perplexity does not double, and distinct-2 does not halve."""
    return (
        Part(
            f"doublings of perplexity from the base to {title}",
            _doublings(results, "perplexity", name, "base"),
            high=COLLAPSE,
            control="guard against collapse",
        ),
        Part(
            f"halvings of distinct-2 from the base to {title}",
            _doublings(results, "distinct_2", "base", name),
            high=COLLAPSE,
            control="guard against collapse",
        ),
    )


def _less(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(first, second, strict=True)]


def _doublings(results: dict[str, Any], key: str, name: str, other: str) -> list[float]:
    """log2 of the ratio of two rows: on this scale seeds spread evenly."""
    rows = results["rows"]
    return np.log2(np.divide(rows[name][key], rows[other][key])).tolist()
