"""The document's plots, PNG and SVG, from `results.json` alone. Needs the extra `plots`.

Left to others: the numbers (`reproduce_results`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from reproduce_claims import SETTINGS
from reproduce_document import SWEEP, TITLES

GREY, BLUE, GREEN, ORANGE, RED = "#8c8c8c", "#3b6ea5", "#1b7f5c", "#c2571a", "#a8324a"


def write_figures(results: dict[str, Any], folder: Path) -> None:
    """Draw every figure twice; the same numbers give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "rrhf-peft", "font.size": 10}):
        for name, (width, draw) in FIGURES.items():
            figure = Figure(figsize=(width, 4.2), layout="constrained")
            draw(figure, results)
            figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_frontier(figure: Figure, results: dict[str, Any]) -> None:
    """Reward against perplexity: the sweep as a line, the other rows as points."""
    axes, rows = figure.subplots(), results["rows"]
    axes.set(xscale="log", xlabel="perplexity of the text under the base")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    points = [_middle(rows[name]) for name in SWEEP]
    axes.plot(*zip(*points, strict=True), color=GREEN, marker="o", markersize=5, label="DP, by rank_weight")
    for (x, y), (name, weight) in zip(points, SWEEP.items(), strict=True):
        axes.scatter(rows[name]["perplexity"], rows[name]["reward"], s=9, color=GREEN, alpha=0.35, linewidths=0)
        left = x < 20  # where the line is steep, the weights stand beside it
        shift, side = ((-8, -3), "right") if left else ((0, 7), "center")
        axes.annotate(weight, (x, y), xytext=shift, textcoords="offset points", ha=side, color=GREEN, fontsize=9)
    others = {
        "base": (GREY, "o"),
        "best_of_4": (GREY, "^"),
        "sft": (BLUE, "s"),
        "without_ft": (RED, "v"),
        "variant_paper": (BLUE, "D"),
        "variant_released": (BLUE, "P"),
        "ip_3": (ORANGE, "*"),
        "op_8": (ORANGE, "X"),
        "op_8_kl": (ORANGE, "d"),
    }
    for name, (color, marker) in others.items():
        axes.scatter(*_middle(rows[name]), color=color, marker=marker, s=50, label=TITLES[name], zorder=3)
    axes.set(xlim=(7, None), ylabel="reward (VADER) on held-out prompts", title="Reward and perplexity")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def draw_mean_of_max(figure: Figure, results: dict[str, Any]) -> None:
    """What the candidates are worth, and what is learnt from them."""
    axes = figure.subplots()
    for place, name in enumerate(SETTINGS):
        own, learned = results["candidates"][name], results["rows"][name]["reward"]
        mean, best = np.mean(own["mean"]), np.mean(own["mean_of_max"])
        first = place == 0
        axes.plot([mean, best], [place, place], color=GREY, linewidth=2, zorder=1)
        axes.scatter(mean, place, color=GREY, s=45, label="mean of the candidates" if first else None)
        axes.scatter(best, place, color=ORANGE, s=45, label="mean of the groups' maximum" if first else None)
        axes.scatter(learned, [place] * len(learned), color=GREEN, s=12, alpha=0.5, linewidths=0, zorder=3)
        axes.scatter(
            np.mean(learned), place, color=GREEN, marker="D", s=45, label="learned" if first else None, zorder=3
        )
    axes.axvline(np.mean(results["rows"]["base"]["reward"]), color=GREY, linestyle=":", label="base")
    axes.set_yticks(range(len(SETTINGS)), [name.upper() for name in SETTINGS])
    axes.invert_yaxis()
    axes.set(xlabel="reward (VADER)", title="Is the mean of max what is learnt?")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def draw_iterations(figure: Figure, results: dict[str, Any]) -> None:
    """Reward, perplexity and diversity, round by round."""
    rounds = ["base", "ip_1", "ip_2", "ip_3"]
    panels = {"reward": "reward (VADER)", "perplexity": "perplexity under the base", "distinct_2": "distinct-2"}
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        by_seed = np.array([results["rows"][name][key] for name in rounds])
        axes.plot(range(4), by_seed, color=GREEN, alpha=0.35, linewidth=1)
        axes.plot(range(4), by_seed.mean(axis=1), color=GREEN, marker="o", linewidth=2)
        axes.set_xticks(range(4), ["base", "IP-1", "IP-2", "IP-3"])
        axes.set_ylim(0, None)
        axes.set_title(label)
        axes.grid(alpha=0.3)
    figure.suptitle("Round by round (thin lines: seeds)")


def draw_online(figure: Figure, results: dict[str, Any]) -> None:
    """The course of online training, with and without KL."""
    left, right = figure.subplots(1, 2)
    for name, color in (("op_8", ORANGE), ("op_8_kl", BLUE)):
        for axes, key in ((left, "reward"), (right, "kl")):
            by_seed = results["online"][name]
            for own in by_seed:
                axes.plot(own["step"], own[key], color=color, alpha=0.3, linewidth=1)
            mean = np.mean([own[key] for own in by_seed], axis=0)
            axes.plot(by_seed[0]["step"], mean, color=color, linewidth=2, label=TITLES[name])
    left.set(xlabel="optimizer step", ylabel="reward (VADER)", title="Reward of what the policy samples")
    right.set(xlabel="optimizer step", ylabel="nats per token", title="KL against the base")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False, loc="lower right")


FIGURES: dict[str, tuple[float, Callable[[Figure, dict[str, Any]], None]]] = {
    "frontier": (9.0, draw_frontier),
    "mean_of_max": (8.0, draw_mean_of_max),
    "iterations": (9.0, draw_iterations),
    "online": (9.0, draw_online),
}


def _middle(row: dict[str, Sequence[float]]) -> tuple[float, float]:
    """A row's point: perplexities are averaged as they are drawn, by their logarithm."""
    return float(np.exp(np.mean(np.log(row["perplexity"])))), float(np.mean(row["reward"]))
