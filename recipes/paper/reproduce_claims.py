"""The paper's claims as rules over seeds: each holds, does not hold, or is undecided.

A claim has parts. A part is one number for each seed, and a range that the number must lie in. From the seeds'
numbers comes a 95% interval of their mean (Student's t): the part *holds* where the whole interval lies in the
range, *does not hold* where the whole interval lies outside of it, and is *undecided* where the interval crosses
the border, or where there are fewer than two seeds. A claim holds if all parts hold, does not hold if one does
not, and is undecided otherwise.

Numbers of the same seed are compared with each other before anything is averaged: they share prompts,
candidates and pairs.

Left to others: where the numbers come from (`reproduce_results`), how they are shown (`reproduce_document`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"

#: Student's t, two-sided 95%, for 1, 2, 3 ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

#: Doublings of the perplexity under the base, from that of its own text, from which on text counts as fallen apart.
COLLAPSE = 1.0
#: What counts as near a goal: nearer to it than to the start, and no further beyond it than that.
NEAR = (0.5, 1.5)
SETTINGS = ("bp", "sp", "dp", "d", "p")


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval; infinitely wide with one seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Part:
    """One number for each seed, and the range it has to lie in.

    Attributes:
        what: the number, in words.
        values: by seed.
        low: the least that is right.
        high: the most that is right.
    """

    what: str
    values: Sequence[float]
    low: float = -math.inf
    high: float = math.inf

    @property
    def range(self) -> str:
        """The range in words."""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what must be true of the numbers for it to hold here."""

    name: str
    says: str
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> str:
        """holds, does not hold, or undecided."""
        return combined([part_verdict(part) for part in self.parts])


def interval_of(values: Sequence[float]) -> Interval:
    """Mean over seeds with its 95% t interval."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _T[min(len(values) - 1, len(_T)) - 1] * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def part_verdict(part: Part) -> str:
    """Whether the interval lies in the part's range, outside of it, or across its border."""
    _, low, high = interval_of(part.values)
    if part.low < low and high < part.high:
        return HOLDS
    if high < part.low or low > part.high:
        return FAILS
    return UNDECIDED


def combined(verdicts: Sequence[str]) -> str:
    """Of a claim with these parts."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if all(verdict == HOLDS for verdict in verdicts) else UNDECIDED


def all_claims(results: dict[str, Any]) -> list[Claim]:
    """Every claim with the numbers of a run."""
    return [rule(results) for rule in RULES]


def mean_of_max(results: dict[str, Any]) -> Claim:
    """Of the way from the candidates' mean reward to the mean of their groups' maximum: how much is learnt."""
    by_setting = []
    for name in SETTINGS:
        own, reward = results["candidates"][name], results["rows"][name]["reward"]
        by_setting.append(
            [
                (learned - mean) / (best - mean)
                for learned, mean, best in zip(reward, own["mean"], own["mean_of_max"], strict=True)
            ]
        )
    ways = [math.fsum(own) / len(own) for own in zip(*by_setting, strict=True)]
    what = "share of the way from the candidates' mean reward to their mean of max, over BP, SP, DP, D and P"
    return Claim("mean of max", "The learned reward approaches the mean of max.", (Part(what, ways, *NEAR),))


def iterations(results: dict[str, Any]) -> Claim:
    """Each round of sampling and training gives more reward than the one before."""
    parts = tuple(
        _gain(results, f"ip_{number}", f"ip_{number - 1}", f"reward of IP-{number} less that of IP-{number - 1}")
        for number in (2, 3)
    )
    return Claim("iterations", "IP-n keeps improving.", parts)


def ranking(results: dict[str, Any]) -> Claim:
    """The ranking loss gives more reward than fine-tuning on the best response, and than fine-tuning on the data."""
    return Claim(
        "ranking loss",
        "The ranking loss beats SFT alone.",
        (
            _gain(results, "dp", "without_rank", "reward of DP less that of DP without L_rank"),
            _gain(results, "dp", "sft", "reward of DP less that of SFT on the better provided response"),
        ),
    )


def over_optimisation(results: dict[str, Any]) -> Claim:
    """Online without KL: more reward, text fallen apart."""
    return Claim(
        "over-optimisation",
        "Online training without KL over-optimises the reward.",
        (
            _gain(results, "op_8", "base", "reward of OP-8 less the base's"),
            Part("doublings of perplexity from the base to OP-8", _doublings(results, "op_8", "base"), low=COLLAPSE),
        ),
    )


def kl(results: dict[str, Any]) -> Claim:
    """Online with KL: likelier text than without, and still more reward than the base."""
    return Claim(
        "KL penalty",
        "A KL penalty tames online training.",
        (
            Part(
                "doublings of perplexity from the base to OP-8 with KL",
                _doublings(results, "op_8_kl", "base"),
                high=COLLAPSE,
            ),
            Part("doublings of perplexity from OP-8 to OP-8 with KL", _doublings(results, "op_8_kl", "op_8"), high=0.0),
            _gain(results, "op_8_kl", "base", "reward of OP-8 with KL less the base's"),
        ),
    )


def reward_model(results: dict[str, Any]) -> Claim:
    """The trained policy's p_i orders held-out pairs better than the base's."""
    gain = _differences(results["rows"]["dp"]["pair_accuracy"], results["rows"]["base"]["pair_accuracy"])
    what = "pairs ordered right by DP's p_i less those by the base's, in percent of all"
    part = Part(what, [100 * value for value in gain], low=0.0)
    return Claim("reward model", "RRHF raises reward model accuracy.", (part,))


def best_of_n(results: dict[str, Any]) -> Claim:
    """One draw of the trained policy is about as good as the best of four of the base."""
    rows = results["rows"]
    best = _differences(rows["best_of_4"]["reward"], rows["base"]["reward"])
    learned = _differences(rows["dp"]["reward"], rows["base"]["reward"])
    ways = [own / goal for own, goal in zip(learned, best, strict=True)]
    part = Part("share of the way from the base's reward to its best of 4 that DP goes with one draw", ways, *NEAR)
    return Claim("best of n", "RRHF learns the best of n.", (part,))


def collapse(results: dict[str, Any]) -> Claim:
    """Without the fine-tuning loss the text falls apart, and with it it does not."""
    return Claim(
        "fine-tuning loss",
        "Without L_ft training collapses.",
        (
            Part(
                "doublings of perplexity from the base to DP without L_ft",
                _doublings(results, "without_ft", "base"),
                low=COLLAPSE,
            ),
            Part("doublings of perplexity from the base to DP", _doublings(results, "dp", "base"), high=COLLAPSE),
        ),
    )


def own_samples(results: dict[str, Any]) -> Claim:
    """The policy's own samples beside the data set's responses give more than these alone."""
    part = _gain(results, "dp", "p", "reward of DP less that of P")
    return Claim("own samples", "Sampling from the policy helps: DP beats P.", (part,))


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


def _gain(results: dict[str, Any], better: str, worse: str, what: str) -> Part:
    """That one row has more reward than another."""
    rows = results["rows"]
    return Part(what, _differences(rows[better]["reward"], rows[worse]["reward"]), low=0.0)


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(first, second, strict=True)]


def _doublings(results: dict[str, Any], name: str, other: str) -> list[float]:
    """log2 of the ratio of perplexities: on this scale seeds spread evenly."""
    rows = results["rows"]
    pairs = zip(rows[name]["perplexity"], rows[other]["perplexity"], strict=True)
    return [math.log2(own / reference) for own, reference in pairs]
