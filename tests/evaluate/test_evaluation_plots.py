"""Plots of an evaluation: what is drawn of which numbers, for one policy and for twenty."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.conftest import policy, write_evaluation

from rrhf_peft.evaluate.numbers import WinRow, read_evaluation
from rrhf_peft.evaluate.plots import (
    best_of_figure,
    histogram_figure,
    plane_figure,
    reward_figure,
    wins_figure,
    write_plots,
)
from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.plotting import figure_bytes, shortened, styles
from rrhf_peft.records import UserError


def texts(figure: Any) -> list[str]:
    import matplotlib.text

    return [own.get_text() for own in figure.findobj(matplotlib.text.Text) if own.get_text()]


def test_all_plots_are_written_twice_and_stale_ones_removed(tmp_path: Path) -> None:
    won = {"policy": "after", "against": "base", "by": "vader", "win": 3, "tie": 1, "lose": 2}
    folder = write_evaluation(tmp_path / "one", {"base": policy(0.1), "after": policy(0.5)}, wins=[won])
    written = write_plots(read_evaluation(folder))
    names = {"reward", "reward_perplexity", "best_of_n", "reward_histogram", "wins"}
    assert {path.name for path in written} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in (folder / "plots").iterdir()} == {path.name for path in written}
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    again = write_evaluation(tmp_path / "two", {"base": policy(0.1)})
    (folder / "evaluation.json").write_bytes((again / "evaluation.json").read_bytes())
    write_plots(read_evaluation(folder))
    assert not list((folder / "plots").glob("wins.*"))


def test_the_same_figure_gives_the_same_bytes() -> None:
    rewards = {"base": Interval(0.1, 0.0, 0.2), "after": Interval(0.5, math.nan, math.nan)}
    look = styles(list(rewards), baseline="base")
    for kind in ("png", "svg"):
        one, other = (figure_bytes(reward_figure(rewards, look, label="vader"), kind) for _ in range(2))
        assert one == other


def test_without_numbers_there_are_no_plots(tmp_path: Path) -> None:
    assert write_plots(read_evaluation(write_evaluation(tmp_path / "bare", {"base": policy(None)}))) == []
    assert not (tmp_path / "bare" / "plots").exists()


def test_a_folder_without_an_evaluation_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "evaluation.json"))):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_every_builder_takes_few_and_many_policies_with_long_names(count: int) -> None:
    names = [f"TinyStories-656K with rank_weight {i} and $everything_{i} else, seed {i}" for i in range(count)]
    look = styles(names, baseline=names[0])
    random = np.random.default_rng(0)
    values = {name: Interval(i / count, i / count - 0.1, i / count + 0.1) for i, name in enumerate(names)}
    drawn = [
        best_of_figure({name: {1: value, 4: value} for name, value in values.items()}, look, label="vader"),
        plane_figure({name: (10.0 + i, i / count) for i, name in enumerate(names)}, look, label="vader"),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert len({text.get_text() for text in legend.get_texts()}) == count
        box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
        assert box.x0 >= axes.x1  # beside the data
        assert box.x1 <= figure.bbox.width
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height
    for figure in (
        reward_figure(values, look, label="vader"),
        *drawn,
        histogram_figure({name: random.normal(size=30).tolist() for name in names}, look, label="vader"),
        wins_figure([WinRow(policy=name, against="base", by="vader", win=1, tie=1, lose=2) for name in names]),
    ):
        assert figure_bytes(figure, "svg")


def test_wins_are_shares_of_their_own_sum() -> None:
    row = WinRow(policy="after", against="base", by="vader", win=6, tie=3, lose=1)
    figure = wins_figure([row])
    bars = figure.axes[0].patches
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 60, 90])
    assert [bar.get_width() for bar in bars] == pytest.approx([60, 30, 10])
    assert {"60", "30", "10"} <= set(texts(figure))


def test_histograms_are_shares_of_the_policys_own_responses() -> None:
    scores = {"base": [0.0] * 10, "after": [0.0, 1.0, math.nan]}
    axes = histogram_figure(scores, styles(list(scores)), label="vader", bins=2).axes[0]
    behind, _, in_front, _ = (steps.get_data().values.tolist() for steps in axes.patches)  # filled, then outlined
    assert behind == [100, 0]
    assert in_front == [50, 50]


def test_twenty_policies_look_different_and_keep_their_look() -> None:
    names = [f"p{i}" for i in range(20)]
    look = styles(names, baseline="p0")
    assert len({(own.color, own.marker, str(own.dashes)) for own in look.values()}) == 20
    assert styles(names[:3], baseline="p0") == {name: look[name] for name in names[:3]}


def test_shortened_names_stay_different() -> None:
    names = ["a" * 40 + "x" * 3 + "b" * 40, "a" * 40 + "y" * 3 + "b" * 40, "short", "two\nlines"]
    short = shortened(names, 20)
    assert len(set(short.values())) == 4
    assert all(len(text) <= 20 for text in short.values())
    assert short["short"] == "short"
    assert short["two\nlines"] == "two lines"
