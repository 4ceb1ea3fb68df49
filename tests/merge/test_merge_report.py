"""Comparisons, tables, cards and progress lines."""

from __future__ import annotations

import io
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from rrhf_peft.merge.fidelity import Fidelity, MergeReport, compare
from rrhf_peft.merge.run import merge_progress

REPORT = MergeReport(
    adapter="runs/a",
    base_model="meta-llama/Llama-2-7b-hf",
    output="out/merged-7b",
    base="dequantized",
    training_quantization="nf4",
    training_dtype="bfloat16",
    dtype="bfloat16",
    files=3,
    total_bytes=13_476_831_232,
    tensors=291,
    changed_tensors=224,
    delta_norm=12.5,
    untied_embeddings=True,
    fidelity=Fidelity(0.25, 25.0, 3e-5, 0.995, 200),
    tolerance=0.05,
    without_adapter=Fidelity(5.0, 25.0, 0.4, 0.7, 200),
    against_training=None,
    seconds=61.0,
)


def _text(report: MergeReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_compare_measures_what_it_says() -> None:
    expected = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 3.0]])
    found = expected.clone()
    found[1] = torch.tensor([3.0, 0.0, 0.0]) + 7.0  # the constant does not count
    result = compare([expected], [found])
    assert result.positions == 2
    assert result.top1_agreement == 0.5
    assert result.max_abs_difference == pytest.approx(3.0)
    assert result.logit_scale == pytest.approx(2.0)
    p = math.exp(3) / (math.exp(3) + 2)
    assert result.mean_kl == pytest.approx((p - (1 - p) / 2) * 3 / 2, rel=1e-6)
    same = compare([expected], [expected + 5.0])
    assert same.max_abs_difference < 1e-6
    assert same.mean_kl < 1e-9
    broken = compare([expected], [expected * float("nan")])
    assert broken.relative_difference == float("inf")


def test_the_table_tells_everything() -> None:
    text = _text(REPORT)
    for part in (
        "Llama-2-7b",
        "dequantized",
        "12.6 GiB, bfloat16, 3 file(s)",
        "224 tensors",
        "untied",
        "99.5%",
        "0.05",
    ):
        assert part in text
    assert "untied" in text
    assert "without the adapter: 0.4" in text
    assert "not verified" in _text(replace(REPORT, fidelity=None, tolerance=None, without_adapter=None))
    original = replace(REPORT, base="original", against_training=Fidelity(2.0, 25.0, 0.01, 0.9, 200))
    assert "against the quantised model" in _text(original)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "these are the weights it was\ntrained with"),
        ({"base": "original"}, "It never saw those"),
        ({"training_quantization": "none", "base": "original"}, "unquantised base in bfloat16"),
    ],
)
def test_the_card_says_how_it_was_merged(change: dict[str, str], sentence: str) -> None:
    card = replace(REPORT, **change).card()  # type: ignore[arg-type]
    assert sentence.replace("\n", " ") in card
    _, metadata, body = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert '("merged-7b")' in body
    assert "| same most likely token | 99.5% |" in body


def test_the_card_names_no_folder_as_base_model(tmp_path: Path) -> None:
    card = replace(REPORT, base_model=str(tmp_path)).card()
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert str(tmp_path) not in card
    assert f"`{tmp_path.name}`" in card


def test_progress_is_plain_lines_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=100)
    with merge_progress(console) as show:
        for done in range(101):
            show("merging", done * 10**6, 10**8)
        show("verifying: merged model", 0, 0)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2  # a line at most every ten seconds, and at the end of each part
    assert lines[0].startswith("merging: 95.4 MiB/95.4 MiB, ")
    assert lines[1] == "verifying: merged model"


def test_progress_is_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with merge_progress(console) as show:
        show("merging", 5 * 10**7, 10**8)
        time.sleep(0.3)  # the bar is drawn ten times a second
        show("verifying: merged model", 0, 0)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "━" in shown
    assert "47.7 MiB/95.4 MiB" in shown
    assert "verifying: merged model" in shown
