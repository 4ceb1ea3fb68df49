"""The verbs, from arguments to what is printed and which exit code comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from cli.conftest import Run
from transformers import AutoModelForCausalLM

from rrhf_peft import __version__
from rrhf_peft.cli import app

VERBS = [
    "demo",
    "convert",
    "sample",
    "score",
    "rank",
    "inspect",
    "plan",
    "train",
    "evaluate",
    "rounds",
    "compare",
    "report",
    "merge",
    "schema",
    "recipes",
    "doctor",
    "new",
    "chat",
    "push",
]


def test_the_verbs_are_those_that_work(rrhf: Run) -> None:
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == VERBS
    top = rrhf("--help").output
    assert all(verb in top for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_teaches_with_an_example(rrhf: Run, verb: str) -> None:
    result = rrhf(verb, "--help")
    assert result.exit_code == 0
    assert f"rrhf-peft {verb}" in result.output.partition("Example")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_have_the_same_options_for_the_same_things(rrhf: Run, verb: str) -> None:
    help = rrhf(verb, "--help").output
    assert "--debug" in help
    assert verb == "schema" or "--json" in help  # a schema is JSON without being asked


def test_training_and_reporting_answer_scripts(rrhf: Run, recipe_file: Path, tmp_path: Path) -> None:
    trained = json.loads(rrhf("train", recipe_file, "--json").stdout)
    assert trained["output"] == str(tmp_path / "runs" / "tiny")
    assert trained["data"]["train"]["groups_read"] == 12
    assert trained["metrics"]["train_loss"] > 0
    page = json.loads(rrhf("report", trained["output"], "-o", tmp_path / "page.html", "--json").stdout)["output"]
    assert Path(page).is_file()


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, rrhf_peft.cli; sys.exit(bool({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_verb_shows_the_help_and_a_misspelt_one_its_neighbour(rrhf: Run) -> None:
    assert "Usage: rrhf-peft" in rrhf().output
    result = rrhf("trian", "x.yaml")
    assert result.exit_code == 2
    assert "No such command 'trian'. Did you mean 'train'" in result.output


def test_version(rrhf: Run) -> None:
    assert rrhf("--version").output == f"rrhf-peft {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "x.yaml", "--resume", "--overwrite"),
        ("train", "x.yaml", "--ignore-changes"),
        ("merge", "adapter"),
        ("merge", "adapter", "--output", "x", "--base", "other"),
        ("plan", "x.yaml", "--processes", "0"),
        ("plan", "x.yaml", "--device", "tpu"),
    ],
)
def test_wrong_usage_exits_with_2(rrhf: Run, arguments: tuple[str, ...]) -> None:
    result = rrhf(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.output


def test_inspect_shows_the_report_and_an_example(rrhf: Run, recipe_file: Path) -> None:
    result = rrhf("inspect", recipe_file, "data.eval_size=2")
    assert result.exit_code == 0
    for part in ("10 kept of 10", "2 kept of 2", "Example: group 0", "response 3", "score 2 (best)"):
        assert part in result.output
    assert "Example: group 4" in rrhf("inspect", recipe_file, "--group", 4).output


def test_inspect_of_a_bare_file_takes_a_tokenizer_and_changes(
    rrhf: Run, ranked_file: Path, tiny_model_folder: Path
) -> None:
    result = rrhf("inspect", ranked_file, "--tokenizer", tiny_model_folder, "data.max_groups=3", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)["train"]
    assert report["groups_read"] == 3
    assert report["k_histogram"] == {"3": 3}


def test_inspect_of_a_bare_file_describes_its_scores_and_sources(rrhf: Run, ranked_file: Path, tmp_path: Path) -> None:
    result = rrhf("inspect", ranked_file, "data.max_groups=5", "--plot", tmp_path / "scores.png")
    assert result.exit_code == 0
    assert "5, with 15 responses" in result.output
    assert "response-0" in result.output
    assert "Data report" not in result.output  # nothing is tokenised
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(rrhf("inspect", ranked_file, "--json").stdout)["groups"] == 12


def test_inspect_of_a_bare_file_with_a_tokenizer_shows_both(
    rrhf: Run, ranked_file: Path, tiny_model_folder: Path
) -> None:
    output = rrhf("inspect", ranked_file, "--tokenizer", tiny_model_folder).output
    assert "Ranked data" in output
    assert "Data report" in output
    assert "Example: group 0" in output


def test_inspect_of_a_group_that_is_not_there(rrhf: Run, recipe_file: Path) -> None:
    result = rrhf("inspect", recipe_file, "--group", 99)
    assert result.exit_code == 1
    assert "no such group among those kept" in result.stderr
    assert "indices from 0 to 11" in result.stderr


def test_plan_prints_a_table_or_json(rrhf: Run, recipe_file: Path) -> None:
    assert "predicted peak" in rrhf("plan", recipe_file).output
    result = rrhf("plan", recipe_file, "--device", "cpu", "--responses", 3, "--json")
    plan = json.loads(result.stdout)
    assert plan["device"] == "cpu"
    assert plan["chunk_tokens"] <= 4 * 3 * 64
    assert plan["peak_bytes"] == sum(item["bytes"] for item in plan["items"])


def test_train_then_merge_leaves_a_model_that_loads_without_peft(rrhf: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    trained = rrhf("train", recipe_file, "training.learning_rate=1e-2")
    assert trained.exit_code == 0
    assert f"rrhf-peft merge {run}" in trained.stdout
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["learning_rate"] == 1e-2
    assert (run / "adapter_model.safetensors").is_file()

    again = rrhf("train", recipe_file)
    assert again.exit_code == 1
    assert "--resume" in again.stderr
    assert "--overwrite" in again.stderr

    merged = rrhf("merge", run, "--output", tmp_path / "merged", "--json")
    assert merged.exit_code == 0, merged.output
    assert json.loads(merged.stdout)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_training_all_weights_has_nothing_to_merge(rrhf: Run, recipe_file: Path) -> None:
    result = rrhf("train", recipe_file, "adapter=null")
    assert result.exit_code == 0
    assert "merge" not in result.stdout


def test_schema_goes_to_stdout_or_to_a_file(rrhf: Run, recipe_file: Path, tmp_path: Path) -> None:
    schema = json.loads(rrhf("schema").stdout)
    jsonschema.validate(yaml.safe_load(recipe_file.read_text()), schema)
    assert rrhf("schema", "--output", tmp_path / "recipe.schema.json").exit_code == 0
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == schema
