"""What `rounds:` sets and refuses, and the recipe of every stage of every round."""

from __future__ import annotations

import json

import pytest
from rounds.round_recipes import NEEDS, evaluated, open_rounds, round_recipe, round_values

from rrhf_peft.data import read_groups
from rrhf_peft.recipe import load_recipe, make_recipe, recipe_text
from rrhf_peft.records import UserError
from rrhf_peft.rounds.stages import Stages, slice_of, write_slice

MODEL = "org/some-model"
SETS = ("sampling.output", "scoring.input", "scoring.output", "data.train", "training.output_dir", "evaluation.output")


def stages(folder, **changes):
    return Stages(make_recipe(evaluated(round_values(MODEL, folder, **changes), folder), needs=NEEDS))


def test_its_snapshot_is_the_same_recipe(tmp_path):
    recipe = make_recipe(evaluated(round_values(MODEL, tmp_path), tmp_path), needs=NEEDS)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.yaml", needs=NEEDS) == recipe


def test_the_recipe_as_it_stands_is_that_of_the_first_round(tmp_path):
    own, candidates = stages(tmp_path), f"{tmp_path}/rounds/round-1/candidates.jsonl"
    assert own.sampling(1).sampling.output == own.recipe.sampling.output == candidates
    assert own.scoring(1).scoring == own.recipe.scoring
    for name in ("model", "adapter", "data", "training"):
        assert getattr(own.training(1), name) == getattr(own.recipe, name)


@pytest.mark.parametrize("key", SETS)
def test_paths_that_rounds_set_cannot_be_set_to_something_else(tmp_path, key):
    values = evaluated(round_values(MODEL, tmp_path), tmp_path)
    section, name = key.split(".")
    values[section][name] = "elsewhere.jsonl"
    with pytest.raises(UserError, match=rf"{key}: is set by rounds, in .*rounds; remove it"):
        make_recipe(values, needs=NEEDS)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("evaluation", {"policies": {"mine": {}}}, r"evaluation\.policies: is set by rounds"),
        ("evaluation", {"wins": {"against": "base", "by": "letters"}}, r"evaluation\.wins: compares policies of one"),
        ("sampling", {"candidates": [{"strategy": "top_p", "model": "other"}]}, r"sampling\.candidates: no entry is"),
        ("scoring", {"scorer": {"name": "human", "sheet": "sheet.csv"}}, r"scoring\.scorer: people rank one file"),
        ("rounds", {"counts": 3}, r"rounds\.counts: unknown key; did you mean 'count'"),
    ],
)
def test_what_cannot_go_with_rounds_is_refused(tmp_path, section, changes, message):
    values = evaluated(round_values(MODEL, tmp_path), tmp_path)
    values[section] = {**values[section], **changes}
    with pytest.raises(UserError, match=message):
        make_recipe(values, needs=NEEDS)


def test_each_round_draws_anew_from_the_policy_of_the_round_before(tmp_path):
    other = {"strategy": "beam", "model": "org/other", "k": 2}
    on_base = {"strategy": "top_p", "adapter": "runs/friend"}
    own = {"strategy": "top_p", "k": 6}
    made = stages(tmp_path, sampling={"candidates": [own, other, on_base], "seed": 7})
    first, third = made.sampling(1), made.sampling(3)
    assert (first.model.init_adapter, third.model.init_adapter) == (None, f"{tmp_path}/rounds/round-2/run")
    assert (first.sampling.seed, third.sampling.seed) == (7, 9)
    assert [entry.source for entry in third.sampling.candidates] == ["top_p:round-2", None, None]
    assert [entry.model for entry in third.sampling.candidates] == [None, "org/other", MODEL]
    assert third.sampling.candidates[2].adapter == "runs/friend"
    assert third.sampling.output == f"{tmp_path}/rounds/round-3/candidates.jsonl"


def test_last_trains_the_adapter_further_and_base_a_new_one(tmp_path):
    last, base = stages(tmp_path).training(2), stages(tmp_path, rounds={"start_from": "base"}).training(2)
    assert last.model.init_adapter == f"{tmp_path}/rounds/round-1/run"
    assert base.model.init_adapter is None
    assert base.adapter.r == 8
    assert last.training.seed == base.training.seed == 1
    assert last.data.train == f"{tmp_path}/rounds/round-2/scored.jsonl"
    unset = stages(tmp_path, training={"seed": None}).training(2)
    assert unset.training.seed == 43


def test_without_an_adapter_the_next_model_is_the_run_folder(tmp_path):
    made = stages(tmp_path, adapter=None, model={"revision": "v1"})
    assert made.training(1).model.name == made.sampling(1).model.name == MODEL
    for recipe in (made.training(2), made.sampling(2)):
        assert (recipe.model.name, recipe.model.revision) == (f"{tmp_path}/rounds/round-1/run", None)
        assert recipe.model.init_adapter is None
    assert made.evaluation(1).evaluation.policies["round-1"].model == f"{tmp_path}/rounds/round-1/run"


def test_an_adapter_to_begin_with_is_the_first_policy_and_the_base_that_is_evaluated(tmp_path):
    values = round_values(MODEL, tmp_path, model={"init_adapter": "runs/sft"}, rounds={"start_from": "base"})
    del values["adapter"]
    made = Stages(make_recipe(evaluated(values, tmp_path), needs=NEEDS))
    assert made.sampling(1).model.init_adapter == made.training(3).model.init_adapter == "runs/sft"
    assert made.sampling(3).model.init_adapter == f"{tmp_path}/rounds/round-2/run"
    assert made.evaluation(0).model.init_adapter == "runs/sft"


def test_each_evaluation_measures_one_policy_with_the_same_draws(tmp_path):
    made = stages(tmp_path)
    base, second = made.evaluation(0).evaluation, made.evaluation(2).evaluation
    assert base.output == f"{tmp_path}/rounds/base/evaluation"
    assert list(base.policies) == ["base"]
    assert second.output == f"{tmp_path}/rounds/round-2/evaluation"
    assert {name: policy.adapter for name, policy in second.policies.items()} == {
        "round-2": f"{tmp_path}/rounds/round-2/run"
    }
    assert (base.seed, base.prompts, base.decoding) == (second.seed, second.prompts, second.decoding)


def test_slices_follow_each_other_and_begin_again():
    assert [slice_of("abcde", number, 2) for number in (1, 2, 3, 4)] == [["a", "b"], ["c", "d"], ["e", "a"], ["b", "c"]]
    assert slice_of("abc", 2, 7) == ["a", "b", "c"]  # none of them twice


def test_a_slice_keeps_what_came_with_its_prompts(tmp_path):
    ranked = {"prompt": "r", "responses": ["x", "y"], "scores": [2.0, 1.0], "sources": ["a", "b"], "topic": "t"}
    provided = {"prompt": [{"role": "user", "content": "é"}], "responses": ["z"], "sources": ["provided"]}
    files = []
    for name, row in (("bare", {"prompt": "p", "topic": "t"}), ("provided", provided), ("ranked", ranked)):
        files.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    sampling = round_recipe(MODEL, tmp_path, sampling={"prompts": files}).sampling
    whole = read_groups(files, needs="prompt")
    written = write_slice(tmp_path / "round-1", sampling, 1, 5)
    assert len(written) == 3
    found = read_groups(written, needs="prompt")
    for before, after in zip(whole, found, strict=False):
        for name in ("prompt", "responses", "sources", "scores"):
            assert getattr(after, name) == getattr(before, name)
    assert len(found) == 5
    assert found[0].columns["origin"]["topic"] == "t"


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"learning_rate": 1e-3}, r"training\.learning_rate was 0\.02 and is 0\.001"),
        ("sampling", {"seed": 3}, r"sampling\.seed was 0 and is 3"),
        ("sampling", {"candidates": [{"strategy": "top_p", "k": 2}]}, r"sampling\.candidates\.0\.k was 6 and is 2"),
    ],
)
def test_a_changed_recipe_is_refused(tmp_path, section, changes, message):
    output = tmp_path / "rounds"
    open_rounds(output, round_recipe(MODEL, tmp_path), overwrite=False)
    (output / "round-1").mkdir()
    changed = round_recipe(MODEL, tmp_path, **{section: changes})
    with pytest.raises(UserError, match=message):
        open_rounds(output, changed, overwrite=False)
    assert (output / "round-1").is_dir()
    open_rounds(output, changed, overwrite=True)
    assert sorted(path.name for path in output.parent.iterdir()) == ["prompts.json", "rounds"]
    assert {path.name for path in output.iterdir()} == {".rrhf-peft.json", "inputs.json", "recipe.yaml"}


def test_patterns_in_another_order_are_another_recipe(tmp_path):
    first = {"scorer": {"name": "source", "scores": {"a*": 1.0, "*": 0.0}}}
    second = {"scorer": {"name": "source", "scores": {"*": 0.0, "a*": 1.0}}}
    open_rounds(tmp_path / "rounds", round_recipe(MODEL, tmp_path, scoring=first), overwrite=False)
    (tmp_path / "rounds" / "round-1").mkdir()
    open_rounds(tmp_path / "rounds", round_recipe(MODEL, tmp_path, scoring=first), overwrite=False)
    with pytest.raises(UserError, match="another order"):
        open_rounds(tmp_path / "rounds", round_recipe(MODEL, tmp_path, scoring=second), overwrite=False)


def test_what_changes_no_result_may_change(tmp_path):
    open_rounds(tmp_path / "rounds", round_recipe(MODEL, tmp_path), overwrite=False)
    (tmp_path / "rounds" / "round-1").mkdir()
    changes = {"rounds": {"count": 5}, "sampling": {"batch_tokens": 64}, "training": {"logging_steps": 5}}
    open_rounds(tmp_path / "rounds", round_recipe(MODEL, tmp_path, **changes), overwrite=False)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not of rounds"):
            open_rounds(tmp_path / "rounds", round_recipe(MODEL, tmp_path), overwrite=overwrite)
    assert (tmp_path / "rounds" / "thesis.txt").read_text() == "years of work"
