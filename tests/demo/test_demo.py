"""The demo at its smallest size: everything it promises is there, and it replaces only its own results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.data import read_groups
from rrhf_peft.demo.run import TINY, DemoOutcome, draw_prompts, run_demo
from rrhf_peft.demo.stories import cheerfulness
from rrhf_peft.recipe import load_recipe
from rrhf_peft.records import UserError


class Shown:
    """A demo that ran, and what it showed."""

    def __init__(self, output: Path) -> None:
        screen = io.StringIO()
        self.outcome: DemoOutcome = run_demo(output, size=TINY, console=Console(file=screen, width=80))
        self.screen = screen.getvalue()
        self.output = output


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RRHF_PEFT_CACHE", str(folder / "cache"))
        first = Shown(folder / "demo")
        first.again = Shown(folder / "demo")  # type: ignore[attr-defined]
    return first


def test_it_leaves_what_it_promises(demo: Shown) -> None:
    names = {path.name for path in demo.output.iterdir()}
    promised = {"base", "ranked.jsonl", "heldout.jsonl", "recipe.yaml", "run", "merged", "report.json"}
    assert promised <= names <= promised | {"before_after.png"}


def test_its_data_are_ranked_groups_of_separate_prompts_scored_by_the_rule(demo: Shown) -> None:
    groups, heldout = (read_groups(demo.output / name, format="ranked") for name in ("ranked.jsonl", "heldout.jsonl"))
    assert ([group.prompt for group in groups], [group.prompt for group in heldout]) == draw_prompts(TINY)
    assert not {group.prompt for group in groups} & {group.prompt for group in heldout}  # type: ignore[arg-type]
    for group in groups + heldout:
        assert group.scores == cheerfulness(str(group.prompt), group.responses)
    assert {len(group.responses) for group in groups} == {TINY.k}


def test_its_recipe_is_one_that_anyone_could_run(demo: Shown) -> None:
    recipe = load_recipe(demo.output / "recipe.yaml")
    assert recipe.model.quantization == "nf4"
    assert recipe.data.train == str(demo.output / "ranked.jsonl")
    assert (demo.output / "run" / "adapter_model.safetensors").is_file()
    assert (demo.output / "run" / "metrics.jsonl").is_file()


def test_the_merged_model_stands_alone_and_differs_from_the_base(demo: Shown) -> None:
    merged = AutoModelForCausalLM.from_pretrained(demo.output / "merged")
    base = AutoModelForCausalLM.from_pretrained(demo.output / "base")
    assert "quantization_config" not in merged.config.to_dict()
    ids = AutoTokenizer.from_pretrained(demo.output / "merged")("Ada met Otto.", return_tensors="pt").input_ids
    assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_its_report_says_what_the_screen_says(demo: Shown) -> None:
    report = json.loads((demo.output / "report.json").read_text())
    assert report["finished"] is True
    assert set(report["seconds"]) == {"base", "sampling", "training", "merging", "measuring"}
    assert report["merge"]["fidelity"]["top1_agreement"] == 1.0
    for name in ("before", "after"):
        measured = getattr(demo.outcome, name)
        texts, prompts = report[name]["responses"], draw_prompts(TINY)[1]
        assert report[name]["rewards"] == [cheerfulness(*pair) for pair in zip(prompts, texts, strict=True)]
        assert str(measured.reward) in demo.again.screen  # type: ignore[attr-defined]
        assert f"{measured.perplexity:.2f}" in demo.screen
    groups = read_groups(demo.output / "ranked.jsonl")
    assert report["mean_of_group_max"] == pytest.approx(sum(max(group.scores) for group in groups) / len(groups))


def test_the_screen_fits_in_80_columns_and_holds_no_library_noise(demo: Shown) -> None:
    commands = ("    rrhf-peft", "    AutoModelForCausalLM", "    recipes/")  # whole, for copying
    long = [line for line in demo.screen.splitlines() if len(line) > 80 and not line.startswith(commands)]
    assert [line for line in long if str(demo.output) not in line] == []
    for word in ("Warning", "warn", "Loading weights", "Writing model", "it/s"):
        assert word not in demo.screen


def test_a_second_run_uses_the_cached_base_and_repeats_every_number(demo: Shown) -> None:
    again: Shown = demo.again  # type: ignore[attr-defined]
    assert "training steps:" in demo.screen
    assert "training steps:" not in again.screen
    assert again.outcome.before == demo.outcome.before
    assert again.outcome.after == demo.outcome.after


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"quarter": 3}')
    with pytest.raises(UserError, match="something other than an earlier demo"):
        run_demo(tmp_path, size=TINY)
    assert (tmp_path / "report.json").read_text() == '{"quarter": 3}'
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_or_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(UserError, match="file"):
            run_demo(place, size=TINY)


@pytest.mark.slow
def test_at_full_size_rrhf_does_its_work_without_ruining_the_text(tmp_path: Path) -> None:
    outcome = run_demo(tmp_path / "demo", console=Console(file=io.StringIO()))
    before, after = outcome.before, outcome.after
    assert after.reward.low > before.reward.high + 0.3
    assert after.reward.mean > outcome.mean_of_max - 0.15
    assert after.perplexity < 1.3 * before.perplexity
    assert after.pair_accuracy > before.pair_accuracy + 0.15
