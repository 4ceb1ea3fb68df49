"""The plots of an evaluation, each as PNG and SVG: reward, reward against perplexity, best of n, histograms, wins.

Every builder takes its policies in the order of the table, and `look`, their styles (`plotting.styles`). Values that
are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rrhf_peft.evaluate.folder import PLOT_NAMES, PLOTS
from rrhf_peft.evaluate.numbers import Evaluation, WinRow
from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.files import replace_text
from rrhf_peft.plotting import (
    WIDE,
    WIDTH,
    Style,
    figure_bytes,
    log_scale_if_wide,
    new_figure,
    shortened,
    styled,
    styles,
)

_KINDS: tuple[Literal["png", "svg"], ...] = ("png", "svg")
_WIN, _TIE, _LOSE = "#0072b2", "#c9c9c9", "#d55e00"


class Plot(NamedTuple):
    """A figure, the name of its files without their ending, and what it shows in words."""

    name: str
    figure: Any
    description: str


def write_plots(evaluation: Evaluation) -> list[Path]:
    """Draw an evaluation's plots into the folder `plots` of its folder, each as PNG and as SVG.

    Plots of an earlier evaluation that this one has no numbers for are removed.

    Returns:
        The files written.

    Raises:
        UserError: matplotlib is not installed, a scored file is damaged, or the files cannot be written.
    """
    written = []
    for plot in evaluation_plots(evaluation):
        for kind in _KINDS:
            path = evaluation.folder / PLOTS / f"{plot.name}.{kind}"
            replace_text(path, figure_bytes(plot.figure, kind))
            written.append(path)
    for name in PLOT_NAMES:
        for path in (evaluation.folder / PLOTS / f"{name}.{kind}" for kind in _KINDS):
            if path not in written:
                path.unlink(missing_ok=True)
    return written


def evaluation_plots(evaluation: Evaluation, look: Mapping[str, Style] | None = None) -> Iterator[Plot]:
    """The plots for which the folder holds numbers, by the headline scorer, one after the other.

    Raises:
        UserError: matplotlib is not installed, or a scored file is damaged.
    """
    numbers = evaluation.numbers
    names, label = list(numbers.policies), numbers.headline
    look = look or styles(names, baseline=names[0])
    rewards = evaluation.rewards(label) if label is not None else {}
    if label is not None and rewards:
        said = "; ".join(f"{name}: {interval.mean:.2f}" for name, interval in rewards.items())
        yield Plot("reward", reward_figure(rewards, look, label=label), f"Mean reward by {label}. {said}.")
    if wins := [row for row in numbers.wins if any(row.shares)]:
        yield Plot("wins", wins_figure(wins), f"Win, tie and lose. {_wins_said(wins)}.")
    if label is None:
        return
    plane = {
        name: (policy.perplexity, rewards[name].mean)
        for name, policy in numbers.policies.items()
        if name in rewards and policy.perplexity is not None and 0 < policy.perplexity < math.inf
    }
    if plane:
        said = "; ".join(f"{name}: perplexity {x:.2f}, reward {y:.2f}" for name, (x, y) in plane.items())
        figure = plane_figure(plane, look, label=label)
        yield Plot("reward_perplexity", figure, f"Mean reward against perplexity. {said}.")
    if curves := evaluation.best_of_n(label):
        said = "; ".join(
            f"{name}: {', '.join(f'n={n} {one.mean:.2f}' for n, one in curve.items())}"
            for name, curve in curves.items()
        )
        yield Plot("best_of_n", best_of_figure(curves, look, label=label), f"Reward of the best of n. {said}.")
    if scores := evaluation.response_scores(label):
        said = f"Histograms of the rewards of single responses by {label}: {', '.join(scores)}."
        over = f" Each is drawn over {next(iter(scores))}." if len(scores) > 1 else ""
        yield Plot("reward_histogram", histogram_figure(scores, look, label=label), said + over)


def _wins_said(rows: Sequence[WinRow]) -> str:
    said = []
    for row in rows:
        shares = ", ".join(
            f"{share:.0%} {word}" for share, word in zip(row.shares, ("won", "tied", "lost"), strict=True)
        )
        said.append(f"{row.policy} against {row.against} by {row.by}: {shares}")
    return "; ".join(said)


@styled
def reward_figure(rewards: Mapping[str, Interval], look: Mapping[str, Style], *, label: str) -> Any:
    """Mean reward of each policy with its interval, one row each; `label` is the scorer's."""
    figure = new_figure(WIDTH, 1.25 + 0.34 * max(2, len(rewards)))
    axes = figure.subplots()
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    for row, (name, value) in enumerate(rewards.items()):
        color, marker, _ = look[name]
        high = value.high if math.isfinite(value.high) else value.mean
        low = value.low if math.isfinite(value.low) else value.mean
        axes.plot([low, high], [row, row], color=color, linewidth=2.5, solid_capstyle="round")
        axes.plot([value.mean], [row], marker=marker, color=color, markersize=7)
        axes.annotate(
            f"{value.mean:.2f}", (high, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9
        )
    _name_rows(axes, list(rewards))
    axes.set(title="Mean reward", xlabel=f"mean reward by {label}")
    axes.margins(x=0.12)
    return figure


@styled
def plane_figure(points: Mapping[str, tuple[float, float]], look: Mapping[str, Style], *, label: str) -> Any:
    """Mean reward against the perplexity of the generated text: up is better rewarded, left more fluent."""
    figure = new_figure(WIDTH, max(4.0, 1.2 + 0.2 * len(points)))
    axes = figure.subplots()
    axes.grid(visible=True, axis="both")
    short = shortened(list(points), 26)
    for name, (perplexity, reward) in points.items():
        color, marker, _ = look[name]
        axes.plot([perplexity], [reward], marker=marker, color=color, markersize=8, linestyle="none", label=short[name])
    log_scale_if_wide(axes.xaxis, [perplexity for perplexity, _ in points.values()], 8)
    axes.margins(0.12)
    axes.set(
        title="Reward against perplexity",
        xlabel="perplexity of the generated text (lower: more fluent)",
        ylabel=f"mean reward by {label}",
    )
    figure.legend(loc="outside right upper")
    return figure


@styled
def best_of_figure(curves: Mapping[str, Mapping[int, Interval]], look: Mapping[str, Style], *, label: str) -> Any:
    """Mean over prompts of the best of n responses' reward, against n; bands where they are few enough to read."""
    figure = new_figure(WIDTH, max(4.0, 1.2 + 0.2 * len(curves)))
    axes = figure.subplots()
    axes.grid(visible=True, axis="both")
    sizes = sorted({n for curve in curves.values() for n in curve})
    short = shortened(list(curves), 22)
    for name, curve in curves.items():
        color, marker, dashes = look[name]
        drawn = sorted(curve)
        means = [curve[n].mean for n in drawn]
        axes.plot(drawn, means, color=color, linestyle=dashes, marker=marker, markersize=5, label=short[name])
        if len(curves) <= 4:
            bounds = [curve[n].low for n in drawn], [curve[n].high for n in drawn]
            axes.fill_between(drawn, *bounds, color=color, alpha=0.13, linewidth=0)
    if len(sizes) > 1 and sizes[-1] / max(1, sizes[0]) > 6:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set(title="Best of n", xlabel="n, responses to choose from", ylabel=f"reward of the best by {label}")
    figure.legend(loc="outside right upper")
    return figure


@styled
def histogram_figure(
    scores: Mapping[str, Sequence[float]], look: Mapping[str, Style], *, label: str, bins: int = 24
) -> Any:
    """The rewards of each policy's responses over those of the first policy, a panel each; lines at the means.

    Shares are of the policy's own responses, so that numbers of responses may differ.
    """
    finite = {name: np.array([value for value in values if math.isfinite(value)]) for name, values in scores.items()}
    names, pooled = list(finite), np.concatenate(list(finite.values()))
    edges = np.linspace(pooled.min(), pooled.max() if np.ptp(pooled) > 0 else pooled.min() + 1, bins + 1)
    shown = names[1:] or names
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(WIDTH if columns == 1 else WIDE, 3.8 if rows == 1 else 2.8 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    short = shortened(names, 30)
    for index, axes in enumerate(panels.flat):
        if index >= len(shown):
            axes.set_visible(False)
            continue
        for name, alpha in {names[0]: 0.35, shown[index]: 0.55}.items():
            values, color = finite[name], look[name].color
            shares = 100 * np.histogram(values, edges)[0] / len(values)
            said = f"{short[name]}, mean {values.mean():.2f}"
            axes.stairs(shares, edges, fill=True, color=color, alpha=alpha, linewidth=0, label=said)
            axes.stairs(shares, edges, color=color, linewidth=1.2)
            axes.axvline(values.mean(), color=color, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        axes.set_ylabel("responses, %" if index % columns == 0 else "")
        if index + columns >= len(shown):
            axes.set_xlabel(f"reward by {label}")
            axes.tick_params(labelbottom=True)
    return figure


@styled
def wins_figure(rows: Sequence[WinRow]) -> Any:
    """Shares of answer pairs won, tied and lost, a bar per comparison."""
    figure = new_figure(WIDTH, 1.5 + 0.4 * len(rows))
    axes = figure.subplots()
    axes.grid(visible=False)
    left = np.zeros(len(rows))
    parts = (("win", _WIN, "white"), ("tie", _TIE, "black"), ("lose", _LOSE, "white"))
    for (key, color, ink), percent in zip(parts, 100 * np.array([row.shares for row in rows]).T, strict=True):
        bars = axes.barh(range(len(rows)), percent, left=left, color=color, height=0.62, label=key)
        axes.bar_label(
            bars, [f"{one:.0f}" if one >= 6 else "" for one in percent], label_type="center", color=ink, fontsize=9
        )
        left += percent
    against, judges = {row.against for row in rows}, {row.by for row in rows}
    _name_rows(
        axes,
        [
            row.policy + (f" v. {row.against}" if len(against) > 1 else "") + (f", {row.by}" if len(judges) > 1 else "")
            for row in rows
        ],
    )
    title = "Win, tie, lose"
    if len(against) == 1:
        title += f" against {shortened(list(against), 30)[rows[0].against]}"
    axes.set(xlim=(0, 100), xlabel="share of answer pairs, %")
    axes.set_title(title, pad=24)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1)
    return figure


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    short = shortened(names, 30)
    axes.set_yticks(range(len(names)), [short[name] for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
