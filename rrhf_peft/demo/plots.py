"""The demo's picture: rewards before and after, and the course of training. Needs the extra `plots`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rrhf_peft.demo.comparison import Measured
from rrhf_peft.train.run_folder import METRICS, read_metrics

BEFORE, AFTER, TARGET = "#8c8c8c", "#1b7f5c", "#c2571a"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def smoothed(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred running mean; shorter at the ends."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def draw_rewards(axes: Any, before: Measured, after: Measured, mean_of_max: float) -> None:
    """Histogram of the rewards on held-out prompts, with means and the mean of the group maximum."""
    bins = np.linspace(-1, 1, 21)
    for measured, color, label in ((before, BEFORE, "base"), (after, AFTER, "after RRHF")):
        flat = [reward for own in measured.rewards for reward in own]
        weights = np.full(len(flat), 100 / len(flat))
        axes.hist(flat, bins=bins, weights=weights, color=color, alpha=0.6, label=f"{label}, mean {np.mean(flat):.2f}")
    axes.axvline(mean_of_max, color=TARGET, linestyle="--", label=f"mean of training groups' best {mean_of_max:.2f}")
    axes.set(xlabel="reward of a sample", ylabel="samples, %", title="Rewards on held-out prompts")
    axes.legend(loc="upper left", frameon=False)


def draw_training(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    """Ranking loss and fine-tuning loss against the step, with the pair accuracy on a second axis."""
    steps = [entry["step"] for entry in metrics]
    curves = (("rank_loss", TARGET, "ranking loss"), ("sft_loss", "#3b6ea8", "fine-tuning loss"))
    for name, color, label in curves:
        values = [entry[name] for entry in metrics]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(values), color=color, label=label)
    accuracy = axes.twinx()
    accuracy.plot(
        steps, smoothed([100 * entry["pair_accuracy"] for entry in metrics]), color=AFTER, label="right pairs"
    )
    accuracy.set(ylabel="pairs ordered right, %", ylim=(0, 100))
    axes.set(xlabel="optimizer step", ylabel="loss", title="Training", ylim=(0, None))
    lines = [*axes.get_lines()[1::2], *accuracy.get_lines()]
    axes.legend(
        lines, [line.get_label() for line in lines], loc="center right", bbox_to_anchor=(1, 0.36), frameon=False
    )


def save_figure(path: Path, before: Measured, after: Measured, mean_of_max: float, run_folder: Path) -> None:
    """Draw both panels into a PNG, without touching the caller's matplotlib state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_rewards(left, before, after, mean_of_max)
    steps = [entry for entry in read_metrics(run_folder / METRICS) if "loss" in entry]
    draw_training(right, steps)
    figure.savefig(path, dpi=120)
