"""All plots of an evaluation folder: which there are, and their files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rrhf_peft.evaluate.plots.canvas import figure_bytes
from rrhf_peft.evaluate.plots.figures import (
    best_of_figure,
    histogram_figure,
    plane_figure,
    reward_figure,
    wins_figure,
)
from rrhf_peft.evaluate.plots.folder import EvaluationFolder, read_evaluation
from rrhf_peft.evaluate.plots.palette import Style, styles
from rrhf_peft.records import UserError

_KINDS: tuple[Literal["png", "svg"], ...] = ("png", "svg")


class Plot(NamedTuple):
    """A figure, the name of its files without their ending, and what it shows in words."""

    name: str
    figure: Any
    description: str


def evaluation_plots(evaluation: EvaluationFolder, look: Mapping[str, Style] | None = None) -> Iterator[Plot]:
    """The plots for which the folder holds numbers, by the headline scorer, one after the other.

    Raises:
        UserError: matplotlib is not installed, or a scored file is damaged.
    """
    names = list(evaluation.policies)
    look = look or styles(names, baseline=names[0])
    label = evaluation.headline
    drawn = [
        *([_reward_plot(evaluation, look, label)] if label is not None else []),
        _wins_plot(evaluation),
        *((draw(evaluation, look, label) for draw in _BY_LABEL) if label is not None else []),
    ]
    yield from (plot for plot in drawn if plot is not None)


def _reward_plot(evaluation: EvaluationFolder, look: Mapping[str, Style], label: str) -> Plot | None:
    rewards = evaluation.rewards(label)
    if not rewards:
        return None
    said = "; ".join(f"{name}: {interval.mean:.2f}" for name, interval in rewards.items())
    return Plot("reward", reward_figure(rewards, look, label=label), f"Mean reward by {label}. {said}.")


def _wins_plot(evaluation: EvaluationFolder) -> Plot | None:
    if not evaluation.wins:
        return None
    said = []
    for row in evaluation.wins:
        total = row.win + row.tie + row.lose
        shares = ", ".join(
            f"{value / total:.0%} {word}" for value, word in ((row.win, "won"), (row.tie, "tied"), (row.lose, "lost"))
        )
        said.append(f"{row.policy} against {row.against} by {row.by}: {shares}")
    return Plot("wins", wins_figure(evaluation.wins), f"Win, tie and lose. {'; '.join(said)}.")


def _plane_plot(evaluation: EvaluationFolder, look: Mapping[str, Style], label: str) -> Plot | None:
    rewards = evaluation.rewards(label)
    plane = {
        name: (own.perplexity, rewards[name].mean)
        for name, own in evaluation.policies.items()
        if name in rewards and own.perplexity is not None and 0 < own.perplexity < math.inf
    }
    if not plane:
        return None
    said = "; ".join(f"{name}: perplexity {x:.2f}, reward {y:.2f}" for name, (x, y) in plane.items())
    return Plot("reward_perplexity", plane_figure(plane, look, label=label), f"Mean reward against perplexity. {said}.")


def _best_of_plot(evaluation: EvaluationFolder, look: Mapping[str, Style], label: str) -> Plot | None:
    curves = evaluation.best_of_n(label)
    if not curves:
        return None
    said = "; ".join(
        f"{name}: {', '.join(f'n={n} {one.mean:.2f}' for n, one in curve.items())}" for name, curve in curves.items()
    )
    return Plot("best_of_n", best_of_figure(curves, look, label=label), f"Reward of the best of n. {said}.")


def _histogram_plot(evaluation: EvaluationFolder, look: Mapping[str, Style], label: str) -> Plot | None:
    scores = evaluation.response_scores(label)
    if not scores:
        return None
    said = f"Histograms of the rewards of single responses by {label}: {', '.join(scores)}."
    over = f" Each is drawn over {next(iter(scores))}." if len(scores) > 1 else ""
    return Plot("reward_histogram", histogram_figure(scores, look, label=label), said + over)


_BY_LABEL = (_plane_plot, _best_of_plot, _histogram_plot)


def write_plots(folder: Path) -> list[Path]:
    """Draw an evaluation folder's plots into its folder `plots`, each as PNG and as SVG.

    Plots of an earlier evaluation that this one has no numbers for are removed.

    Returns:
        The files written.

    Raises:
        UserError: matplotlib is not installed, evaluation.json or a scored file is missing or damaged, or the
            files cannot be written.
    """
    target = folder / "plots"
    written = []
    for plot in evaluation_plots(read_evaluation(folder)):
        for kind in _KINDS:
            path = target / f"{plot.name}.{kind}"
            _replace_bytes(path, figure_bytes(plot.figure, kind))
            written.append(path)
    for name in ("reward", "reward_perplexity", "best_of_n", "reward_histogram", "wins"):
        for kind in _KINDS:
            path = target / f"{name}.{kind}"
            if path not in written:
                path.unlink(missing_ok=True)
    return written


def _replace_bytes(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}). Choose a writable place.") from None
