"""The course of training as figures: every logged metric over the steps, log-probs by source, the k of the data.

Plain data in, matplotlib figures out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rrhf_peft.evaluate.plots.canvas import FONT_SIZE, INK, WIDE, WIDTH, dress, new_figure
from rrhf_peft.evaluate.plots.figures import plain_log_ticks
from rrhf_peft.evaluate.plots.labels import LineEnd, label_line_ends, shortened
from rrhf_peft.evaluate.plots.palette import HUES, Style, styles

#: More runs than this have no faint lines of single steps: nothing could be seen behind them.
_MOST_FAINT = 3
#: Points of a line; a plot has no more pixels to show them.
_MOST_POINTS = 400
#: Values so far apart need a logarithmic axis.
_DECADES_APART = 30.0


class Curve(NamedTuple):
    """One metric of one run: training values and held-out ones, each over their steps."""

    steps: Sequence[float]
    values: Sequence[float]
    held_out_steps: Sequence[float] = ()
    held_out_values: Sequence[float] = ()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, fewer at both ends."""
    half = window // 2
    return [float(np.mean(values[max(0, place - half) : place + half + 1])) for place in range(len(values))]


def smoothing_window(values: int) -> int:
    """How many steps a running mean takes: an odd number near a fifteenth of them all; 1 for short runs."""
    return 1 if values < 20 else max(3, values // 15) | 1


def curves_figure(panels: Mapping[str, Mapping[str, Curve]], look: Mapping[str, Style]) -> Any:
    """Metric -> run -> curve, a panel for each metric; dots are held-out values.

    A panel whose values are far apart, and all positive, has a logarithmic axis.
    """
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    rows = math.ceil(len(panels) / columns)
    runs = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    has_key = len(runs) > 1
    per_row = 4 if max(len(name) for name in runs) < 22 else 3
    figure = new_figure(WIDTH if columns == 1 else WIDE, 2.8 * rows + 0.3 + 0.2 * has_key * -(-len(runs) // per_row))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        dress(axes, title=title)
        for name, curve in panel.items():
            _draw(axes, curve, look[name], faint=len(runs) <= _MOST_FAINT)
        levels = [abs(float(np.median(curve.values))) for curve in panel.values() if len(curve.values)]
        if levels and min(levels) > 0 and max(levels) / min(levels) > _DECADES_APART and _is_positive(panel):
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        axes.margins(x=0.02)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
        elif place + columns >= len(panels):
            axes.set_xlabel("optimizer step", fontsize=FONT_SIZE, color=INK)
    if has_key:
        _key(figure, runs, look, per_row)
    return figure


def sources_figure(sources: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Any:
    """Source -> steps and mean log-prob per token of its responses, a named line each."""
    figure = new_figure(WIDTH, max(3.6, 1.2 + 0.19 * len(sources)))
    axes = figure.subplots()
    dress(axes, x="optimizer step", y="mean log-prob per token, nats")
    look, short = styles(list(sources)), shortened(list(sources), 24)
    ends = []
    for name, (steps, values) in sources.items():
        smooth = running_mean(values, smoothing_window(len(values)))
        x, y = _thinned(steps, smooth)
        axes.plot(x, y, color=look[name].color, linestyle=look[name].dashes, linewidth=1.7)
        ends.append(LineEnd(y[-1], short[name], look[name].color))
    axes.margins(x=0.02)
    label_line_ends(figure, axes, ends)
    return figure


def k_figure(histogram: Mapping[int, int]) -> Any:
    """Groups by their number of responses k."""
    figure = new_figure(WIDTH, 2.8)
    axes = figure.subplots()
    dress(axes, x="k, responses of a group", y="groups")
    sizes = sorted(histogram)
    axes.bar(sizes, [histogram[k] for k in sizes], color=HUES[0], width=0.7)
    if len(sizes) <= 16:
        axes.set_xticks(sizes)
        for k in sizes:
            axes.annotate(
                f"{histogram[k]:,}",
                (k, histogram[k]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=FONT_SIZE - 1,
                color=INK,
            )
    axes.margins(y=0.12)
    return figure


def _draw(axes: Any, curve: Curve, own: Style, *, faint: bool) -> None:
    if len(curve.values):
        window = smoothing_window(len(curve.values))
        if faint and window > 1:
            axes.plot(*_thinned(curve.steps, curve.values), color=own.color, alpha=0.22, linewidth=0.9)
        single = len(curve.values) == 1
        axes.plot(
            *_thinned(curve.steps, running_mean(curve.values, window)),
            color=own.color,
            linestyle=own.dashes,
            linewidth=1.8,
            marker="_" if single else "",
            markersize=12,
        )
    if len(curve.held_out_values):
        axes.plot(
            curve.held_out_steps,
            curve.held_out_values,
            color=own.color,
            marker=own.marker,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            linestyle="none",
            zorder=3,
        )


def _is_positive(panel: Mapping[str, Curve]) -> bool:
    return all(min([*curve.values, *curve.held_out_values], default=1.0) > 0 for curve in panel.values())


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Long lines by the means of equal stretches."""
    if len(values) <= _MOST_POINTS:
        return list(steps), list(values)
    x, y = (np.array_split(np.asarray(part, dtype=np.float64), _MOST_POINTS) for part in (steps, values))
    return [float(part.mean()) for part in x], [float(part.mean()) for part in y]


def _key(figure: Any, runs: Sequence[str], look: Mapping[str, Style], columns: int) -> None:
    from matplotlib.lines import Line2D

    short = shortened(runs, 40)
    handles = [
        Line2D([], [], color=look[name].color, linestyle=look[name].dashes, marker=look[name].marker, linewidth=1.8)
        for name in runs
    ]
    legend = figure.legend(
        handles,
        [short[name].replace("$", r"\$") for name in runs],
        loc="outside upper left",
        ncols=min(columns, len(runs)),
        frameon=False,
        fontsize=FONT_SIZE - 0.5,
        handlelength=2.6,
        alignment="left",
    )
    for text, name in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(short[name])
