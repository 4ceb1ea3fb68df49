"""Scoring recipes from files to files: every scorer, what goes in, what comes out, and that it trains."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch
from datasets import load_dataset
from oracles.log_probs import float64_copy, response_sums
from peft import LoraConfig, get_peft_model
from reward_folders import llama_classifier, sst2, train_sentiment_model, value_head_state
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import read_groups
from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import UserError
from rrhf_peft.score.reward_model import RewardTexts
from rrhf_peft.score.run import score_recipe
from rrhf_peft.train.run import train_recipe

RULE = {"name": "rule", "function": "score_rules:slow_length"}
COST = {"name": "rule", "function": "score_rules:cost"}


def score(folder, scorer, rows=None, *, overwrite=False, **scoring):
    if rows is not None:
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl"), "scorer": scorer, **scoring}
    recipe = make_recipe({"scoring": section}, needs=["scoring"])
    outcome = score_recipe(recipe, overwrite=overwrite, console=Console(quiet=True))
    return outcome, read(outcome.output) if outcome.output else None


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CANDIDATES = [
    {"prompt": "a?", "responses": ["aa", "bbbb", "a"], "sources": ["x", "y", "x"], "meta": {"seed": 1}, "topic": "t"},
    {"prompt": [{"role": "user", "content": "hé?"}], "responses": ["b", "b"], "sources": ["x", "y"], "meta": {}},
]


def test_candidates_become_ranked_data_with_raw_scores_and_meta(tmp_path):
    outcome, rows = score(tmp_path, RULE, CANDIDATES)
    assert rows[0] == {
        "prompt": "a?",
        "responses": ["aa", "bbbb", "a"],
        "scores": [2.0, 4.0, 1.0],
        "sources": ["x", "y", "x"],
        "raw_scores": {"rule": [2.0, 4.0, 1.0]},
        "meta": {"seed": 1, "topic": "t"},
    }
    assert rows[1]["prompt"] == CANDIDATES[1]["prompt"]
    groups = read_groups(str(outcome.output))
    assert [group.scores for group in groups] == [[2.0, 4.0, 1.0], [1.0, 1.0]]
    assert load_dataset("json", data_files=str(outcome.output), split="train").num_rows == 2
    report = outcome.report
    assert (report.pairs, report.tied_pairs, report.mean_of_max) == (4, 1, 2.5)
    assert report.sources["x"] == {
        "count": 3,
        "mean": pytest.approx(4 / 3),
        "std": pytest.approx((2 / 9) ** 0.5),
        "mean_of_max": 1.5,
        "best_share": 0.25,
    }
    assert report.sources["y"]["best_share"] == 0.75


def test_ranked_data_keeps_its_scores_as_raw_ones(tmp_path):
    ranked = [{"prompt": "p", "responses": ["aa", "b"], "scores": [0.5, 7], "sources": ["h", "m"], "note": "n"}]
    _, rows = score(tmp_path, RULE, ranked)
    assert rows[0]["raw_scores"] == {"input": [0.5, 7.0], "rule": [2.0, 1.0]}
    assert rows[0]["meta"] == {"note": "n"}
    (tmp_path / "in.jsonl").write_text((tmp_path / "out.jsonl").read_text())
    (tmp_path / "out.jsonl").unlink()
    _, again = score(tmp_path, COST)
    assert again[0]["raw_scores"] == {"input": [2.0, 1.0], "rule": [2.0, 0.0]}
    assert again[0]["scores"] == [2.0, 0.0]


def test_a_group_of_one_goes_to_the_failures_and_the_input_is_never_the_output(tmp_path):
    rows = [*CANDIDATES, {"prompt": "one", "responses": ["alone"]}]
    outcome, scored = score(tmp_path, RULE, rows)
    assert len(scored) == 2
    (failure,) = read(outcome.failures)
    assert (failure["prompt"], failure["group_kept"], failure["left_out"]) == ("one", False, {})
    assert outcome.report.lost_with_group == 1
    with pytest.raises(UserError, match=r"scoring\.input as well"):
        score(tmp_path, RULE, output=str(tmp_path / "in.jsonl"))
    with pytest.raises(UserError, match=r"in\.jsonl:1: responses\[0\]"):
        score(tmp_path, RULE, [{"prompt": "p", "responses": [3]}], output=str(tmp_path / "other.jsonl"))


def test_groups_without_responses_are_set_apart_and_counted(tmp_path):
    """As sampling writes them where every request failed."""
    empty = {"prompt": "none", "responses": [], "sources": [], "meta": {"removed": [{"reason": "missing"}]}}
    parts = {"length": {"scorer": RULE, "normalize": "zscore"}, "as": {"scorer": COST, "normalize": "rank"}}
    for name, scorer in {"rule": RULE, "composite": {"name": "composite", "parts": parts}}.items():
        output = str(tmp_path / f"{name}.jsonl")
        outcome, scored = score(tmp_path, scorer, [empty, *CANDIDATES, empty], output=output, unit_groups=1)
        assert [row["prompt"] for row in scored] == [row["prompt"] for row in CANDIDATES]
        assert [(row["prompt"], row["responses"], row["group_kept"]) for row in read(outcome.failures)] == [
            ("none", [], False)
        ] * 2
        assert (outcome.report.groups, outcome.report.groups_without_responses, outcome.report.groups_kept) == (4, 2, 2)
        assert outcome.report.failures == {}
    with pytest.raises(UserError, match=r"none of the 2 groups has a response"):
        score(tmp_path, RULE, [empty, empty], output=str(tmp_path / "nothing.jsonl"))


def test_a_rule_may_leave_responses_without_a_score(tmp_path):
    outcome, scored = score(tmp_path, {"name": "rule", "function": "score_rules:skips_b"}, CANDIDATES[:1])
    assert (scored[0]["responses"], scored[0]["scores"]) == (["aa", "a"], [2.0, 1.0])
    assert outcome.report.failures == {"the rule gives no score": 1}
    assert read(outcome.failures)[0]["left_out"] == {"1": "the rule gives no score"}


def test_a_rule_that_fails_is_told_with_its_group_and_costs_nothing_that_was_there(tmp_path):
    score(tmp_path, RULE, CANDIDATES)
    before = (tmp_path / "out.jsonl").read_bytes()
    section = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    for function, message in (
        ("score_rules:no_such_rule", "has no 'no_such_rule'"),
        ("no_such_rules:rule", "no module 'no_such_rules'"),
        ("score_rules:skips_all", "no group has two scored responses"),
        ("score_rules:stops_at_messages", r"group 1 \(from 0\), prompt 'hé\?': it fails with a call of sys\.exit\(0\)"),
    ):
        recipe = make_recipe(
            {"scoring": {**section, "scorer": {"name": "rule", "function": function}}}, needs=["scoring"]
        )
        with pytest.raises(UserError, match=message):
            score_recipe(recipe, overwrite=True, console=Console(quiet=True))
        assert (tmp_path / "out.jsonl").read_bytes() == before
    missing = {"name": "reward_model", "model": str(tmp_path / "no-such-model")}
    with pytest.raises(UserError, match="there is no such reward model folder"):
        score_recipe(
            make_recipe({"scoring": {**section, "scorer": missing}}, needs=["scoring"]),
            overwrite=True,
            console=Console(quiet=True),
        )
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_scores_that_are_no_numbers_any_more_are_refused(tmp_path):
    huge = {"name": "source", "scores": {"x": 1e30, "*": -1e30}}
    parts = {"huge": {"scorer": huge, "weight": 1e6}, "as": {"scorer": COST}}
    with pytest.raises(UserError, match=r"score of a response of group 0 \(from 0\) is 1e\+36, beyond 1e\+30"):
        score(tmp_path, {"name": "composite", "parts": parts}, CANDIDATES)
    with pytest.raises(UserError, match=r"is 1e\+308, beyond 1e\+30"):
        score(tmp_path, {"name": "source", "scores": {"*": 1e308}}, output=str(tmp_path / "other.jsonl"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"how": "weighted_sum"}, [4.0, 4.0, 2.0]),
        ({"how": "min"}, [2.0, 0.0, 1.0]),
        ({"how": "reward_under_cost", "reward": "length", "cost": "as", "cost_limit": 1.0}, [0.0, 4.0, 1.0]),
    ],
)
def test_composites(tmp_path, options, expected):
    parts = {"length": {"scorer": RULE}, "as": {"scorer": COST}}
    _, rows = score(tmp_path, {"name": "composite", "parts": parts, **options}, CANDIDATES[:1])
    assert rows[0]["scores"] == expected
    assert rows[0]["raw_scores"] == {"length": [2.0, 4.0, 1.0], "as": [2.0, 0.0, 1.0]}


def test_composites_normalise_each_part_and_keep_its_raw_scores(tmp_path):
    parts = {
        "length": {"scorer": RULE, "normalize": "rank", "weight": 2.0},
        "as": {"scorer": COST, "normalize": "zscore", "weight": -1.0},
    }
    _, rows = score(tmp_path, {"name": "composite", "parts": parts}, CANDIDATES[:1])
    deviation = (2 / 3) ** 0.5
    assert rows[0]["scores"] == pytest.approx([1.0 - 1 / deviation, 2.0 + 1 / deviation, 0.0])
    assert rows[0]["raw_scores"]["length"] == [2.0, 4.0, 1.0]


# ---- policy ----

PROMPTS = [
    {"prompt": "Once upon a time", "responses": [" there was a cat.", " Tom ran", " there was a cat.", " ", "!"]},
    {"prompt": "The sun", "responses": [" was warm and the birds sang all day long.", " x"]},
    {"prompt": "Lily", "responses": ["", " "]},
]


def random_adapter(base, folder):
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear", r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("which", ["tiny", "tinystories"])
def test_policy_scores_are_the_oracles(tmp_path, request, which, adapter):
    base = request.getfixturevalue("tiny_model_folder" if which == "tiny" else "tinystories")
    scorer = {"name": "policy", "model": str(base), "batch_tokens": 64}
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = random_adapter(base, tmp_path / "adapter")
        scorer = {"name": "policy", "adapter": str(tmp_path / "adapter"), "batch_tokens": 64}
    outcome, rows = score(tmp_path, scorer, PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(base)
    oracle = float64_copy(model)
    assert len(rows) == 2
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        ids = []
        for text in row["responses"]:
            # What a text continues its prompt's tokens with; alone where the two would merge into other tokens.
            alone, whole = (
                tokenizer(own, add_special_tokens=False)["input_ids"] for own in (text, row["prompt"] + text)
            )
            continues = [tokenizer.bos_token_id, *whole][: len(prompt)] == prompt
            ids.append([*(whole[len(prompt) - 1 :] if continues else alone), tokenizer.eos_token_id])
        with torch.no_grad():
            sums = response_sums(oracle, [(prompt, ids)]).tolist()
        expected = [total / len(own) for total, own in zip(sums, ids, strict=True)]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
    assert rows[0]["responses"] == [" there was a cat.", " Tom ran", " there was a cat.", "!"]
    assert rows[0]["scores"][0] == rows[0]["scores"][2]
    assert [row["left_out"] for row in read(outcome.failures)] == [{"3": "no text"}, {"0": "no text", "1": "no text"}]


# ---- reward models ----


@pytest.fixture(scope="module")
def sentiment_model(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    accuracy = train_sentiment_model(shared_data, folder, epochs=1)
    assert accuracy > 0.7
    return folder


def test_a_sentiment_model_and_vader_score_what_then_trains(tmp_path, shared_data, sentiment_model, tiny_model_folder):
    texts, labels = sst2(shared_data, "dev")
    sides = [[text for text, own in zip(texts, labels, strict=True) if own == label] for label in (0, 1)]
    rows = [
        {"prompt": f"Review {i}:", "responses": [sides[0][i], sides[1][i]], "sources": ["negative", "positive"]}
        for i in range(100)
    ]
    model = {"name": "reward_model", "model": str(sentiment_model), "template": "response", "label": "positive"}
    vader = {"name": "rule", "function": "rrhf_peft.score:vader"}
    parts = {"model": {"scorer": model, "normalize": "zscore"}, "vader": {"scorer": vader, "normalize": "zscore"}}
    outcome, scored = score(tmp_path, {"name": "composite", "parts": parts}, rows)
    right = sum(row["raw_scores"]["model"][1] > row["raw_scores"]["model"][0] for row in scored)
    assert right > 70
    assert outcome.report.sources["positive"]["best_share"] > 0.7
    run = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(outcome.output), "max_tokens": 128},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": "none",
        },
    }
    assert train_recipe(make_recipe(run), console=Console(quiet=True)).metrics["train_loss"] > 0


@pytest.mark.parametrize("pad", [None, 0, 2])
def test_batches_and_padding_sides_change_no_reward(tmp_path, tiny_model_folder, pad):
    llama_classifier(tmp_path / "rm", tiny_model_folder, pad=pad)
    rng = random.Random(0)
    rows = [{"prompt": f"p{i}", "responses": ["a" * rng.randint(0, 90) for _ in range(8)]} for i in range(6)]
    found = {}
    for side in ("left", "right"):
        AutoTokenizer.from_pretrained(tmp_path / "rm", padding_side=side).save_pretrained(tmp_path / "rm")
        for tokens in (1, 16 * 95):
            scorer = {"name": "reward_model", "model": str(tmp_path / "rm"), "batch_tokens": tokens, "template": "hh"}
            output = str(tmp_path / f"{side}{tokens}.jsonl")
            _, scored = score(tmp_path, scorer, rows, output=output, unit_groups=2)
            found[side, tokens] = [value for row in scored for value in row["scores"]]
    assert len(set(found["left", 1])) > 20
    for own in found.values():
        assert own == pytest.approx(found["left", 1], abs=1e-6)


def test_a_value_head_recipe_reads_at_the_eos_and_cuts_on_the_left(tmp_path, tiny_model_folder):
    config, backbone, state = value_head_state(tiny_model_folder)
    folder = tmp_path / "rm"
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "\n\nHuman: hi\n\nAssistant:", "responses": ["yes", "no" * 30, "</s> says EOS"]}]
    scorer = {"name": "reward_model", "model": str(folder), "layout": "value_head", "template": "hh", "max_tokens": 40}
    outcome, scored = score(tmp_path, scorer, rows)
    expected = []
    for response in rows[0]["responses"]:
        text = f"{rows[0]['prompt']} {response}"
        ids = [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], 2][-40:]
        with torch.no_grad():
            expected.append((backbone(input_ids=torch.tensor([ids]))[0][0, -1] @ state["v_head.weight"][0]).item())
    assert scored[0]["scores"] == pytest.approx(expected, abs=1e-5)
    assert outcome.report.counts == {"truncated_texts": 1}


def test_reward_texts_keep_special_tokens_and_lose_their_beginning(tiny_model_folder, sentiment_model):
    bert = AutoTokenizer.from_pretrained(sentiment_model)
    texts = RewardTexts(bert, template="pair", append_eos=False, max_tokens=7)
    row = texts.row("one two three four", "good film")
    assert bert.convert_ids_to_tokens(row.ids)[0] == "[CLS]"
    assert row.ids[-1] == bert.sep_token_id
    assert len(row.ids) == len(row.types) == 7
    assert texts.truncated == 1
    assert RewardTexts(bert, template="response", append_eos=False, max_tokens=9).row("x", "").ids == [2, 3]
    with pytest.raises(UserError, match="append_eos"):
        RewardTexts(bert, template="raw", append_eos=True, max_tokens=9)
    with pytest.raises(UserError, match="no chat template"):
        RewardTexts(bert, template="chat", append_eos=False, max_tokens=9)
    chat = AutoTokenizer.from_pretrained(tiny_model_folder)
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    whole = RewardTexts(chat, template="chat", append_eos=False, max_tokens=99).row("hi", "yo")
    assert chat.decode(whole.ids) == "<s>[user]hi</s>[assistant]yo</s>"
    cut = RewardTexts(chat, template="chat", append_eos=False, max_tokens=6).row("hi", "yo")
    assert chat.decode(cut.ids) == "<s>t]yo</s>"


# ---- people ----


def test_sheets_may_be_filled_in_several_attempts_and_are_never_replaced(tmp_path):
    human = {"name": "human", "sheet": str(tmp_path / "sheet.csv")}
    outcome, _ = score(tmp_path, human, CANDIDATES)
    empty = outcome.sheet.read_text()
    filled = tmp_path / "ann.csv"
    files = {**human, "annotations": [str(filled)]}
    for ranks, message in (
        (["", "", "", "", ""], "no group has two scored responses .* Fill the sheets, and run the same command again"),
        (["1", "zwei", "", "", ""], "the rank 'zwei' is no number"),
    ):
        filled.write_text("\n".join(line + rank for line, rank in zip(empty.splitlines(), ["", *ranks], strict=True)))
        before = filled.read_bytes()
        with pytest.raises(UserError, match=message):
            score(tmp_path, files)
    filled.write_text("\n".join(line + rank for line, rank in zip(empty.splitlines(), ["", *"12312"], strict=True)))
    before = filled.read_bytes()
    _, scored = score(tmp_path, files)
    assert sorted(scored[0]["scores"]) == [0.0, 0.5, 1.0]
    outcome.sheet.write_bytes(before)  # somebody fills the sheet itself
    again, _ = score(tmp_path, human, overwrite=True)  # the same sheet is there: nothing to do, nothing lost
    assert again.sheet == outcome.sheet
    with pytest.raises(UserError, match="may hold answers"):
        score(tmp_path, human, CANDIDATES[:1], overwrite=True)
    assert outcome.sheet.read_bytes() == before
    outcome.sheet.write_text(empty)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CANDIDATES))
    for output in ("sheet.key.jsonl", "in.jsonl"):
        section = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / output), "scorer": files}
        kept = (tmp_path / output).read_bytes()
        with pytest.raises(UserError, match="as well"):
            score_recipe(
                make_recipe({"scoring": section}, needs=["scoring"]), overwrite=True, console=Console(quiet=True)
            )
        assert (tmp_path / output).read_bytes() == kept
    assert filled.read_bytes() == before
    assert outcome.sheet.read_text() == empty


def test_people_rank_a_blind_sheet_and_the_ranks_become_scores(tmp_path):
    rows = [{"prompt": f"q{i}", "responses": ["bad", "good", "fine"], "sources": ["m1", "m2", "m3"]} for i in range(5)]
    human = {"name": "human", "sheet": str(tmp_path / "sheet.csv")}
    outcome, _ = score(tmp_path, human, rows)
    assert outcome.output is None
    assert not any(word in outcome.sheet.read_text() for word in ("m1", "m2", "m3"))
    people = {"ann": {"good": 1, "fine": 2, "bad": 3}, "bob": {"good": 1, "fine": 1, "bad": 2}}
    filled = []
    for name, ranks in people.items():
        with outcome.sheet.open(newline="") as file:
            sheet = list(csv.DictReader(file))
        for row in sheet:
            row["rank"] = "" if row["group"] == "g00005" else ranks[row["response"]]
        filled.append(str(tmp_path / f"{name}.csv"))
        with open(filled[-1], "w", newline="") as file:
            writer = csv.DictWriter(file, sheet[0])
            writer.writeheader()
            writer.writerows(sheet)
    outcome, scored = score(tmp_path, {**human, "annotations": filled})
    assert len(scored) == 4
    assert scored[0]["scores"] == pytest.approx([0.0, 0.875, 0.625])
    assert outcome.report.failures == {"not ranked": 3}
    agreement = outcome.report.agreement["human"]
    assert agreement["same"] == pytest.approx(2 / 3)
    assert agreement["no_contradiction"] == 1.0
    assert -1 < agreement["alpha"] < 1
    assert agreement["answered"] == (pytest.approx(0.8), pytest.approx(0.8))
