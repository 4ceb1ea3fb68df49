"""What cannot work is told in one paragraph that names the key, before anything is sampled."""

from __future__ import annotations

import json

import pytest
from cli.conftest import Run
from evaluate.evaluate_recipes import LETTERS, evaluation_recipe, evaluation_values, write_json, write_rows
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.evaluate.run import evaluate_recipe
from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import UserError

JUDGE = {"name": "judge", "base_url": "http://localhost:1/v1", "model": "j"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"wins": {"against": "bse", "by": "letters"}}, "wins.against: there is no policy 'bse'; did you mean 'base'?"),
        ({"wins": {"against": "base", "by": "letters"}}, "is the only policy"),
        (
            {"policies": {"base": {}, "b": {}}, "wins": {"against": "base", "by": "leters"}},
            "wins.by: there is no scorer 'leters'; did you mean 'letters'?",
        ),
        (
            {"policies": {"base": {}, "b": {}}, "wins": {"against": "base", "by": JUDGE, "tie_margin": 1.0}},
            "wins.tie_margin: is read with the reward of a scorer",
        ),
        ({"best_of": [1, 4]}, "best_of: the best of 4 cannot be taken from 3 responses"),
        ({"best_of": [0]}, "best_of: the best of 0"),
        ({"policies": {"a/b": {}}}, "policies.a/b: names a file as well"),
        ({"scorers": {"v1.5": LETTERS}}, "scorers.v1.5: names a file as well"),
        ({"scorers": {"h": {"name": "human", "sheet": "x.csv"}}}, "people rank the responses of one prompt"),
        ({"scorers": {"j": {**JUDGE, "mode": "rank"}}}, "use mode: score, or wins.by"),
        (
            {
                "scorers": {
                    "both": {
                        "name": "composite",
                        "parts": {"a": {"scorer": LETTERS, "normalize": "zscore"}, "b": {"scorer": LETTERS}},
                    }
                }
            },
            "part a is normalised within each policy",
        ),
        ({"decoding": {"strategy": "beam", "temperature": 0.5}}, "decoding.temperature: has no effect with strategy"),
    ],
)
def test_settings_that_contradict_each_other(tiny_model_folder, tmp_path, settings, says):
    with pytest.raises(UserError) as caught:
        evaluation_recipe(tiny_model_folder, tmp_path, **settings)
    assert says in str(caught.value)
    assert "evaluation." in str(caught.value)


def refused(recipe, folder, says):
    with pytest.raises(UserError) as caught:
        evaluate_recipe(recipe)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policies": {"base": {}, "x": {"adapter": "./nowhere"}}}, "evaluation.policies.x: ./nowhere"),
        ({"policies": {"x": {"model": "./nowhere"}}}, "evaluation.policies.x: ./nowhere: there is no such model"),
        ({"perplexity": {"model": "./no-judge"}}, "./no-judge: there is no such judge model"),
        ({"scorers": {"r": {"name": "rule", "function": "no.such:rule"}}}, "evaluation.scorers.r: "),
        ({"scorers": {"r": {"name": "reward_model", "model": "./no-rm"}}}, "evaluation.scorers.r: ./no-rm: "),
        ({"prompts": "nowhere.json"}, "evaluation.prompts: "),
        ({"decoding": {"k": 1, "max_new_tokens": 505}}, "Set evaluation.max_prompt_tokens to 7 or less"),
        ({"pairs": "nowhere.jsonl"}, "evaluation.pairs: "),
    ],
)
def test_what_is_not_there_is_told_before_the_work(tiny_model_folder, tmp_path, settings, says):
    refused(evaluation_recipe(tiny_model_folder, tmp_path, **settings), tmp_path, says)


def test_data_that_says_nothing(tiny_model_folder, tmp_path):
    prompts = write_json(tmp_path / "bare.json", ["a prompt", "another"])
    recipe = evaluation_recipe(tiny_model_folder, tmp_path, references=prompts)
    refused(recipe, tmp_path, "evaluation.references: prompt 0 has no answer")
    ties = [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}]
    recipe = evaluation_recipe(tiny_model_folder, tmp_path, pairs=write_rows(tmp_path / "ties.jsonl", ties))
    refused(recipe, tmp_path, "evaluation.pairs: no group has two different scores")
    ordered = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}])
    recipe = evaluation_recipe(tiny_model_folder, tmp_path, pairs=ordered, max_tokens=600)
    refused(recipe, tmp_path, "evaluation.max_tokens: 600 is more than the policy base can read (512 tokens)")


def test_without_a_model_every_policy_names_its_own(tiny_model_folder, tmp_path):
    values = evaluation_values(tiny_model_folder, tmp_path)
    del values["model"]
    refused(make_recipe(values, needs=["evaluation"]), tmp_path, "evaluation.policies.base: names no model")
    values["evaluation"]["policies"] = {"base": {"model": str(tiny_model_folder)}}
    values["evaluation"]["perplexity"] = {}
    refused(make_recipe(values, needs=["evaluation"]), tmp_path, "evaluation.perplexity.model: name the judge")


def test_a_folder_of_something_else_is_left_alone(tiny_model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"evaluation\.output holds other files"):
        evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path))
    with pytest.raises(UserError, match=r"evaluation\.output: .* has no mark of rrhf-peft .*--overwrite leaves it"):
        evaluate_recipe(evaluation_recipe(tiny_model_folder, tmp_path), overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_users_file_inside_an_evaluation_keeps_it_from_being_overwritten(tiny_model_folder, tmp_path):
    recipe = evaluation_recipe(tiny_model_folder, tmp_path)
    evaluate_recipe(recipe)
    for name in ("samples/notes.txt", "samples/mine.jsonl", "plots/mine.png", "scored/base.mine.txt"):
        notes = tmp_path / "out" / name
        notes.write_text("years of work")
        with pytest.raises(UserError, match=f"holds {name}, which rrhf-peft evaluate did not write"):
            evaluate_recipe(recipe, overwrite=True)
        assert notes.read_text() == "years of work"
        notes.unlink()
    evaluate_recipe(recipe, overwrite=True)


def test_the_command_prints_table_or_json_and_refuses_with_one(tiny_model_folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(evaluation_values(tiny_model_folder, tmp_path)))
    run: Run = lambda *arguments: CliRunner().invoke(app, ["evaluate", str(recipe), *arguments])  # noqa: E731
    found = run("--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    again = run()
    assert again.exit_code == 0, again.output  # the same evaluation, finished: success, and nothing is done again
    assert f"Finished before: {tmp_path / 'out'}" in again.stdout
    table = run("--overwrite")
    assert "reward letters" in table.stdout
    assert f"Done: {tmp_path / 'out'}" in table.stdout
    missing = run("evaluation=null")
    assert missing.exit_code == 1
