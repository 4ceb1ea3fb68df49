"""The sibling objectives against loop-written float64 oracles: value, gradient, invariances, metrics."""

from __future__ import annotations

import math

import pytest
import torch
from objectives.random_groups import as_lists, random_log_probs, reference_of
from oracles import siblings

from rrhf_peft.objectives import NEEDS_PAIRS, NEEDS_REFERENCE, OBJECTIVES, ONLINE_ONLY, TAKES_REFERENCE
from rrhf_peft.records import ResponseLogProbs

#: (objective, options, whether it is given a reference)
CASES = [
    ("dpo", {}, True),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2, "min_score_gap": 1.0}, True),
    ("dpo", {"pairs": "best_worst"}, True),
    ("dpo", {"pairs": "best_vs_rest", "min_score_gap": 1.0}, True),
    ("ipo", {}, True),
    ("ipo", {"beta": 0.3, "average_log_prob": False, "pairs": "best_vs_rest"}, True),
    ("odpo", {}, True),
    ("odpo", {"alpha": 0.5, "offset": "linear", "beta": 0.2, "pairs": "best_worst"}, True),
    ("simpo", {}, False),
    ("simpo", {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1, "pairs": "best_vs_rest"}, False),
    ("orpo", {}, False),
    ("orpo", {"beta": 2.0, "tied_best": "mean", "pairs": "best_worst"}, False),
    ("cpo", {}, False),
    ("cpo", {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.2, "sft_reduction": "sum"}, False),
    ("cpo", {"tied_best": "mean", "pairs": "best_vs_rest"}, False),
    ("kto", {}, True),
    ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7, "threshold": 1.0, "beta": 0.4}, True),
    ("kto", {"reference_point": "group"}, True),
    ("kto", {"reference_point": 2.5}, True),
    ("hinge", {}, False),
    ("hinge", {"beta": 0.1, "margin": 2.0, "sft_weight": 0.5, "sft_reduction": "sum", "tied_best": "mean"}, True),
    ("hinge", {"length_penalty": 1.0, "margin": 0.3, "pairs": "best_worst"}, False),
    ("plackett_luce", {}, False),
    ("plackett_luce", {"beta": 0.1, "length_penalty": 0.0}, True),
    ("plackett_luce", {"top_k": 2}, False),
    ("pro", {}, False),
    ("pro", {"temperature": "none", "sft_weight": 0.3, "sft_reduction": "mean", "tied_best": "mean"}, False),
    ("lipo_lambda", {}, True),
    ("lipo_lambda", {"beta": 0.02}, True),
    ("info_nca", {}, True),
    ("info_nca", {"beta": 0.03, "alpha": 0.4}, True),
    ("nca", {}, True),
    ("nca", {"beta": 0.03, "alpha": 0.4}, True),
    ("mpo", {}, True),
    ("mpo", {"beta": 0.03, "alpha": 0.7}, True),
    ("mpo", {"alpha": 0.7, "deviation": "signed"}, True),
    ("rpo", {}, True),
    ("rpo", {"beta": 0.05, "eta": 0.5, "distance": "forward_kl", "pairs": "best_vs_rest"}, True),
    ("rpo", {"distance": "squared", "min_score_gap": 1.0}, True),
    ("gvpo", {}, True),
    ("gvpo", {"beta": 0.7}, True),
    ("qrpo", {}, True),
    ("qrpo", {"beta": 0.5}, True),
]
#: Objectives that learn from responses of equal scores: by their log-ratios, or (qrpo) because all are the best.
TIES_TEACH = ("info_nca", "nca", "gvpo", "qrpo")
SIZES = [[2], [1, 5, 2], [32], [3, 1, 4, 1, 5, 9, 2, 6]]


def evaluate(name, log_probs, scores, options, with_reference, seed=99):
    reference = reference_of(log_probs, seed) if with_reference else None
    return OBJECTIVES[name](log_probs, scores, reference=reference, **options)


def oracle(name, log_probs, scores, options, with_reference, seed=99):
    extra = {"with_reference": True} if with_reference and name in TAKES_REFERENCE - NEEDS_REFERENCE else {}
    groups = as_lists(log_probs, scores, reference_of(log_probs, seed))
    return getattr(siblings, name)(groups, **options, **extra)


def test_every_sibling_has_cases():
    assert {name for name, _, _ in CASES} == set(OBJECTIVES) - {"rrhf", "sft"} - ONLINE_ONLY
    assert {name for name, _, given in CASES if given} == TAKES_REFERENCE - ONLINE_ONLY
    assert {name for name, _, given in CASES if not given}.isdisjoint(NEEDS_REFERENCE)


@pytest.mark.parametrize(("name", "options", "given"), CASES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradient_equal_the_oracles(name, options, given, sizes):
    log_probs, scores = random_log_probs(len(sizes) * 7 + sum(sizes), sizes, levels=4)
    reference = reference_of(log_probs, 99) if given else None
    loss, metrics = OBJECTIVES[name](log_probs, scores, reference=reference, **options)
    assert loss.item() == pytest.approx(oracle(name, log_probs, scores, options, given), rel=1e-10, abs=1e-14)
    assert all(torch.isfinite(torch.stack(mean)).all() for mean in metrics.values())

    (gradient,) = torch.autograd.grad(loss, log_probs.sum, allow_unused=True, materialize_grads=True)
    groups = as_lists(log_probs, scores, reference_of(log_probs, 99))
    if name == "kto":  # the reference point moves with the policy, but is no part of the gradient
        points = siblings.kto_reference_point(groups, options.get("reference_point", "batch"))
        options = {**options, "reference_point": points[0]}
        if len(set(points)) > 1:
            return
    extra = {"with_reference": True} if given and name in TAKES_REFERENCE - NEEDS_REFERENCE else {}
    function, place, step = getattr(siblings, name), 0, 1e-5
    for sums, _, _, _ in groups:
        for i in range(min(len(sums), 6)):
            value = sums[i]
            sums[i] = value + step
            above = function(groups, **options, **extra)
            sums[i] = value - step
            below = function(groups, **options, **extra)
            sums[i] = value
            assert gradient[place + i].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)
        place += len(sums)


@pytest.mark.parametrize(("name", "options", "given"), CASES, ids=str)
def test_gradcheck(name, options, given):
    log_probs, scores = random_log_probs(11, [3, 5, 2])
    reference = reference_of(log_probs, 5) if given else None
    if name == "kto" and isinstance(options.get("reference_point", "batch"), str):
        options = {**options, "reference_point": 0.75}

    def loss_of(sums):
        return OBJECTIVES[name](log_probs._replace(sum=sums), scores, reference=reference, **options)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs.sum,))


@pytest.mark.parametrize(("name", "options", "given"), CASES, ids=str)
def test_the_order_of_responses_does_not_matter(name, options, given):
    """Not even among ties, where the fine-tuning target is their mean."""
    log_probs, scores = random_log_probs(8, [7, 4])
    if name in ("orpo", "cpo", "hinge", "pro"):
        options = {**options, "tied_best": "mean"}
    reference = reference_of(log_probs, 3)
    generator = torch.Generator().manual_seed(1)
    order = torch.cat([torch.randperm(7, generator=generator), 7 + torch.randperm(4, generator=generator)])
    shuffled, shuffled_reference = (
        ResponseLogProbs(*(column[order] for column in item)) for item in (log_probs, reference)
    )
    one = OBJECTIVES[name](log_probs, scores, reference=reference if given else None, **options)
    other = OBJECTIVES[name](shuffled, scores[order], reference=shuffled_reference if given else None, **options)
    assert other[0].item() == pytest.approx(one[0].item(), rel=1e-12)
    for key, mean in one[1].items():
        assert torch.stack(other[1][key]).tolist() == pytest.approx(torch.stack(mean).tolist(), rel=1e-5), key


@pytest.mark.parametrize(("name", "options", "given"), CASES, ids=str)
def test_loss_is_a_mean_over_groups(name, options, given):
    """A batch of groups is the mean of the groups alone, ragged or not: what accumulation relies on."""
    log_probs, scores = random_log_probs(21, [3, 6, 2])
    reference = reference_of(log_probs, 4)
    if name == "kto" and options.get("reference_point", "batch") == "batch":
        options = {**options, "reference_point": "group"}
    whole = OBJECTIVES[name](log_probs, scores, reference=reference if given else None, **options)[0]
    parts = []
    for g in range(3):
        rows = log_probs.group == g
        one, its_reference = (ResponseLogProbs(*(column[rows] for column in item)) for item in (log_probs, reference))
        one, its_reference = (item._replace(group=torch.zeros_like(item.group)) for item in (one, its_reference))
        parts.append(OBJECTIVES[name](one, scores[rows], reference=its_reference if given else None, **options)[0])
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [case for case in CASES if "threshold" not in case[1] and case[0] not in TIES_TEACH],
    ids=str,
)
def test_ties_and_single_responses_teach_no_ranking(name, options, given):
    """Except to KTO with a number as threshold, which judges every response by itself."""
    log_probs, _ = random_log_probs(2, [4, 1])
    reference = reference_of(log_probs, 6) if given else None
    fine_tuning = {"orpo": {}, "cpo": {"sft_weight": 0.0}, "hinge": {"sft_weight": 0.0}, "pro": {"sft_weight": 0.0}}
    options = {**options, **fine_tuning.get(name, {})}
    loss, metrics = OBJECTIVES[name](log_probs, torch.full((5,), 0.1), reference=reference, **options)
    assert metrics["rank_loss"].total == 0
    (gradient,) = torch.autograd.grad(loss, log_probs.sum, allow_unused=True, materialize_grads=True)
    if name == "orpo":  # its fine-tuning part has no weight of its own
        assert gradient.nonzero().flatten().tolist() == ([0, 1, 2, 3, 4] if "tied_best" in options else [0, 4])
    else:
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize(("name", "options", "given"), CASES, ids=str)
def test_one_token_responses_and_float32_stay_finite(name, options, given):
    sums = torch.tensor([-1e-9, 0.0, -30.0, -500.0, -2.0], requires_grad=True)
    log_probs = ResponseLogProbs(sums, torch.ones(5, dtype=torch.int64), torch.full((5,), 4), torch.tensor([0] * 5))
    scores = torch.tensor([3.0, 0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    reference = log_probs._replace(sum=torch.tensor([-40.0, -1.0, 0.0, -1.0, -2.0])) if given else None
    loss, metrics = OBJECTIVES[name](log_probs, scores, reference=reference, **options)
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sums.grad).all()
    assert all(torch.isfinite(torch.stack(mean)).all() for mean in metrics.values())


@pytest.mark.parametrize(("name", "options", "given"), CASES, ids=str)
def test_arguments_are_not_mutated_and_the_reference_gets_no_gradient(name, options, given):
    log_probs, scores = random_log_probs(4, [3, 3])
    reference = reference_of(log_probs, 1)
    moving = reference._replace(sum=reference.sum.clone().requires_grad_())
    before = [tensor.detach().clone() for tensor in (*log_probs, *reference, scores)]
    loss, _ = OBJECTIVES[name](log_probs, scores, reference=moving if given else None, **options)
    loss.backward()
    assert moving.sum.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, (*log_probs, *reference, scores), strict=True))


@pytest.mark.parametrize("name", sorted(NEEDS_REFERENCE))
def test_a_policy_equal_to_its_reference(name):
    """What every run with a new adapter starts from: log-ratio 0 everywhere."""
    log_probs, scores = random_log_probs(13, [4, 3], levels=100)
    loss, metrics = OBJECTIVES[name](log_probs, scores, reference=log_probs)
    start = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5, "nca": 2 * math.log(2)}
    if name in start:
        assert loss.item() == pytest.approx(start[name], rel=1e-12)
    if name in ("rloo", "grpo"):  # all ratios are 1, and a group's advantages sum to 0
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert metrics["clip_ratio"].total == 0
        return
    for key in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics[f"rewards/{key}"].total == 0


def test_relations_between_the_objectives():
    log_probs, scores = random_log_probs(17, [2, 2, 2], levels=100)
    reference = reference_of(log_probs, 2)

    def value(name, **options):
        return OBJECTIVES[name](log_probs, scores, **options)[0].item()

    dpo = value("dpo", reference=reference, beta=0.3)
    assert value("odpo", reference=reference, beta=0.3, alpha=0.0) == pytest.approx(dpo)
    assert value("plackett_luce", reference=reference, beta=0.3, length_penalty=0.0) == pytest.approx(dpo)
    uniform = reference._replace(sum=torch.zeros_like(reference.sum))
    assert value("cpo", beta=0.3, sft_weight=0.0) == pytest.approx(value("dpo", reference=uniform, beta=0.3))
    assert value("plackett_luce", beta=2.0) == pytest.approx(value("simpo", beta=2.0, gamma=0.0))
    gaps = pytest.approx(value("plackett_luce", beta=1.0))
    assert value("pro", temperature="none", sft_weight=0.0) == gaps
    nll = -torch.stack([log_probs.sum[i] for i in (scores.view(3, 2).argmax(1) + torch.arange(0, 6, 2))]).mean().item()
    assert value("pro", temperature="none") - value("pro", temperature="none", sft_weight=0.0) == pytest.approx(
        0.05 * nll
    )


def test_relations_between_the_k_way_objectives():
    """What the papers say of their losses' special cases, on pairs and on whole groups."""
    log_probs, scores = random_log_probs(17, [2, 2, 2], levels=100)
    reference = reference_of(log_probs, 2)

    def value(name, **options):
        return OBJECTIVES[name](log_probs, scores, reference=reference, beta=0.3, **options)[0].item()

    dpo = value("dpo")
    assert value("mpo") == pytest.approx(dpo)
    assert value("info_nca", alpha=1e-3) == pytest.approx(dpo)
    assert value("gvpo") == pytest.approx(value("rpo", distance="squared") / 4)

    log_probs, scores = random_log_probs(3, [4], levels=100)
    reference = reference_of(log_probs, 7)
    assert len(set(scores.tolist())) == 4
    s = 0.3 * (log_probs.sum - reference.sum)
    w = (scores - scores.mean()) - (s - s.mean()).detach()
    surrogate = -0.3 * (w * log_probs.sum).sum() / 3  # the paper's loss; gvpo's gradient, not its value
    theirs = torch.autograd.grad(surrogate, log_probs.sum)[0]
    ours = torch.autograd.grad(value_of("gvpo", log_probs, scores, reference, beta=0.3), log_probs.sum)[0]
    torch.testing.assert_close(ours, theirs)

    optimum = log_probs._replace(sum=reference.sum + scores / 0.3 - 5.0)
    assert value_of("gvpo", optimum, scores, reference, beta=0.3).item() == pytest.approx(0, abs=1e-20)
    for distance in ("squared", "backward_kl", "forward_kl"):
        loss = value_of("rpo", optimum, scores, reference, beta=0.3, distance=distance)
        assert loss.item() == pytest.approx(0, abs=1e-12)


def value_of(name, log_probs, scores, reference, **options):
    return OBJECTIVES[name](log_probs, scores, reference=reference, **options)[0]


def test_lipo_lambda_learns_from_its_first_step_on():
    """A new adapter's log-ratios are all 0: ties in s must not make all weights 0."""
    log_probs, _ = random_log_probs(5, [4])
    scores = torch.tensor([0.2, 0.9, 0.4, 0.4], dtype=torch.float64)
    loss = value_of("lipo_lambda", log_probs, scores, log_probs)
    (gradient,) = torch.autograd.grad(loss, log_probs.sum)
    assert gradient[1] < 0 < gradient[0]
    assert gradient[2] == pytest.approx(gradient[3].item())


@pytest.mark.parametrize("name", ["info_nca", "nca", "gvpo"])
def test_ties_are_drawn_together(name):
    """Equal scores: the response whose log-ratio is higher loses, the other gains, and equal ones stay."""
    log_probs, _ = random_log_probs(2, [2])
    scores = torch.full((2,), 0.1)
    reference = log_probs._replace(sum=log_probs.sum.detach() - torch.tensor([2.0, -2.0]))
    high, low = torch.autograd.grad(value_of(name, log_probs, scores, reference), log_probs.sum)[0].tolist()
    assert high > 0 > low
    level = torch.autograd.grad(value_of(name, log_probs, scores, log_probs), log_probs.sum)[0]
    assert level.abs().max() < 1e-12


def test_qrpo_knows_the_partition_function():
    """E[exp(q / beta)] of a uniform q is Z: the mean over the k quantiles comes to it as k grows."""
    beta, k = 0.5, 4000
    sums = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(k, dtype=torch.int64)
    log_probs = ResponseLogProbs(sums, ones, ones, torch.zeros(k, dtype=torch.int64))
    scores = torch.arange(k, dtype=torch.float64)
    quantile = (torch.arange(k, dtype=torch.float64) + 1) / k
    best = quantile / beta - torch.log((quantile / beta).exp().mean())
    loss = value_of("qrpo", log_probs._replace(sum=best), scores, log_probs, beta=beta)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_plackett_luce_is_the_probability_of_the_order():
    """Sampling without replacement by exp(s): the loss is minus the log of the chance to draw this very order."""
    p = [-1.0, -0.2, -2.5, -0.7]
    ones = torch.ones(4, dtype=torch.int64)
    log_probs = ResponseLogProbs(torch.tensor(p, dtype=torch.float64), ones, ones, torch.zeros(4, dtype=torch.int64))
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0])
    order, left, chance = [1, 3, 2, 0], [0, 1, 2, 3], 1.0
    chances = []
    for i in order:
        chance *= math.exp(p[i]) / sum(math.exp(p[j]) for j in left)
        chances.append(chance)
        left.remove(i)
    loss = OBJECTIVES["plackett_luce"](log_probs, scores)[0].item()
    assert loss == pytest.approx(-math.log(chances[-1]))
    first_two = OBJECTIVES["plackett_luce"](log_probs, scores, top_k=2)[0].item()
    assert first_two == pytest.approx(-math.log(chances[1]))


def test_kto_reference_point_has_no_gradient_and_is_never_negative():
    log_probs, scores = random_log_probs(31, [4, 3], levels=5)
    kto = OBJECTIVES["kto"]
    for shift, sign in ((0.4, 1), (-0.4, 0)):
        reference = log_probs._replace(sum=log_probs.sum.detach() - shift * log_probs.num_tokens)
        loss, metrics = kto(log_probs, scores, reference=reference)
        z0 = (metrics["kl"].total / metrics["kl"].weight).item()
        assert (z0 > 0) == bool(sign)
        fixed, _ = kto(log_probs, scores, reference=reference, reference_point=z0)
        one, other = (torch.autograd.grad(value, log_probs.sum)[0] for value in (loss, fixed))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_kto_labels():
    ones = torch.ones(5, dtype=torch.int64)
    log_probs = ResponseLogProbs(torch.zeros(5), ones, ones, torch.tensor([0, 0, 0, 1, 1]))
    scores = torch.tensor([1.0, 2.0, 3.0, 0.1, 0.1])  # the second is on its group's mean, the last two are tied
    kto = OBJECTIVES["kto"]
    assert [v.item() for v in kto(log_probs, scores, reference=log_probs)[1]["desirable"]] == [1, 2]
    assert [v.item() for v in kto(log_probs, scores, reference=log_probs, threshold=2.0)[1]["desirable"]] == [2, 5]


def test_reward_metrics_are_means_over_pairs():
    ones = torch.ones(4, dtype=torch.int64)
    log_probs = ResponseLogProbs(torch.tensor([-1.0, -2.0, -3.0, -4.0]), ones, ones, torch.tensor([0, 0, 0, 1]))
    reference = log_probs._replace(sum=torch.tensor([-2.0, -2.0, -2.0, -2.0]))
    scores = torch.tensor([0.0, 1.0, 2.0, 5.0])  # log-ratios 1, 0, -1: every pair the wrong way round
    _, metrics = OBJECTIVES["dpo"](log_probs, scores, reference=reference, beta=0.5)
    means = {key: (mean.total / mean.weight).item() for key, mean in metrics.items() if key.startswith("rewards/")}
    assert means == pytest.approx(
        {
            "rewards/chosen": 0.5 * (0 - 1 - 1) / 3,
            "rewards/rejected": 0.5 * (1 + 1 + 0) / 3,
            "rewards/margins": 0.5 * (-1 - 2 - 1) / 3,
            "rewards/accuracies": 0.0,
        }
    )
    assert [value.item() for value in metrics["rank_loss"]][1] == 2


def test_registry():
    assert set(OBJECTIVES) >= NEEDS_PAIRS
    assert set(OBJECTIVES) - NEEDS_PAIRS == {"sft", "kto", "info_nca", "nca", "gvpo"}
    new = {"lipo_lambda", "info_nca", "nca", "mpo", "rpo", "gvpo", "qrpo"}
    assert {"rloo", "grpo"} == ONLINE_ONLY
    assert {"dpo", "ipo", "odpo", "kto"} | new | ONLINE_ONLY == NEEDS_REFERENCE
    assert NEEDS_REFERENCE | {"hinge", "plackett_luce"} == TAKES_REFERENCE
    log_probs, scores = random_log_probs(1, [3])
    for name in NEEDS_REFERENCE:
        with pytest.raises(AssertionError, match="reference"):
            OBJECTIVES[name](log_probs, scores, reference=None)
        with pytest.raises(TypeError, match="reference"):
            OBJECTIVES[name](log_probs, scores)
    for name in set(OBJECTIVES) - TAKES_REFERENCE:
        with pytest.raises(AssertionError, match="reference"):
            OBJECTIVES[name](log_probs, scores, reference=log_probs)
