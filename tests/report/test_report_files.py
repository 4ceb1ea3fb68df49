"""Which folders a report takes, what it says of damaged ones, and which file it replaces."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from report.conftest import policy, write_evaluation
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.records import UserError
from rrhf_peft.report.run import write_report


def refusal(*folders: Path, output: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        write_report(list(folders), output)
    return str(caught.value)


def test_a_damaged_log_is_named_with_its_line(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for damage in ('{"step": 3, "loss"', "[1, 2]", '{"loss": 0.5}'):
        (folder / "metrics.jsonl").write_text("\n".join([lines[0], damage, *lines[2:]]) + "\n")
        message = refusal(folder)
        assert f"{folder / 'metrics.jsonl'}, line 2" in message
        assert "Fix or remove the line" in message


def test_a_foreign_folder_is_named_with_what_is_wanted(evaluation: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    message = refusal(evaluation, foreign)
    assert str(foreign) in message
    assert "evaluation.json" in message
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert not (evaluation / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"version": 2, "policies": {"a": {}}}', "version"),
        ('{"version": 1, "policies": {}}', "policies"),
        ('{"version": 1, "policies": {"a": {"rewards": {"vader": 3}}}}', "policies.a.rewards.vader"),
        ('{"version": 1, ', "not JSON"),
    ],
)
def test_a_damaged_evaluation_is_named_with_its_key(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    message = refusal(tmp_path)
    assert str(tmp_path / "evaluation.json") in message
    assert said in message


def test_a_damaged_scored_row_is_named_with_its_line(evaluation: Path) -> None:
    path = evaluation / "scored" / "after.vader.jsonl"
    path.write_text(path.read_text().replace('"scores": [0.4, 0.5]', '"scores": [0.4]'))
    assert f"{path}, line 3" in refusal(evaluation)


@pytest.mark.parametrize("name", ["recipe.yaml", "data_report.json"])
def test_a_damaged_run_is_named(trained_run: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    (folder / name).write_text("{[")
    assert str(folder / name) in refusal(folder)


def test_a_report_is_replaced_and_any_other_file_is_not(evaluation: Path, tmp_path: Path) -> None:
    target = evaluation / "report.html"
    assert write_report([evaluation]) == target
    first = target.read_text()
    target.write_text(first.replace("base", "changed by hand"))
    write_report([evaluation])
    assert target.read_text() == first  # the same folder gives the same bytes
    letter = tmp_path / "letter.html"
    letter.write_text("<html>Dear Ada</html>")
    assert "no report of rrhf-peft" in refusal(evaluation, output=letter)
    assert letter.read_text() == "<html>Dear Ada</html>"
    assert not list(evaluation.glob(".*partial"))


def test_an_output_that_cannot_be_written_is_a_user_error(evaluation: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(evaluation, output=tmp_path / "file" / "report.html")


def test_without_matplotlib_the_extra_is_named(evaluation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for name in sys.modules if name.startswith("matplotlib")), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "rrhf-peft[plots]" in refusal(evaluation)


def test_the_verb_prints_the_path_and_takes_an_output(evaluation: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "page.html"
    result = CliRunner().invoke(app, ["report", str(evaluation), "--output", str(target)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Done: {target}\n"
    assert target.is_file()
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert missing.exit_code == 1
    assert "no such folder" in missing.stderr


def test_a_comparisons_folder_is_its_runs_and_their_evaluation(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    for name in ("rrhf", "other"):
        shutil.copytree(trained_run, folder / name)
    recipe = (folder / "other" / "recipe.yaml").read_text()
    (folder / "other" / "recipe.yaml").write_text(recipe.replace("rank_weight: 1.0", "rank_weight: 0.5"))
    policies = {"base": policy(0.1), **{name: policy(0.5, adapter=str(folder / name)) for name in ("rrhf", "other")}}
    write_evaluation(folder / "evaluation", policies)
    (folder / "notes").mkdir()  # something else, which nobody asked for
    text = write_report([folder]).read_text()
    assert (folder / "report.html").is_file()
    assert text.index("Recipe of rrhf") < text.index("Recipe of other")  # as in the evaluation, not by name
    assert "What differs" in text
    assert '<th scope="row">objective.rank_weight</th><td>1.0</td><td>0.5</td>' in text
    assert "objective.variant</th>" not in text
    (tmp_path / "empty").mkdir()
    assert "not a folder to report on" in refusal(tmp_path / "empty")


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / f"{part}/evaluation", {"base": policy(0.1)}) for part in ("one", "two")]
    text = write_report(folders, tmp_path / "r.html").read_text()
    assert "Evaluation: one/evaluation" in text
    assert "Evaluation: two/evaluation" in text
