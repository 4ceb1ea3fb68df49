"""The report: what it shows, what it leaves out, and that it asks for nothing outside itself."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from report.conftest import ATTACK, policy, write_evaluation
from report.html_page import Page

from rrhf_peft.report.folders import read_training_run
from rrhf_peft.report.run import write_report


@pytest.fixture(scope="module")
def run_page(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([trained_run], tmp_path_factory.mktemp("page") / "report.html"))


def test_a_run_and_an_evaluation_are_shown_whole(page: Page, trained_run: Path) -> None:
    assert page.headings[1:] == [
        "Evaluation",
        "More about texts and order",
        "Training",
        "Data",
        "Training data of tiny-run",
        "Held-out data of tiny-run",
        "Recipes",
        "Versions",
    ]
    shown = " ".join(page.pictures())
    for kind in ("Mean reward by", "against perplexity", "best of n", "Histograms", "Win, tie", "Training curves"):
        assert kind in shown
    assert "Mean log-prob per token of each source's responses" in shown
    for said in ("0.700 [0.600, 0.800]", "75% / 0% / 25%", "65 s", "1.2 GiB", "mean of each group's best", "ties"):
        assert said in page.text
    assert (
        "On 6 held-out prompts, after has the highest mean reward by vader: 0.70 (interval 0.60 to 0.80)" in page.text
    )
    assert (trained_run / "recipe.yaml").read_text() in page.text


def test_nothing_is_asked_for_and_nothing_can_run(page: Page, trained_run: Path) -> None:
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "iframe", "object", "embed", "link", "base", "form", "video", "audio", "svg"}
    )
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "srcset", "action", "poster", "data"} & attributes.keys():
            value = attributes[name]
            assert value.startswith("data:image/svg+xml;base64,") or value.removeprefix("#") in ids, (tag, name, value)
    assert not re.search(r"url\(|@import|expression\(", page.source.replace("".join(page.pictures()), ""))
    policies = [own["content"] for own in page.all("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_pictures_refer_to_nothing_outside_themselves_and_are_described(page: Page) -> None:
    pictures = page.pictures()
    assert len(pictures) >= 7
    for description, svg in pictures.items():
        assert len(description) > 30
        assert "<script" not in svg
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))


def test_what_a_model_says_is_text(page: Page) -> None:
    assert "<script" not in page.source
    assert "onerror=alert" in page.text  # shown, as what it is
    assert page.text.count(ATTACK) == 2


def test_names_are_text_as_well(tmp_path: Path) -> None:
    name = 'x"><script>alert(1)<'
    page = Page(
        write_report(
            [write_evaluation(tmp_path / "evaluation", {name: policy(0.1), "$a_{b$ & c": policy(0.2)})],
            tmp_path / "r.html",
        )
    )
    assert "<script" not in page.source
    assert name in page.text
    assert "$a_{b$ & c" in page.text


def test_examples_are_the_same_prompts_and_the_first_responses(tmp_path: Path) -> None:
    folder = write_evaluation(
        tmp_path / "evaluation", {"base": policy(0.1), "after": policy(0.7)}, settings={"examples": 3}
    )
    page = Page(write_report([folder]))
    assert len(page.all("article")) == 3
    for shown in ("Story 0:", "base 0", "after 0", "Story 2:", "Story 4:", "+0.60"):
        assert shown in page.text
    assert "the end" not in page.text


def test_policies_are_matched_by_prompt_and_not_by_line(tmp_path: Path) -> None:
    folder = write_evaluation(
        tmp_path / "evaluation", {"base": policy(0.1), "after": policy(0.7)}, settings={"examples": 6}
    )
    path = folder / "scored" / "after.vader.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[4], *lines[:3], lines[5]]))  # another order, and one that was not scored
    text = Page(write_report([folder])).text
    places = [text.index(words) for words in ("base 4", "after 4", "base 5", "after 5")]
    assert places == sorted(places)
    assert "Tell me 3" not in text


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    page = Page(write_report([write_evaluation(tmp_path / "evaluation", {"base": policy(0.1)})]))
    assert not [alt for alt in page.pictures() if "Win" in alt]
    for absent in ("Training", "Data", "win / tie", "pair accuracy", "peak memory", "unfinished", "nan", "None"):
        assert absent not in page.text
    bare = Page(write_report([write_evaluation(tmp_path / "bare", {"base": policy(None, responses=None)})]))
    assert bare.pictures() == {}
    assert bare.headings[1:] == ["Versions"]


def test_two_judges_of_a_comparison_have_columns_of_their_own(tmp_path: Path) -> None:
    shares = {"policy": "after", "against": "base", "tie": 0.0, "prompts": 6}
    wins = [{**shares, "by": "vader", "win": 0.75, "lose": 0.25}, {**shares, "by": "judge", "win": 0.5, "lose": 0.5}]
    folder = write_evaluation(tmp_path / "evaluation", {"base": policy(0.1), "after": policy(0.7)}, wins=wins)
    text = Page(write_report([folder])).text
    for said in (
        "win / tie / lose against base, vader",
        "win / tie / lose against base, judge",
        "75% / 0% / 25%",
        "50% / 0% / 50%",
    ):
        assert said in text


def test_values_that_are_no_numbers_are_dashes(tmp_path: Path) -> None:
    odd = policy(0.3, perplexity=math.nan, words=math.inf)
    odd["rewards"]["vader"] |= {"low": math.nan, "high": None}
    odd["best_of_n"]["vader"]["2"] = {"mean": math.nan, "low": 0.1, "high": 0.2}
    lost = policy(0.5)
    lost["rewards"]["vader"] = {"mean": None, "low": None, "high": None}
    folder = write_evaluation(tmp_path / "evaluation", {"base": policy(0.2, words=7.0), "odd": odd, "lost": lost})
    path = folder / "scored" / "odd.vader.jsonl"
    path.write_text(path.read_text().replace('"scores": [0.2, 0.5]', '"scores": [NaN, null]'))
    page = Page(write_report([folder]))
    assert not re.search(r"\b(nan|inf|None)\b", page.text + " ".join(page.pictures()))
    assert "–" in page.text
    assert "0.30" in page.text


def test_a_run_without_an_evaluation_says_what_training_did(run_page: Page) -> None:
    assert "of its training pairs right at the end" in run_page.text
    assert "vader" not in run_page.text


def test_a_run_that_logged_nothing_is_shown_without_curves(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "young"
    shutil.copytree(trained_run, folder)
    (folder / "metrics.jsonl").unlink()
    page = Page(write_report([folder]))
    assert page.pictures().keys() <= {alt for alt in page.pictures() if "number of responses" in alt}
    assert "not ended" in page.text


def test_a_line_that_is_still_being_written_is_no_damage(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "running"
    shutil.copytree(trained_run, folder)
    whole = read_training_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert read_training_run(folder) == whole


def test_several_runs_share_axes_and_their_data_are_shown_once(trained_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-run"
    shutil.copytree(trained_run, other)
    page = Page(write_report([trained_run, other, trained_run], tmp_path / "r.html"))
    curves = [alt for alt in page.pictures() if alt.startswith("Training curves")]
    assert len(curves) == 1
    assert "tiny-run: " in curves[0]
    assert "other-run: " in curves[0]
    assert page.headings.count("Training data of tiny-run and other-run") == 1
    assert "The same in all runs: objective rrhf, balanced" in page.text


def test_a_run_has_the_name_of_the_policy_that_it_trained(trained_run: Path, tmp_path: Path) -> None:
    folder = write_evaluation(
        tmp_path / "evaluation", {"base": policy(0.1), "aligned": policy(0.7, adapter=str(trained_run))}
    )
    page = Page(write_report([folder, trained_run], tmp_path / "r.html"))
    assert "Recipe of aligned" in page.text
    colors = [own["style"] for own in page.all("span") if own.get("class") == "swatch"]
    assert len(set(colors)) == 2
    assert colors[1] == colors[-1]  # in the evaluation's table and in that of training


def test_a_merge_is_shown_with_its_fidelity(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    fidelity = {"max_abs_difference": 1.1e-05, "mean_kl": 2e-12, "top1_agreement": 1.0}
    merge = {"base_model": "tiny", "base": "original", "tensors": 21, "changed_tensors": 14, "dtype": "float32"}
    (folder / "merge_report.json").write_text(json.dumps({**merge, "delta_norm": 16.7, "fidelity": fidelity}))
    page = Page(write_report([folder]))
    assert page.headings[1:] == ["Merge", "merged", "Versions"]
    for said in ("14 tensors", "1.1e-05", "100.0%"):
        assert said in page.text


def test_rounds_show_reward_from_round_to_round(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ip"
    rewards = {"base": 0.1, "round-1": 0.5, "round-2": 0.4}
    rows = []
    for name, reward in rewards.items():
        (folder / name).mkdir(parents=True)
        shutil.move(write_evaluation(tmp_path / name, {name: policy(reward)}), folder / name / "evaluation")
        row = {"policy": name, "reward": reward, "low": reward - 0.1, "high": reward + 0.1, "mean_of_max": None}
        rows.append(row if name == "base" else {**row, "mean_of_max": 0.6, "groups": 24, "candidates": 0.2})
    shutil.copytree(trained_run, folder / "round-1" / "run")
    (folder / "rounds.json").write_text(json.dumps({"rounds": rows}))
    page = Page(write_report([folder]))
    assert page.headings[1:4] == ["Rounds: ip", "All policies of ip", "More about texts and order"]
    assert "from 0.10 [0.00, 0.20] (base) to 0.40 [0.30, 0.50] (round-2); it rose in 1 of 2 rounds" in page.text
    assert [alt for alt in page.pictures() if alt.startswith("Reward by round. base: 0.10")]
    assert "Recipe of round-1" in page.text
    for answer in ("base 0", "round-1 0", "round-2 0"):  # side by side, out of three evaluations
        assert answer in page.text


def test_online_training_shows_what_the_policy_answered(trained_run: Path, tmp_path: Path, run_page: Page) -> None:
    folder = tmp_path / "online"
    shutil.copytree(trained_run, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, reward in ((0, 0.25), (8, 0.75)):
            logged = {"step": step, "refresh": float(step), "rewards/mean": reward, "kl/response": float(step)}
            file.write(json.dumps(logged) + "\n")
    page = Page(write_report([folder]))
    [said] = [alt for alt in page.pictures() if alt.startswith("The policy's own answers")]
    assert "online: 0.250 to 0.750" in said
    assert not [alt for alt in run_page.pictures() if alt.startswith("The policy's own answers")]


def test_one_histogram_takes_half_the_width_and_several_all_of_it(tmp_path: Path) -> None:
    widths = []
    for names in (["base", "after"], ["base", "after", "other"]):
        folder = write_evaluation(tmp_path / f"of-{len(names)}", {name: policy(0.5) for name in names})
        source = Page(write_report([folder])).source
        [found] = re.findall(r'<figure( class="wide")?><div class="scroll"><img src="[^"]*" alt="Histograms', source)
        widths.append(found)
    assert widths == ["", ' class="wide"']
