"""Rounds on a tiny model, from prompts to tables: what is learnt, what is continued, what is left in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from rich.console import Console
from rounds.round_recipes import (
    NEEDS,
    evaluated,
    open_rounds,
    read_rows,
    round_recipe,
    round_values,
    run_quietly,
    tables,
)
from score_rules import LIVE_MODELS
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.files import lock
from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import UserError
from rrhf_peft.rounds.run import run_rounds
from rrhf_peft.rounds.stages import RoundFolder


@pytest.fixture(scope="module")
def two_rounds(tiny_model_folder, tmp_path_factory):
    """The folder and the outcome of two rounds."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_quietly(round_recipe(tiny_model_folder, folder, prompts=16))


def test_each_round_samples_better_responses_and_a_third_goes_on(tiny_model_folder, two_rounds):
    folder, outcome = two_rounds
    first, second = outcome.rows
    assert [first.policy, second.policy] == ["round-1", "round-2"]
    assert second.own > first.own + 0.05
    assert second.mean_of_max > second.own
    assert not outcome.was_finished
    written = json.loads((folder / "rounds" / "rounds.json").read_text())["rounds"]
    assert [row["own"] for row in written] == [first.own, second.own]

    again = run_quietly(round_recipe(tiny_model_folder, folder, prompts=16))
    assert again.was_finished
    assert again.rows == outcome.rows
    more = run_quietly(round_recipe(tiny_model_folder, folder, prompts=16, rounds={"count": 3}))
    assert more.rows[:2] == outcome.rows
    assert more.rows[2].own > 2 * first.own


def test_rows_say_which_policy_wrote_them_and_no_round_repeats_another(two_rounds):
    folder = two_rounds[0] / "rounds"
    first, second = (read_rows(folder / f"round-{number}" / "candidates.jsonl") for number in (1, 2))
    assert {source for row in first for source in row["sources"]} == {"top_p:base"}
    assert {source for row in second for source in row["sources"]} == {"top_p:round-1"}
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    runs = [yaml.safe_load((folder / f"round-{number}" / "run" / "recipe.yaml").read_text()) for number in (1, 2)]
    assert [run["training"]["seed"] for run in runs] == [0, 1]
    assert [run["model"]["init_adapter"] for run in runs] == [None, str(folder / "round-1" / "run")]


def test_round_1_is_what_the_single_verbs_do(tiny_model_folder, two_rounds, tmp_path):
    values = round_values(tiny_model_folder, tmp_path, prompts=16)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    texts = [
        [row["responses"] for row in read_rows(folder / "rounds" / "round-1" / "candidates.jsonl")]
        for folder in (tmp_path, two_rounds[0])
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_all_weights_in_slices_with_the_base_trained_anew(tiny_model_folder, tmp_path):
    changes = {
        "adapter": None,
        "training": {"max_steps": 2, "save_strategy": "no"},
        "rounds": {"prompts_per_round": 8, "start_from": "base"},
    }
    run_quietly(round_recipe(tiny_model_folder, tmp_path, prompts=12, **changes))
    rounds = tmp_path / "rounds"
    prompts = [[row["prompt"] for row in read_rows(rounds / f"round-{n}" / "candidates.jsonl")] for n in (1, 2)]
    assert prompts == [[f"{n} " for n in range(8)], [f"{n} " for n in (8, 9, 10, 11, 0, 1, 2, 3)]]
    second = yaml.safe_load((rounds / "round-2" / "run" / "recipe.yaml").read_text())
    assert second["model"]["name"] == str(tiny_model_folder)
    assert {source for row in read_rows(rounds / "round-2" / "candidates.jsonl") for source in row["sources"]} == {
        "top_p:round-1"
    }
    details = read_rows(rounds / "round-2" / "candidates.jsonl")[0]["meta"]["candidates"]
    assert {own["policy"] for own in details} == {"run"}  # sampled by the trained weights


@pytest.mark.slow
def test_no_model_stays_in_memory_when_a_stage_is_over(tiny_model_folder, tmp_path):
    values = round_values(tiny_model_folder, tmp_path, prompts=8, training={"max_steps": 1})
    values["scoring"]["scorer"]["function"] = "score_rules:counting_live_models"
    LIVE_MODELS.clear()
    run_quietly(make_recipe(values, needs=NEEDS))
    before_training, after_training_and_sampling = LIVE_MODELS
    assert after_training_and_sampling == before_training


def test_the_verb_prints_the_table_and_says_when_all_was_done(two_rounds):
    folder, _ = two_rounds
    before = tables(folder / "rounds")
    recipe = str(folder / "rounds" / "recipe.yaml")
    done = CliRunner().invoke(app, ["rounds", recipe])
    assert done.exit_code == 0, done.output
    assert "Finished before:" in done.output
    assert "round-2" in done.output
    assert tables(folder / "rounds") == before
    printed = json.loads(CliRunner().invoke(app, ["rounds", recipe, "--json"]).stdout)
    assert printed["rounds"] == json.loads(before["rounds.json"])["rounds"]
    refused = CliRunner().invoke(app, ["rounds", recipe, "sampling.seed=5"])
    assert refused.exit_code == 1
    assert "sampling.seed was 0 and is 5" in refused.output


def test_a_stage_that_fails_is_told_and_done_again(tiny_model_folder, tmp_path):
    recipe = round_recipe(tiny_model_folder, tmp_path, prompts=4, data={"max_tokens": 4096})
    with pytest.raises(UserError, match=r"data\.max_tokens: 4096 is more than"):
        run_quietly(recipe)
    with pytest.raises(UserError, match=r"data\.max_tokens: 4096 is more than"):
        run_quietly(recipe)
    assert (tmp_path / "rounds" / "round-1" / "scored.jsonl").exists()


def test_progress_names_round_and_stage(tiny_model_folder, tmp_path, capsys):
    values = round_values(tiny_model_folder, tmp_path, prompts=4, training={"max_steps": 1}, rounds={"count": 1})
    run_rounds(make_recipe(values, needs=NEEDS), console=Console(stderr=True, width=100))
    told = capsys.readouterr().err
    for stage in ("sample", "score", "train"):
        assert f"round-1: {stage}" in told
    assert "train s" in told


def test_a_recipe_that_was_refused_before_its_first_stage_can_be_mended(tiny_model_folder, tmp_path):
    output = tmp_path / "rounds"
    wrong = round_recipe(tiny_model_folder, tmp_path, prompts=4, rounds={"count": 1, "prompts_per_round": 3})
    mended = round_recipe(tiny_model_folder, tmp_path, prompts=4, rounds={"count": 1, "prompts_per_round": 2})
    open_rounds(output, wrong, overwrite=False)
    open_rounds(output, mended, overwrite=False)
    assert make_recipe(yaml.safe_load((output / "recipe.yaml").read_text()), needs=NEEDS) == mended
    (output / "round-1").mkdir()
    with pytest.raises(UserError, match=r"rounds\.prompts_per_round was 2 and is 3"):
        open_rounds(output, wrong, overwrite=False)


def test_the_table_counts_the_groups_that_training_kept(tiny_model_folder, tmp_path):
    values = round_values(tiny_model_folder, tmp_path, prompts=6, training={"max_steps": 1}, rounds={"count": 1})
    values["scoring"]["scorer"]["function"] = "score_rules:ties_in_the_first_group"
    (row,) = run_quietly(make_recipe(values, needs=NEEDS)).rows
    report = json.loads((tmp_path / "rounds" / "round-1" / "scored.report.json").read_text())
    assert report["groups_kept"] == 6
    assert row.groups == 5


def test_overwritten_rounds_come_back_when_the_new_ones_fail_at_once_and_stay_until_they_are_whole(
    tiny_model_folder, tmp_path
):
    changes = {"prompts": 4, "training": {"max_steps": 1}, "rounds": {"count": 1}}
    run_quietly(round_recipe(tiny_model_folder, tmp_path, **changes))
    output = tmp_path / "rounds"
    before = tables(output)
    with pytest.raises(UserError, match="no such file"):
        run_quietly(
            round_recipe(tiny_model_folder, tmp_path, **changes, sampling={"prompts": "x.json"}), overwrite=True
        )
    assert tables(output) == before
    wrong = round_recipe(tiny_model_folder, tmp_path, **changes, data={"max_tokens": 4096})
    retired = tmp_path / ".rounds.rrhf-peft.retired"
    with pytest.raises(UserError, match=rf"max_tokens: 4096 .* replace are kept in {retired}"):
        run_quietly(wrong, overwrite=True)
    assert tables(retired) == before
    again = round_recipe(tiny_model_folder, tmp_path, **changes, scoring={"seed": 1})
    run_quietly(again, overwrite=True)
    assert not retired.exists()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which rrhf-peft rounds did not write"):
        run_quietly(again, overwrite=True)
    assert (output / "thesis.txt").exists()


def test_a_damaged_report_of_a_round_is_one_paragraph_with_its_place(tiny_model_folder, tmp_path):
    changes = {"prompts": 4, "training": {"max_steps": 1}, "rounds": {"count": 1}}
    recipe = round_recipe(tiny_model_folder, tmp_path, **changes)
    run_quietly(recipe)
    damaged = tmp_path / "rounds" / "round-1" / "scored.report.json"
    damaged.write_text("{")
    with pytest.raises(UserError, match=rf"{damaged}: this is not JSON"):
        run_quietly(recipe)


def test_a_users_file_in_a_round_keeps_it_from_being_overwritten(tiny_model_folder, tmp_path):
    recipe, output = round_recipe(tiny_model_folder, tmp_path), tmp_path / "rounds"
    open_rounds(output, recipe, overwrite=False)
    ours = "stages.json candidates.jsonl scored.report.json run/checkpoint-4/optimizer.pt evaluation/samples/x.jsonl"
    for name in (*ours.split(), "notes.txt"):
        (output / "round-1" / name).parent.mkdir(parents=True, exist_ok=True)
        (output / "round-1" / name).write_text("years of work")
    with pytest.raises(UserError, match=r"holds round-1/notes\.txt, which rrhf-peft rounds did not write"):
        open_rounds(output, recipe, overwrite=True)
    (output / "round-1" / "notes.txt").unlink()
    open_rounds(output, recipe, overwrite=True)
    assert not (output / "round-1").exists()


def test_a_changed_held_out_file_is_refused(tiny_model_folder, tmp_path):
    values = evaluated(round_values(tiny_model_folder, tmp_path), tmp_path)
    recipe, output = make_recipe(values, needs=NEEDS), tmp_path / "rounds"
    open_rounds(output, recipe, overwrite=False)
    (output / "round-1").mkdir()
    open_rounds(output, recipe, overwrite=False)
    prompts = values["evaluation"]["prompts"]
    with open(prompts, "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(UserError, match=rf"evaluation\.prompts: {prompts} has another content"):
        open_rounds(output, recipe, overwrite=False)


def test_another_base_or_another_rule_between_two_rounds_is_refused(tiny_model_folder, tmp_path, monkeypatch):
    """What is finished of the rounds was made with the first ones, and a round of its own would not notice."""
    (tmp_path / "rules_of_rounds.py").write_text("def one(prompt, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model, output = tmp_path / "model", tmp_path / "rounds"
    shutil.copytree(tiny_model_folder, model)
    rule = {"name": "rule", "function": "rules_of_rounds:one"}
    recipe = make_recipe(evaluated(round_values(model, tmp_path, scoring={"scorer": rule}), tmp_path), needs=NEEDS)
    open_rounds(output, recipe, overwrite=False)
    (output / "round-1").mkdir()
    open_rounds(output, recipe, overwrite=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    with pytest.raises(UserError, match=rf"model\.name: {model} has another content"):
        open_rounds(output, recipe, overwrite=False)
    (model / "config.json").write_text((tiny_model_folder / "config.json").read_text())
    open_rounds(output, recipe, overwrite=False)
    (tmp_path / "rules_of_rounds.py").write_text("def one(prompt, responses):\n    return [2.0] * len(responses)\n")
    with pytest.raises(UserError, match=r"scoring\.scorer: the code of the rule rules_of_rounds:one has another"):
        open_rounds(output, recipe, overwrite=False)


def test_two_runs_of_one_folder_at_once_are_refused(tiny_model_folder, tmp_path):
    with lock(tmp_path / "rounds"), pytest.raises(UserError, match="working on it already"):
        run_quietly(round_recipe(tiny_model_folder, tmp_path))


def test_a_damaged_note_of_the_finished_stages_is_one_paragraph(tmp_path):
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1" / "stages.json").write_text('{"sample": ')
    with pytest.raises(UserError, match=r"stages\.json: is damaged.*Remove it"):
        RoundFolder(tmp_path, 1).finished()
