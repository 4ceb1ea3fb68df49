"""The plots of an evaluation, one builder each: plain data in, a matplotlib Figure out.

Every builder takes its policies in the order of the table, and `look`, their styles (`palette.styles`).
Values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rrhf_peft.evaluate.plots.canvas import FONT_SIZE, INK, WIDE, WIDTH, dress, new_figure
from rrhf_peft.evaluate.plots.folder import WinRow
from rrhf_peft.evaluate.plots.labels import LineEnd, label_line_ends, label_points, shortened
from rrhf_peft.evaluate.plots.palette import LOSE, TIE, WIN, Style, ink
from rrhf_peft.evaluate.reward import Interval

#: With more policies than this, points carry numbers and the names stand in a key beside the plot.
_MOST_NAMED_POINTS = 8


def reward_figure(rewards: Mapping[str, Interval], look: Mapping[str, Style], *, label: str) -> Any:
    """Mean reward of each policy with its interval, one row each; `label` is the scorer's."""
    figure = new_figure(WIDTH, 1.25 + 0.34 * max(2, len(rewards)))
    axes = figure.subplots()
    dress(axes, title="Mean reward", x=f"mean reward by {label}", grid="x")
    for row, (name, value) in enumerate(rewards.items()):
        own = look[name]
        if math.isfinite(value.low) and math.isfinite(value.high):
            axes.plot([value.low, value.high], [row, row], color=own.color, linewidth=2.5, solid_capstyle="round")
        axes.plot([value.mean], [row], marker=own.marker, color=own.color, markersize=7, linestyle="none")
        end = value.high if math.isfinite(value.high) else value.mean
        axes.annotate(
            f"{value.mean:.2f}",
            (max(end, value.mean), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=FONT_SIZE - 1,
            color=ink(own.color),
        )
    _name_rows(axes, list(rewards))
    axes.margins(x=0.12)
    return figure


def plane_figure(points: Mapping[str, tuple[float, float]], look: Mapping[str, Style], *, label: str) -> Any:
    """Mean reward against the perplexity of the generated text: up is better rewarded, left more fluent."""
    many = len(points) > _MOST_NAMED_POINTS
    figure = new_figure(WIDTH, max(4.2, 1.0 + 0.2 * len(points)) if many else 4.2)
    axes = figure.subplots()
    dress(
        axes,
        title="Reward against perplexity",
        x="perplexity of the generated text (lower: more fluent)",
        y=f"mean reward by {label}",
        grid="both",
    )
    values = [perplexity for perplexity, _ in points.values()]
    if values and min(values) > 0 and max(values) / min(values) > 8:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    for name, (perplexity, reward) in points.items():
        own = look[name]
        axes.plot([perplexity], [reward], marker=own.marker, color=own.color, markersize=8, linestyle="none")
    axes.margins(0.16)
    short = shortened(list(points), 30 if many else 26)
    texts = {name: str(number) if many else short[name] for number, name in enumerate(points, 1)}
    if many:
        for number, name in enumerate(points, 1):
            axes.annotate(
                f"{number}  {short[name]}",
                (1.03, 1 - (number - 0.5) / len(points)),
                xycoords="axes fraction",
                va="center",
                fontsize=FONT_SIZE - 1.5,
                color=ink(look[name].color),
                annotation_clip=False,
                parse_math=False,
            )
    label_points(figure, axes, [(*points[name], texts[name], look[name].color) for name in points])
    return figure


def best_of_figure(curves: Mapping[str, Mapping[int, Interval]], look: Mapping[str, Style], *, label: str) -> Any:
    """Mean over prompts of the best of n responses' reward, against n; bands where they are few enough to read."""
    figure = new_figure(WIDTH, max(4.0, 1.1 + 0.2 * len(curves)))
    axes = figure.subplots()
    dress(axes, title="Best of n", x="n, responses to choose from", y=f"reward of the best by {label}", grid="both")
    sizes = sorted({n for curve in curves.values() for n in curve})
    short = shortened(list(curves), 22)
    ends = []
    for name, curve in curves.items():
        own, places = look[name], sorted(curve)
        means = [curve[n].mean for n in places]
        axes.plot(places, means, color=own.color, linestyle=own.dashes, marker=own.marker, markersize=5, linewidth=1.8)
        if len(curves) <= 4:
            low, high = [curve[n].low for n in places], [curve[n].high for n in places]
            axes.fill_between(places, low, high, color=own.color, alpha=0.13, linewidth=0)
        ends.append(LineEnd(means[-1], short[name], own.color))
    if len(sizes) > 1 and sizes[-1] / max(1, sizes[0]) > 6:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(sizes, [str(n) for n in sizes])
    label_line_ends(figure, axes, ends)
    return figure


def histogram_figure(
    scores: Mapping[str, Sequence[float]], look: Mapping[str, Style], *, label: str, bins: int = 24
) -> Any:
    """The rewards of each policy's responses over those of the first policy, a panel each; lines at the means.

    Shares are of the policy's own responses, so that numbers of responses may differ.
    """
    names = list(scores)
    clean = {name: _finite(scores[name]) for name in names}
    pooled = np.concatenate(list(clean.values()))
    edges = np.linspace(pooled.min(), pooled.max() if np.ptp(pooled) > 0 else pooled.min() + 1, bins + 1)
    shown = names[1:] or names
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    width = WIDTH if columns == 1 else WIDE
    figure = new_figure(width, 3.8 if rows == 1 else 2.8 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    short = shortened(names, 30)
    for place, axes in enumerate(panels.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        dress(axes)
        name = shown[place]
        if name != names[0]:
            _histogram(axes, clean[names[0]], edges, look[names[0]].color, 0.35, short[names[0]], 1)
        _histogram(axes, clean[name], edges, look[name].color, 0.55, short[name], 0)
        if place % columns == 0:
            axes.set_ylabel("responses, %", fontsize=FONT_SIZE)
        if place + columns >= len(shown):
            axes.set_xlabel(f"reward by {label}", fontsize=FONT_SIZE, parse_math=False)
            axes.tick_params(labelbottom=True)
    return figure


def wins_figure(rows: Sequence[WinRow]) -> Any:
    """Shares of answer pairs won, tied and lost, a bar per comparison."""
    figure = new_figure(WIDTH, 1.5 + 0.4 * len(rows))
    axes = figure.subplots()
    against, judges = {row.against for row in rows}, {row.by for row in rows}
    dress(axes, x="share of answer pairs, %", grid="x")
    for place, row in enumerate(rows):
        total = row.win + row.tie + row.lose
        left = 0.0
        for share, color, text_color in ((row.win, WIN, "white"), (row.tie, TIE, INK), (row.lose, LOSE, "white")):
            percent = 100 * share / total
            axes.barh(place, percent, left=left, color=color, height=0.62)
            if percent >= 6:
                axes.text(
                    left + percent / 2,
                    place,
                    f"{percent:.0f}",
                    ha="center",
                    va="center",
                    color=text_color,
                    fontsize=FONT_SIZE,
                )
            left += percent
    _name_rows(
        axes,
        [
            row.policy + (f" v. {row.against}" if len(against) > 1 else "") + (f", {row.by}" if len(judges) > 1 else "")
            for row in rows
        ],
    )
    axes.set_xlim(0, 100)
    title = "Win, tie, lose" + (
        f" against {shortened(list(against), 30)[rows[0].against]}" if len(against) == 1 else ""
    )
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 1, color=INK, parse_math=False, pad=22)
    for x, text, color in ((0.0, "■ win", WIN), (0.13, "■ tie", ink(TIE)), (0.24, "■ lose", LOSE)):
        axes.annotate(
            text,
            (x, 1.0),
            xycoords="axes fraction",
            xytext=(0, 5),
            textcoords="offset points",
            color=color,
            fontsize=FONT_SIZE - 0.5,
        )
    return figure


def plain_log_ticks(axis: Any) -> None:
    """10, 20, 50 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    short = shortened(names, 30)
    axes.set_yticks(range(len(names)), [short[name] for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _histogram(
    axes: Any, values: np.ndarray, edges: np.ndarray, color: str, alpha: float, name: str, line: int
) -> None:
    shares = 100 * np.histogram(values, edges)[0] / len(values)
    axes.stairs(shares, edges, fill=True, color=color, alpha=alpha, linewidth=0)
    axes.stairs(shares, edges, color=color, linewidth=1.2)
    axes.axvline(values.mean(), color=color, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.annotate(
        f"{name}, mean {values.mean():.2f}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6 + 14 * line),
        textcoords="offset points",
        va="bottom",
        color=ink(color),
        fontsize=FONT_SIZE - 1,
        parse_math=False,
    )


def _finite(values: Sequence[float]) -> np.ndarray:
    own = np.asarray(values, dtype=np.float64)
    return own[np.isfinite(own)]
