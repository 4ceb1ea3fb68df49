"""The frontier study: its statistics on numbers whose answer is known, and a brief run from data to document."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import study
import yaml
from study_measure import Gold, Judge, Policy
from study_report import at_matched_kl, difference, results
from train.online_rules import letters

STORY = "Once upon a time there was a little {a} {b} who liked to play with a big red ball in the sunny {c} every day."
WORDS = ["dog", "cat", "girl", "boy", "bird", "frog", "bear", "duck", "fox", "bee"]


def record(kl: list[float], gold: list[list[float]]) -> dict:
    points = [
        {"kl": [k] * len(g), "gold": g, "vader": g, "tokens": [1], "judge_nats": [1.0], "distinct_2": 0.5}
        for k, g in zip(kl, gold, strict=True)
    ]
    return {"points": points, "pair_accuracy": 0.5, "train_seconds": 1.0}


BASE = record([0.0], [[0.2, 0.4]])


def test_matched_kl_weighs_the_two_points_around_it() -> None:
    run = record([2.0, 6.0], [[0.4, 0.6], [0.8, 0.6]])
    values, reaches = at_matched_kl(BASE, run, "gold", 3.0)
    assert reaches
    np.testing.assert_allclose(values, [0.5, 0.6])
    values, reaches = at_matched_kl(BASE, run, "gold", 1.0)
    np.testing.assert_allclose(values, [0.3, 0.5])
    values, reaches = at_matched_kl(BASE, run, "gold", 7.0)
    assert not reaches
    np.testing.assert_allclose(values, [0.8, 0.6])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Seeds and prompts both vary: an interval over prompts alone would be far too short."""
    rng, inside, too_short, trials = np.random.default_rng(3), 0, 0, 200
    for trial in range(trials):
        gaps = 0.1 + 0.3 * rng.normal(size=(12, 1)) + 0.5 * rng.normal(size=(12, 60))
        _, low, high = difference(gaps, np.zeros_like(gaps), level=0.9, resamples=400, seed=trial)
        inside += low <= 0.1 <= high
        _, low, high = difference(gaps.mean(0, keepdims=True), np.zeros((1, 60)), level=0.9, resamples=400, seed=trial)
        too_short += low <= 0.1 <= high
    assert 0.82 < inside / trials < 0.97
    assert too_short / trials < 0.75


def protocol_of(**claim: str | float) -> dict:
    rules = {"matched_kl": 3.0, "tune_on": "vader", "compare": "gold", "confidence": 0.95, "resamples": 2000}
    claims = [{"claim": "it works", **claim}]
    return {"rules": {**rules, "reference": "rrhf"}, "claims": claims, "seeds": [1, 2, 3]}


def runs(gold: float, kl: float = 6.0) -> list[dict]:
    rng = np.random.default_rng(int(1000 * gold))
    return [record([kl], [(gold + 0.05 * rng.normal(size=40)).tolist()]) for _ in range(3)]


def test_verdicts_need_the_corrected_interval_and_flip_without_ranking() -> None:
    bases = [record([0.0], [[0.2] * 40]) for _ in range(3)]
    records = {"rrhf": runs(0.7), "sft": runs(0.5), "rank_weight_0": runs(0.5)}
    claim = {"one": "rrhf", "control": "sft"}
    (found,) = results(protocol_of(**claim), {}, bases, records)["claims"]
    assert found["verdict"] == "holds"
    assert found["if_ranking_did_nothing"] == "does not hold"
    assert found["difference"][0] == pytest.approx(0.1, abs=0.02)  # halfway from the base, at half of the KL

    (found,) = results(protocol_of(one="sft", control="rrhf"), {}, bases, records)["claims"]
    assert found["verdict"] == "refuted"
    (found,) = results(protocol_of(**claim, margin=0.15), {}, bases, records)["claims"]
    assert found["verdict"] == "refuted"
    near = {**records, "sft": runs(0.699)}
    (found,) = results(protocol_of(**claim), {}, bases, near)["claims"]
    assert found["verdict"] == "does not hold"
    far = {**records, "sft": runs(0.5, kl=1.0)}
    (found,) = results(protocol_of(**claim), {}, bases, far)["claims"]
    assert found["verdict"].startswith("not compared")


def test_the_intervals_grow_with_the_number_of_comparisons() -> None:
    bases = [record([0.0], [[0.2] * 40]) for _ in range(3)]
    few = {"rrhf": runs(0.7), "sft": runs(0.5)}
    many = {**few, **{f"loss_{n}": runs(0.6) for n in range(20)}}
    claim = protocol_of(one="rrhf", control="sft")
    one, other = (results(claim, {}, bases, records) for records in (few, many))
    assert one["level"] < other["level"] < 1
    widths = [high - low for _, low, high in (found["claims"][0]["difference"] for found in (one, other))]
    assert widths[1] > widths[0]


def test_the_protocol_gives_every_loss_as_many_settings_and_equal_tokens() -> None:
    protocol = yaml.safe_load(study.PROTOCOL.read_text(encoding="utf-8"))
    one = study.Study(protocol, "model", "stories", Path(), Path())
    settings = {name: one.settings(name) for name in protocol["losses"]}
    assert {len(of) for of in settings.values()} == {4}
    for data in (2, 4, 8, 16, "ragged"):
        sizes = study.group_sizes(protocol, data)
        assert abs(sum(sizes) - protocol["data"]["responses"]) <= 16
        assert len(sizes) <= protocol["data"]["train"]
    assert set(study.group_sizes(protocol, "ragged")) == {2, 16}
    known = {name for claim in protocol["claims"] for name in (claim["one"], claim["control"])}
    assert known <= set(protocol["losses"])


def test_the_losses_of_the_protocol_are_those_there_are() -> None:
    from rrhf_peft import RRHFConfig
    from rrhf_peft.objectives import OBJECTIVES, ONLINE_ONLY

    protocol = yaml.safe_load(study.PROTOCOL.read_text(encoding="utf-8"))
    assert {loss["objective"] for loss in protocol["losses"].values()} == set(OBJECTIVES) - ONLINE_ONLY | {"ppo"}
    for name, loss in protocol["losses"].items():
        if loss["objective"] == "ppo":
            continue
        for settings in study.Study(protocol, "model", "stories", Path(), Path()).settings(name):
            options = {**loss.get("options", {}), **dict(settings)}
            options.pop("learning_rate")
            RRHFConfig("unused", objective=loss["objective"], objective_options=options, use_cpu=True)


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sst")
    good, bad = ["a lovely happy {}", "what a great {}"], ["a dull awful {}", "this {} is terrible"]
    rows = [
        f"{text.format(word)}\t{label}" for label, texts in ((1, good), (0, bad)) for text in texts for word in WORDS
    ]
    for name, part in (("train", rows), ("dev", rows[::3])):
        (folder / f"{name}.tsv").write_text("\n".join(part) + "\n")
    return folder


def test_gold_knows_good_from_bad(sentiment: Path) -> None:
    gold = Gold(sentiment)
    good, bad, neither = gold.of(["a lovely great ship", "an awful and dull ship", ""])
    assert good > 0.7 > 0.3 > bad
    assert neither == pytest.approx(0.5)
    assert gold.accuracy == 1


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 99

    def __len__(self) -> int:
        return 30

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def test_the_judge_is_a_distribution_and_prefers_what_it_has_read() -> None:
    judge = Judge(Letters(), ["abcabcabd", "abcab"])
    for past in [(), (0,), (0, 1), (7, 8), (1, 2)]:
        assert sum(judge._probability(past, token) for token in range(30)) == pytest.approx(1)
    assert judge.nats_per_token([0, 1, 2, 99]) < judge.nats_per_token([2, 1, 0, 99])
    assert judge.nats_per_token([99]) == pytest.approx(math.log(30))


def test_kl_is_that_of_the_scaled_adapter(tiny_model_folder: Path) -> None:
    import torch

    policy = Policy(str(tiny_model_folder))
    settings = {"temperature": 1.0, "max_new_tokens": 6}
    policy.add_adapter(4, seed=0)
    answers = policy.sample(["say one:", "say"], settings, seed=1)
    assert policy.kl_to_base(answers) == pytest.approx([0, 0], abs=1e-5)  # a new adapter
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    answers = policy.sample(["say one:", "say"], settings, seed=1)
    whole = policy.kl_to_base(answers)
    with policy.scaled(0.5):
        half = policy.kl_to_base(answers)
    with policy.scaled(0.0):
        assert policy.kl_to_base(answers) == pytest.approx([0, 0], abs=1e-5)
    assert policy.kl_to_base(answers) == pytest.approx(whole)  # put back
    assert sum(whole) > sum(half) > 0

    answer = answers[0]
    first, ids = len(answer["prompt_ids"]) - 1, torch.tensor([answer["prompt_ids"] + answer["ids"]])
    with torch.no_grad():
        p = policy.model(ids).logits[0].softmax(-1)
        with policy.model.disable_adapter():
            q = policy.model(ids).logits[0].softmax(-1)
    exact = sum((p[t] * (p[t] / q[t]).log()).sum().item() for t in range(first, first + len(answer["ids"])))
    assert whole[0] == pytest.approx(exact, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_brief_study_writes_its_document_in_pieces(
    tiny_model_folder: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untrained model writes no words that VADER knows: the share of letters is the reward here."""
    monkeypatch.setattr(study, "vader_of", lambda texts: letters("", list(texts)))
    stories = [STORY.format(a=a, b=b, c="park " + " ".join(WORDS * 4)) for a in WORDS for b in WORDS if a != b]
    (tmp_path / "stories.json").write_text(json.dumps(stories))
    output = tmp_path / "study"
    command = ["--brief", "--model", str(tiny_model_folder), "--stories", str(tmp_path / "stories.json")]
    command += ["--sentiment", str(sentiment), "--output", str(output), "--workers", "1"]
    assert study.main([*command, "--minutes", "1e-9"]) == 3
    assert not (output / "README.md").exists()
    assert study.main(command) == 0
    units = {path: path.stat().st_mtime_ns for path in (output / "units").iterdir()}
    numbers = json.loads((output / "results.json").read_text())
    assert set(numbers["losses"]) == set(study.BRIEF["losses"])
    assert [claim["verdict"] for claim in numbers["claims"]]
    text = (output / "README.md").read_text()
    assert all(f"| {name} |" in text for name in numbers["losses"])
    assert (output / "gold_against_kl.png").stat().st_size > 1000

    lost = sorted(units)[0]
    lost.unlink()
    assert study.main(command) == 0
    again = {path: path.stat().st_mtime_ns for path in (output / "units").iterdir()}
    assert set(again) == set(units)
    assert [path for path in units if again[path] != units[path]] == [lost]
