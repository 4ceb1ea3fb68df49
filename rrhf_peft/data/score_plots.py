"""A picture of ranked groups: the scores of each source, and score against length."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rrhf_peft.data.ranked_statistics import ranked_statistics
from rrhf_peft.records import RankedGroup, UserError

#: Sources with a box of their own; in the order of the statistics, the best mean of max first.
_SOURCES_DRAWN = 24
#: Points drawn against length; more hide each other. Evenly spaced over the data.
_POINTS_DRAWN = 5000


def plot_scores(groups: Sequence[RankedGroup], path: str | os.PathLike[str]) -> None:
    """Draw the groups' scores and write the picture; the ending of `path` names its type (.png, .pdf, .svg).

    Left: a box per source (quartiles, whiskers to 1.5 of their range, a dot at the mean, a grey number of
    responses). Right: every response's score against its length in characters, with the mean score of ten
    equally filled ranges of length.

    Raises:
        UserError: matplotlib is not installed, there is no response, or `path` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "drawing needs matplotlib, which is not installed. Install it with: pip install 'rrhf-peft[plots]'"
        ) from None
    path = Path(path)
    statistics = ranked_statistics(groups)
    names = list(statistics.sources)[:_SOURCES_DRAWN]
    figure = Figure(figsize=(12, max(4.5, 1.6 + 0.3 * len(names))), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in canvas.get_supported_filetypes():
        known = ", ".join(f".{name}" for name in sorted(canvas.get_supported_filetypes()))
        raise UserError(f"{path}: cannot tell what kind of picture this is to be. Known endings: {known}.")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_sources(left, groups, names, len(statistics.sources))
    _draw_lengths(right, groups, statistics.length_correlation)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=120, format=kind)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}). Choose a writable place.") from None


def _draw_sources(axes: Any, groups: Sequence[RankedGroup], names: list[str], total: int) -> None:
    scores: dict[str, list[float]] = {name: [] for name in names}
    for group in groups:
        for source, score in zip(group.sources, group.known_scores, strict=True):
            if source in scores:
                scores[source].append(score)
    axes.boxplot(
        list(scores.values()),
        orientation="horizontal",
        showmeans=True,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "#dbe7f3", "edgecolor": "#3b6ea5"},
        medianprops={"color": "#1f3f63", "linewidth": 2},
        meanprops={"marker": "o", "markerfacecolor": "#c8553d", "markeredgecolor": "none", "markersize": 5},
        whiskerprops={"color": "#3b6ea5"},
        capprops={"color": "#3b6ea5"},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "#3b6ea5", "alpha": 0.3},
    )
    labels = [_plain(name) + f"  ({len(own):,})" for name, own in scores.items()]
    axes.set_yticks(range(1, len(names) + 1), labels, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("score")
    shown = f"the best {len(names)} of {total:,} sources" if total > len(names) else "each source"
    axes.set_title(f"Scores of {shown}: quartiles, mean as a dot")
    axes.grid(axis="x", alpha=0.3)


def _draw_lengths(axes: Any, groups: Sequence[RankedGroup], correlation: float | None) -> None:
    lengths = np.array([len(response) for group in groups for response in group.responses])
    scores = np.array([score for group in groups for score in group.known_scores])
    drawn = np.unique(np.linspace(0, len(scores) - 1, min(len(scores), _POINTS_DRAWN)).astype(int))
    axes.scatter(lengths[drawn], scores[drawn], s=8, alpha=0.25, color="#3b6ea5", edgecolors="none")
    parts = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 10) if len(part)]
    middles = [(np.median(lengths[part]), np.mean(scores[part])) for part in parts]
    axes.plot(*zip(*middles, strict=True), color="#c8553d", marker="o", markersize=4)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("characters")
    axes.set_ylabel("score")
    within = "undefined" if correlation is None else f"{correlation:+.2f}"
    axes.set_title(f"Score by length, mean as a line\n(rank correlation in groups {within})")
    axes.grid(alpha=0.3)


def _plain(name: str) -> str:
    """A source's name short enough to stand beside its box."""
    return name if len(name) <= 32 else name[:31] + "…"
