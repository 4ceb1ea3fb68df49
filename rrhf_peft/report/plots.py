"""The report's own plots: the course of training, the k of the data, reward from round to round.

Plain data in, matplotlib figures out. The plots of an evaluation are `rrhf_peft.evaluate.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.plotting import (
    HUES,
    WIDE,
    WIDTH,
    Style,
    log_scale_if_wide,
    new_figure,
    running_mean,
    shortened,
    styled,
)

#: More runs than this have no faint lines of single steps: nothing could be seen behind them.
_MOST_FAINT = 3
#: Points of a line; a plot has no more pixels to show them.
_MOST_POINTS = 400
#: Values so far apart need a logarithmic axis.
_FAR_APART = 30.0


class Curve(NamedTuple):
    """One metric of one run: training values and held-out ones, each over their steps."""

    steps: Sequence[float]
    values: Sequence[float]
    held_out_steps: Sequence[float] = ()
    held_out_values: Sequence[float] = ()


def smoothing_window(values: int) -> int:
    """How many steps a running mean takes: an odd number near a fifteenth of them all; 1 for short runs."""
    return 1 if values < 20 else max(3, values // 15) | 1


@styled
def curves_figure(panels: Mapping[str, Mapping[str, Curve]], look: Mapping[str, Style]) -> Any:
    """Metric -> run or source -> curve, a panel for each metric; dots are held-out values.

    A panel whose values are far apart, and all positive, has a logarithmic axis.
    """
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    rows = math.ceil(len(panels) / columns)
    runs = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    short = shortened(runs, 40)
    width = WIDTH if columns == 1 else WIDE
    per_row = max(1, min(4, int(width / (0.6 + 0.08 * max(map(len, short.values()))))))  # about 0.08 inches a letter
    key_rows = math.ceil(len(runs) / per_row) if len(runs) > 1 else 0
    figure = new_figure(width, 2.8 * rows + 0.3 + 0.22 * key_rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        for name, curve in panel.items():
            _draw(axes, curve, look[name], faint=len(runs) <= _MOST_FAINT)
        drawn = [value for curve in panel.values() for value in (*curve.values, *curve.held_out_values)]
        if min(drawn, default=0.0) > 0:
            medians = [float(np.median(curve.values)) for curve in panel.values() if len(curve.values)]
            log_scale_if_wide(axes.yaxis, medians, _FAR_APART)
        axes.set_title(title)
        axes.margins(x=0.02)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
        elif index + columns >= len(panels):
            axes.set_xlabel("optimizer step")
    if key_rows:
        from matplotlib.lines import Line2D

        lines = [
            Line2D([], [], color=look[run].color, linestyle=look[run].dashes, marker=look[run].marker) for run in runs
        ]
        figure.legend(lines, [short[run] for run in runs], loc="outside upper left", ncols=per_row)
    return figure


@styled
def k_figure(histogram: Mapping[int, int]) -> Any:
    """Groups by their number of responses k."""
    figure = new_figure(WIDTH, 2.8)
    axes = figure.subplots()
    sizes = sorted(histogram)
    bars = axes.bar(sizes, [histogram[k] for k in sizes], color=HUES[0], width=0.7)
    if len(sizes) <= 16:
        axes.set_xticks(sizes)
        axes.bar_label(bars, [f"{histogram[k]:,}" for k in sizes], padding=3, fontsize=9)
    axes.set(xlabel="k, responses of a group", ylabel="groups")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)
    return figure


@styled
def rounds_figure(
    policies: Sequence[str], rewards: Sequence[Interval | None], mean_of_max: Sequence[float | None], *, label: str
) -> Any:
    """Held-out reward of each policy with its interval, and the mean of max of the candidates it was trained on.

    The paper expects the first to approach the second (arXiv 2304.05302).
    """
    figure = new_figure(WIDTH, 3.8)
    axes = figure.subplots()
    held_out = [(number, value) for number, value in enumerate(rewards) if value is not None]
    if held_out:
        numbers, values = [number for number, _ in held_out], [value for _, value in held_out]
        bounds = [value.low for value in values], [value.high for value in values]
        axes.fill_between(numbers, *bounds, color=HUES[0], alpha=0.14, linewidth=0)
        axes.plot(numbers, [value.mean for value in values], color=HUES[0], marker="o", label="held-out prompts")
    best = [(number, value) for number, value in enumerate(mean_of_max) if value is not None]
    if best:
        x, y = zip(*best, strict=True)
        axes.plot(x, y, color=HUES[1], marker="s", linestyle=(0, (4, 2)), label="best candidates")
    short = shortened(policies, 14)
    axes.set_xticks(range(len(policies)), [short[name] for name in policies])
    axes.tick_params(axis="x", rotation=45 if len(policies) > 6 else 0)
    axes.set(xlabel="policy", ylabel=f"reward by {label}")
    axes.margins(x=0.04)
    axes.legend()
    return figure


def _draw(axes: Any, curve: Curve, style: Style, *, faint: bool) -> None:
    if len(curve.values):
        window = smoothing_window(len(curve.values))
        if faint and window > 1:
            axes.plot(*_thinned(curve.steps, curve.values), color=style.color, alpha=0.22, linewidth=0.9)
        marker = "_" if len(curve.values) == 1 else ""
        smooth = _thinned(curve.steps, running_mean(curve.values, window))
        axes.plot(*smooth, color=style.color, linestyle=style.dashes, marker=marker, markersize=12)
    if len(curve.held_out_values):
        axes.plot(
            curve.held_out_steps,
            curve.held_out_values,
            color=style.color,
            marker=style.marker,
            markeredgecolor="white",
            markeredgewidth=0.8,
            linestyle="none",
            zorder=3,
        )


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Long lines by the means of equal stretches."""
    if len(values) <= _MOST_POINTS:
        return list(steps), list(values)
    x, y = (np.array_split(np.asarray(part, dtype=np.float64), _MOST_POINTS) for part in (steps, values))
    return [float(part.mean()) for part in x], [float(part.mean()) for part in y]
