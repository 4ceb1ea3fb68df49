"""The rules behind the document's verdicts, on numbers written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from reproduce_claims import (
    FAILS,
    HOLDS,
    RULES,
    UNDECIDED,
    Part,
    all_claims,
    best_of_n,
    collapse,
    combined,
    interval_of,
    iterations,
    kl,
    mean_of_max,
    over_optimisation,
    own_samples,
    ranking,
    reward_model,
    without_ranking,
)

from rrhf_peft.evaluate.statistics import Interval

#: Three seeds in which every claim holds.
GOOD: dict[str, Any] = {
    "rows": {
        "base": {"reward": [0.40, 0.41, 0.42], "perplexity": [18.0, 17.5, 18.5], "pair_accuracy": [0.50, 0.51, 0.50]},
        "best_of_4": {"reward": [0.80, 0.80, 0.81], "perplexity": [17.0, 17.0, 17.5]},
        "sft": {"reward": [0.55, 0.56, 0.56]},
        "bp": {"reward": [0.80, 0.79, 0.80]},
        "sp": {"reward": [0.80, 0.81, 0.80]},
        "dp": {"reward": [0.78, 0.79, 0.78], "perplexity": [19.0, 19.5, 19.0], "pair_accuracy": [0.70, 0.69, 0.71]},
        "d": {"reward": [0.80, 0.79, 0.80]},
        "p": {"reward": [0.68, 0.69, 0.69]},
        "without_rank": {
            "reward": [0.70, 0.70, 0.69],
            "perplexity": [18.0, 18.5, 18.0],
            "pair_accuracy": [0.55, 0.54, 0.55],
        },
        "without_ft": {"perplexity": [400.0, 900.0, 300.0]},
        "ip_1": {"reward": [0.78, 0.79, 0.78]},
        "ip_2": {"reward": [0.85, 0.86, 0.86]},
        "ip_3": {"reward": [0.90, 0.92, 0.91], "perplexity": [19.0, 19.5, 19.0]},
        "op_8": {"reward": [0.93, 0.94, 0.95], "perplexity": [80.0, 90.0, 85.0]},
        "op_8_kl": {"reward": [0.85, 0.86, 0.84], "perplexity": [20.0, 21.0, 20.0]},
    },
    "candidates": {
        name: {"mean": [0.45, 0.46, 0.45], "mean_of_max": [0.85, 0.86, 0.85]} for name in ("bp", "sp", "dp", "d", "p")
    },
}
for name, distinct in {"base": 0.5, "ip_3": 0.4, "op_8": 0.02, "op_8_kl": 0.4}.items():
    GOOD["rows"][name]["distinct_2"] = [distinct, 1.02 * distinct, 0.99 * distinct]


def changed(**rows: dict[str, list[float]]) -> dict[str, Any]:
    """GOOD with some rows' numbers replaced."""
    results = copy.deepcopy(GOOD)
    for name, numbers in rows.items():
        results["rows"][name] |= numbers
    return results


#: Rule -> numbers with which it does not hold, and numbers with which nobody can say.
CASES: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {
    mean_of_max: (
        changed(**{name: {"reward": [0.46, 0.47, 0.46]} for name in ("bp", "sp", "dp", "d", "p")}),
        changed(**{name: {"reward": [0.50, 0.95, 0.60]} for name in ("bp", "sp", "dp", "d", "p")}),
    ),
    best_of_n: (
        changed(dp={"reward": [0.42, 0.43, 0.44]}),
        changed(without_rank={"reward": [0.70, 0.90, 0.69]}),
    ),
    iterations: (
        changed(ip_3={"distinct_2": [0.1, 0.11, 0.1]}),  # more reward, by the same few words
        changed(ip_3={"reward": [0.80, 0.90, 0.91]}),
    ),
    ranking: (
        changed(without_rank={"reward": [0.85, 0.85, 0.86]}),
        changed(without_rank={"reward": [0.70, 0.90, 0.75]}),
    ),
    collapse: (
        changed(without_ft={"perplexity": [19.0, 20.0, 18.0]}),
        changed(without_ft={"perplexity": [19.0, 400.0, 18.0]}),
    ),
    own_samples: (
        changed(p={"reward": [0.85, 0.86, 0.87]}),
        changed(p={"reward": [0.60, 0.90, 0.80]}),
    ),
    over_optimisation: (
        changed(op_8={"perplexity": [19.0, 18.0, 19.0]}),
        changed(op_8={"perplexity": [19.0, 80.0, 30.0]}),
    ),
    kl: (
        changed(op_8_kl={"perplexity": [95.0, 99.0, 97.0]}),
        changed(op_8_kl={"reward": [0.30, 0.60, 0.50]}),
    ),
    reward_model: (
        changed(without_rank={"pair_accuracy": [0.70, 0.69, 0.71]}),  # fine-tuning alone does as much
        changed(dp={"pair_accuracy": [0.40, 0.60, 0.55]}),
    ),
}


def test_every_rule_has_its_cases() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_says_all_three(rule: Any) -> None:
    fails, undecided = CASES[rule]
    assert rule(GOOD).verdict == HOLDS
    assert rule(fails).verdict == FAILS
    assert rule(undecided).verdict == UNDECIDED


def test_a_single_seed_decides_nothing() -> None:
    one = copy.deepcopy(GOOD)
    for section in one.values():
        for numbers in section.values():
            for key in numbers:
                numbers[key] = numbers[key][:1]
    assert {claim.verdict for claim in all_claims(one)} == {UNDECIDED}


def test_intervals_are_corrected_for_the_number_of_claims() -> None:
    for claim in all_claims(GOOD):
        for part in claim.parts:
            assert part.comparisons == len(RULES)
            assert part.interval == interval_of(part.values, confidence=1 - 0.05 / len(RULES))
    narrow = Part("a number", [0.1, 0.2, 0.15], low=0.0)
    assert narrow.verdict == HOLDS
    assert Part("a number", narrow.values, low=0.0, comparisons=9).verdict == UNDECIDED


def test_if_ranking_did_nothing_its_claims_would_not_hold() -> None:
    unranked = without_ranking(GOOD)
    assert [rule(unranked).verdict for rule in (best_of_n, ranking)] == [UNDECIDED, UNDECIDED]
    assert reward_model(unranked).verdict == FAILS
    assert mean_of_max(unranked).verdict != HOLDS


def test_every_claim_has_a_name_of_its_own_and_says_something() -> None:
    claims = all_claims(GOOD)
    assert len({claim.name for claim in claims}) == len(claims)
    assert all(claim.says.endswith(".") and claim.parts for claim in claims)


def test_the_interval_is_students() -> None:
    """scipy.stats.t.interval(0.95, 3, loc=2.5, scale=scipy.stats.sem([1, 2, 3, 4]))."""
    found = interval_of([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.low == pytest.approx(0.4457397432391)
    assert found.high == pytest.approx(4.5542602567609)
    assert interval_of([3.0]) == Interval(3.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "low", "high", "verdict"),
    [
        ([0.1, 0.1, 0.1], 0.0, math.inf, HOLDS),
        ([-0.1, -0.1, -0.1], 0.0, math.inf, FAILS),
        ([0.1, 0.3, -0.2], 0.0, math.inf, UNDECIDED),
        ([1.0, 1.0, 1.01], 0.5, 1.5, HOLDS),
        ([1.6, 1.6, 1.61], 0.5, 1.5, FAILS),
        ([0.4, 0.4, 0.41], 0.5, 1.5, FAILS),
        ([0.5, 0.52, 0.49], 0.5, 1.5, UNDECIDED),
        ([0.0, 0.0, 0.0], 0.0, math.inf, UNDECIDED),  # no difference at all is not a gain, and no loss
    ],
)
def test_a_part_is_judged_by_its_interval(values: list[float], low: float, high: float, verdict: str) -> None:
    assert Part("a number", values, low, high).verdict == verdict


def test_one_part_that_fails_outweighs_the_rest() -> None:
    assert combined([HOLDS, HOLDS]) == HOLDS
    assert combined([HOLDS, UNDECIDED]) == UNDECIDED
    assert combined([HOLDS, UNDECIDED, FAILS]) == FAILS
