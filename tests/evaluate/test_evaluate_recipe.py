"""`rrhf-peft evaluate` from a recipe to evaluation.json, on the tiny model: numbers, table, continuing, refusing."""

from __future__ import annotations

import json
import math
import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate.evaluate_recipes import LETTERS, evaluation_recipe, letters, read_rows, write_rows
from judge_server import judge_server
from oracles.log_probs import float64_copy, response_sums
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import tokenize_groups
from rrhf_peft.evaluate.inputs import make_plan, sampling_recipe, trained_as, training_of
from rrhf_peft.evaluate.numbers import _differences, read_evaluation
from rrhf_peft.evaluate.run import evaluate_recipe
from rrhf_peft.evaluate.statistics import distinct_n, kendall_tau, length_controlled_win_rate, pair_accuracy
from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.train.run import train_recipe

PAIRS = [
    {"prompt": f"Pair {place}?", "responses": ["yes", "no, never", "perhaps"], "scores": [place % 3, 1, 2 - place]}
    for place in range(4)
]
REFERENCES = [{"prompt": "Say it", "responses": ["I said it."]}, {"prompt": "Again", "responses": ["Again and again."]}]
POLICY_KEYS = {
    *("model", "adapter", "responses", "train", "rewards", "unrewarded", "best_of_n", "perplexity"),
    *("template", "quantization", "differs_from_training"),
    *("reference_perplexity", "preference", "distinct_1", "distinct_2", "repetition", "words", "tokens", "unfinished"),
}


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory):
    """A run folder: an adapter that two steps with a large learning rate have moved."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "model": {"name": str(tiny_model_folder)},
        "adapter": {"r": 4},
        "data": {"train": write_rows(folder / "pairs.jsonl", PAIRS), "max_tokens": 64},
        "objective": {"name": "sft"},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "learning_rate": 0.1,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
        },
    }
    train_recipe(make_recipe(values), console=Console(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tiny_model_folder, trained, tmp_path_factory):
    """(folder, recipe, evaluation) of two policies with everything measured."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = evaluation_recipe(
        tiny_model_folder,
        folder,
        policies={"base": {}, "trained": {"adapter": str(trained)}},
        stop=list(string.ascii_uppercase + string.digits + string.punctuation),  # so that some responses are empty
        perplexity={},
        pairs=write_rows(folder / "pairs.jsonl", PAIRS),
        references=write_rows(folder / "references.jsonl", REFERENCES),
        max_tokens=64,
        wins={"against": "base", "by": "letters"},
        best_of=[1, 3],
    )
    return folder, recipe, evaluate_recipe(recipe)


def test_the_file_is_what_others_read(whole, tiny_model_folder, trained):
    folder, _, evaluation = whole
    found = json.loads((folder / "out" / "evaluation.json").read_text())
    assert found == evaluation.to_dict() == read_evaluation(folder / "out").to_dict()
    assert (found["version"], found["headline"]) == (1, "letters")
    assert found["settings"]["prompts"] == 6
    assert found["settings"]["decoding"]["k"] == 3
    assert list(found["policies"]) == ["base", "trained"]
    for own in found["policies"].values():
        assert own.keys() == POLICY_KEYS
        assert own["responses"] == 18
        assert own["model"] == str(tiny_model_folder)
    assert found["policies"]["base"]["adapter"] is None
    assert found["policies"]["base"]["train"] is None
    train = found["policies"]["trained"]["train"]
    assert found["policies"]["trained"]["adapter"] == str(trained)
    assert (train["steps"], train["objective"]) == (2, "sft")
    assert train["seconds"] > 0
    assert train["peak_memory_gib"] > 0
    (win,) = found["wins"]
    assert (win["policy"], win["against"], win["by"], win["prompts"]) == ("trained", "base", "letters", 6)
    assert win["win"] + win["tie"] + win["lose"] == pytest.approx(1)
    assert (folder / "out" / "recipe.yaml").exists()
    assert list((folder / "out" / "plots").glob("*.png"))


def test_every_response_counts_the_empty_and_the_repeated_too(whole):
    folder, _, evaluation = whole
    rows = read_rows(folder / "out" / "samples" / "base.jsonl")
    assert [len(row["responses"]) for row in rows] == [3] * 6
    assert any(text == "" for row in rows for text in row["responses"])
    own = evaluation.to_dict()["policies"]["base"]
    rewards = [letters("", row["responses"]) for row in rows]
    means = [sum(group) / 3 for group in rewards]
    assert own["rewards"]["letters"]["mean"] == pytest.approx(sum(means) / 6)
    assert own["rewards"]["letters"]["low"] < sum(means) / 6 < own["rewards"]["letters"]["high"]
    assert own["best_of_n"]["letters"]["1"] == own["rewards"]["letters"]
    assert own["best_of_n"]["letters"]["3"]["mean"] == pytest.approx(sum(map(max, rewards)) / 6)
    assert own["unrewarded"] == {"letters": 0}
    details = [one for row in rows for one in row["meta"]["candidates"]]
    assert own["unfinished"] == sum(one["finish_reason"] == "length" for one in details) / 18
    assert own["distinct_2"] == distinct_n([text for row in rows for text in row["responses"]], 2)


def test_wins_compare_response_i_with_response_i(whole):
    folder, _, evaluation = whole
    texts = {
        name: [row["responses"] for row in read_rows(folder / "out" / "samples" / f"{name}.jsonl")]
        for name in ("base", "trained")
    }
    shares, outcomes, longer = [], [], []
    for own, other in zip(texts["trained"], texts["base"], strict=True):
        pairs = list(zip(letters("", own), letters("", other), strict=True))
        shares.append(sum(mine > theirs for mine, theirs in pairs) / 3)
        outcomes += [0.5 + 0.5 * ((mine > theirs) - (mine < theirs)) for mine, theirs in pairs]
        longer += [float(len(mine) - len(theirs)) for mine, theirs in zip(own, other, strict=True)]
    win = evaluation.to_dict()["wins"][0]
    assert win["win"] == pytest.approx(sum(shares) / 6)
    at_equal_length = length_controlled_win_rate(np.array(outcomes), np.array(longer), np.full(18, 1 / 3))
    assert win["length_controlled_win_rate"] == pytest.approx(at_equal_length)


@torch.no_grad()
def oracle_sums(folder, groups):
    """Log-probs by loops in float64; groups of (prompt ids, response ids)."""
    return response_sums(float64_copy(AutoModelForCausalLM.from_pretrained(folder)), groups)


def test_perplexities_are_those_of_the_oracle(whole, tiny_model_folder):
    folder, _, evaluation = whole
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    own = evaluation.to_dict()["policies"]["base"]
    rows = read_rows(folder / "out" / "samples" / "base.jsonl")
    groups = [
        ([1, *tokenizer(row["prompt"])["input_ids"]], [tokenizer(text)["input_ids"]])
        for row in rows
        for text in row["responses"]
        if text
    ]
    tokens = sum(len(responses[0]) for _, responses in groups)
    expected = math.exp(-float(oracle_sums(tiny_model_folder, groups).sum()) / tokens)
    assert own["perplexity"] == pytest.approx(expected, rel=1e-5)

    references = [
        ([1, *tokenizer(row["prompt"])["input_ids"]], [[*tokenizer(row["responses"][0])["input_ids"], 2]])
        for row in REFERENCES
    ]
    tokens = sum(len(responses[0]) for _, responses in references)
    expected = math.exp(-float(oracle_sums(tiny_model_folder, references).sum()) / tokens)
    assert own["reference_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_preferences_are_those_of_the_oracle(whole, tiny_model_folder):
    _, _, evaluation = whole
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    ranked = [RankedGroup(row["prompt"], row["responses"], list(map(float, row["scores"])), ["x"] * 3) for row in PAIRS]
    tokenized, _ = tokenize_groups(ranked, tokenizer)
    groups = [(list(own.prompt_ids), [list(ids) for ids in own.response_ids]) for own in tokenized]
    sums = iter(oracle_sums(tiny_model_folder, groups).tolist())
    preferences = [[next(sums) / len(ids) for ids in responses] for _, responses in groups]
    scores = [list(own.scores) for own in tokenized]
    found = evaluation.to_dict()["policies"]["base"]["preference"]
    assert found["pair_accuracy"]["mean"] == pytest.approx(pair_accuracy(preferences, scores))
    taus = [kendall_tau(p, r) for p, r in zip(preferences, scores, strict=True)]
    assert found["kendall_tau"] == pytest.approx(sum(taus) / len(taus))
    assert (found["groups"], len(taus)) == (3, 3)  # one group has equal scores only


def test_differences_are_paired_over_the_prompts(whole):
    """The interval is of the differences prompt by prompt, and not of two independent means."""
    folder, _, evaluation = whole
    per_prompt = {
        name: [
            np.mean(letters("", row["responses"])) for row in read_rows(folder / "out" / "samples" / f"{name}.jsonl")
        ]
        for name in ("base", "trained")
    }
    apart = np.array(per_prompt["trained"]) - np.array(per_prompt["base"])
    (row,) = evaluation.to_dict()["differences"]
    found = row["rewards"]["letters"]
    assert (row["policy"], row["against"], found["prompts"]) == ("trained", "base", 6)
    assert found["mean"] == pytest.approx(apart.mean())
    random = np.random.default_rng(1)
    low, high = np.quantile([random.choice(apart, 6).mean() for _ in range(20_000)], [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=0.2 * (high - low))
    assert found["high"] == pytest.approx(high, abs=0.2 * (high - low))
    win = evaluation.to_dict()["wins"][0]
    assert win["win_rate"]["mean"] == pytest.approx(win["win"] + win["tie"] / 2)
    assert 0 <= win["win_rate"]["low"] <= win["win_rate"]["mean"] <= win["win_rate"]["high"] <= 1
    assert "more than base" in evaluation.markdown()
    assert "win rate against base" in evaluation.markdown()


def test_missing_rewards_are_compared_on_the_prompts_that_both_have():
    plan = SimpleNamespace(section=SimpleNamespace(confidence=0.95, resamples=200, seed=0))
    own = {"label": [[1.0, 3.0], [None, None], [5.0, None]]}
    other = {"label": [[0.0, 0.0], [100.0, 100.0], [4.0, 4.0]]}
    found = _differences(plan, own, other)["label"]
    assert (found.mean, found.prompts) == (1.5, 2)
    assert _differences(plan, {"label": [[None]]}, {"label": [[1.0]]}) == {}


@pytest.fixture(scope="module")
def trained_hh(tiny_model_folder, tmp_path_factory):
    """A run folder that was trained on HH prompts, limited, on an NF4 base."""
    folder = tmp_path_factory.mktemp("trained-hh")
    limits = {"template": "hh", "max_prompt_tokens": 40, "max_tokens": 80}
    training = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    values = {
        "model": {"name": str(tiny_model_folder), "quantization": "nf4"},
        "adapter": {"r": 4},
        "data": {"train": write_rows(folder / "pairs.jsonl", PAIRS), **limits},
        "objective": {"name": "sft"},
        "training": {"output_dir": str(folder / "run"), **training},
    }
    train_recipe(make_recipe(values), console=Console(quiet=True))
    return folder / "run"


def test_a_policy_is_evaluated_as_it_was_trained(tiny_model_folder, trained_hh, tmp_path):
    policies = {"base": {}, "mine": {"adapter": str(trained_hh)}}
    plan = make_plan(evaluation_recipe(tiny_model_folder, tmp_path, policies=policies))
    for policy in plan.policies.values():  # the base as well: what training began from
        assert (policy.template, policy.max_prompt_tokens, policy.max_tokens) == ("hh", 40, 80)
        assert policy.model.quantization == "nf4"
        assert policy.differences == []
    sampling = sampling_recipe(plan, "mine", tmp_path / "out.jsonl")
    assert (sampling.sampling.template, sampling.sampling.max_prompt_tokens) == ("hh", 40)
    assert sampling.model.quantization == "nf4"
    assert plan.judge_template == "hh"


def test_a_difference_from_training_is_shown(tiny_model_folder, trained_hh, tmp_path):
    decoding = {"k": 1, "max_new_tokens": 2}
    policies = {"mine": {"adapter": str(trained_hh)}}
    recipe = evaluation_recipe(tiny_model_folder, tmp_path, policies=policies, template="raw", decoding=decoding)
    evaluation = evaluate_recipe(recipe)
    own = evaluation.to_dict()["policies"]["mine"]
    assert (own["template"], own["quantization"]) == ("raw", "nf4")
    assert own["differs_from_training"] == ["template raw (in training hh)"]
    assert "Not as it was trained: mine, template raw (in training hh)." in evaluation.markdown()


def test_runs_that_disagree_leave_the_base_open(tiny_model_folder, trained, trained_hh, tmp_path):
    policies = {"one": {"adapter": str(trained)}, "other": {"adapter": str(trained_hh)}}
    plan = make_plan(evaluation_recipe(tiny_model_folder, tmp_path, policies=policies))
    assert [policy.template for policy in plan.policies.values()] == ["raw", "hh"]
    with pytest.raises(UserError, match=r"evaluation.template: .*one: raw, other: hh.* base .*Set evaluation.template"):
        make_plan(evaluation_recipe(tiny_model_folder, tmp_path, policies={**policies, "base": {}}))


def test_a_recipe_in_the_parent_folder_says_nothing_about_an_adapter(trained_hh, tmp_path):
    shutil.copytree(trained_hh, tmp_path / "project" / "adapter")
    (tmp_path / "project" / "adapter" / "recipe.yaml").rename(tmp_path / "project" / "recipe.yaml")
    assert trained_as(str(tmp_path / "project" / "adapter")) is None
    shutil.copytree(trained_hh, tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-3" / "recipe.yaml").rename(tmp_path / "run" / "recipe.yaml")
    assert trained_as(str(tmp_path / "run" / "checkpoint-3")).template == "hh"


def test_the_adapter_makes_a_difference_everywhere(whole):
    base, trained = whole[2].to_dict()["policies"].values()
    for key in ("perplexity", "reference_perplexity", "rewards"):
        assert base[key] != trained[key], key


def test_the_table_has_a_row_for_each_policy_and_no_empty_column(whole, tiny_model_folder, tmp_path):
    folder, _, evaluation = whole
    lines = (folder / "out" / "table.md").read_text().splitlines()
    assert lines == evaluation.markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert [row[0] for row in cells] == ["policy", "---", "base", "trained"]
    assert {"reward letters", "perplexity", "pair accuracy", "Kendall's tau", "best of 3"} <= set(cells[0])
    mean = evaluation.to_dict()["policies"]["trained"]["rewards"]["letters"]["mean"]
    assert cells[3][1].startswith(f"{mean:.3f} [")
    for width in (50, 80, 200):
        console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(evaluation)
        text = console.export_text()
        assert all(len(line) <= width for line in text.splitlines())
        assert "…" not in text
    plain = evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path, decoding={"k": 1, "max_new_tokens": 4}))
    header = plain.markdown().splitlines()[0]
    assert not any(word in header for word in ("perplexity", "win", "pair", "train", "best"))
    assert plain.to_dict()["policies"]["base"]["rewards"]["letters"]["mean"] is not None  # one response is enough


def test_a_finished_evaluation_is_read_back_and_another_policy_costs_its_own_share_only(whole, trained):
    folder, recipe, evaluation = whole
    again = evaluate_recipe(recipe)
    assert again.was_finished
    assert again.to_dict() == evaluation.to_dict()
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out" / "samples").iterdir()}
    section = recipe.evaluation.model_copy(
        update={"policies": {**recipe.evaluation.policies, "again": recipe.evaluation.policies["base"]}}
    )
    more = evaluate_recipe(recipe.model_copy(update={"evaluation": section})).to_dict()["policies"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert more["again"] == more["base"] == evaluation.to_dict()["policies"]["base"]
    assert more["trained"] == evaluation.to_dict()["policies"]["trained"]


def test_changed_settings_are_refused_by_name_and_overwritten_when_asked(tiny_model_folder, tmp_path):
    evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path))
    hot = {"k": 3, "max_new_tokens": 8, "temperature": 2.5}
    with pytest.raises(UserError, match=r"base.jsonl: was made with other settings \(decoding.temperature was 1.5 and"):
        evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path, decoding=hot))
    changed = evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path, decoding=hot), overwrite=True)
    assert changed.to_dict()["settings"]["decoding"]["temperature"] == 2.5
    # What only the numbers depend on may change: nothing is decoded again.
    stamp = (tmp_path / "out" / "samples" / "base.jsonl").stat().st_mtime_ns
    narrow = evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path, decoding=hot, confidence=0.5))
    assert (tmp_path / "out" / "samples" / "base.jsonl").stat().st_mtime_ns == stamp
    wide = changed.to_dict()["policies"]["base"]["rewards"]["letters"]
    assert narrow.to_dict()["policies"]["base"]["rewards"]["letters"]["low"] > wide["low"]


def test_an_adapter_that_was_trained_again_is_noticed(tiny_model_folder, trained, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    settings = {"policies": {"mine": {"adapter": str(adapter)}}}
    evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path, **settings))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(UserError, match=r"mine.jsonl: was made with other settings \(weights has another content\)"):
        evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path, **settings))


def test_damaged_metrics_of_a_run_do_not_end_its_evaluation(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    assert training_of(str(run))["steps"] > 0
    for damage in ('{"step": 1, "train_runtime": "?"}\n', "[1]\n", "{\n", "\n", ""):
        (run / "metrics.jsonl").write_text(damage)
        assert training_of(str(run)) is None


def test_another_rule_or_another_judge_is_noticed(tiny_model_folder, tmp_path, monkeypatch):
    """Also where all was finished: the numbers are those of the first rule and the first judge."""
    (tmp_path / "rules_of_one.py").write_text("def one(prompt, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = tmp_path / "judge"
    shutil.copytree(tiny_model_folder, judge)
    scorers = {"one": {"name": "rule", "function": "rules_of_one:one"}}
    settings = {"scorers": scorers, "perplexity": {"model": str(judge)}}
    recipe = evaluation_recipe(tiny_model_folder, tmp_path, **settings)
    evaluate_recipe(recipe)
    assert evaluate_recipe(recipe).was_finished
    (tmp_path / "rules_of_one.py").write_text("def one(prompt, responses):\n    return [2.0] * len(responses)\n")
    with pytest.raises(UserError, match=r"the code of the rule rules_of_one:one has another content"):
        evaluate_recipe(recipe)
    (tmp_path / "rules_of_one.py").write_text("def one(prompt, responses):\n    return [1.0] * len(responses)\n")
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    with pytest.raises(UserError, match=r"perplexity/base.jsonl: was made with other settings \(weights has another"):
        evaluate_recipe(recipe)


def test_wins_by_a_judge_who_favours_a_position(tiny_model_folder, trained, tmp_path):
    with judge_server(lambda call: '{"ranks": {"A": 1, "B": 2}}') as (url, server):
        judge = {"name": "judge", "base_url": url, "model": "the-judge"}
        found = evaluate_recipe(
            evaluation_recipe(
                tiny_model_folder,
                tmp_path,
                policies={"base": {}, "trained": {"adapter": str(trained)}},
                scorers={},
                wins={"against": "base", "by": judge},
            )
        ).to_dict()
    assert server.calls
    (win,) = found["wins"]
    assert (win["by"], win["win"], win["tie"], win["lose"], win["failures"]) == ("the-judge", 0, 1, 0, 0)
    assert win["length_controlled_win_rate"] == pytest.approx(0.5)
    assert found["headline"] is None
    assert found["policies"]["base"]["rewards"] == {}


def test_several_scorers_and_the_first_is_the_headline(tiny_model_folder, tmp_path):
    policy = {"name": "policy"}
    recipe = evaluation_recipe(tiny_model_folder, tmp_path, scorers={"letters": LETTERS, "likelihood": policy})
    found = evaluate_recipe(recipe).to_dict()
    assert found["headline"] == "letters"
    own = found["policies"]["base"]
    assert own["rewards"].keys() == own["best_of_n"].keys() == {"letters", "likelihood"}
    assert own["rewards"]["likelihood"]["mean"] < 0
