"""All plots of an evaluation folder: which there are, and their files.

Left to others: how each looks (`figures`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rrhf_peft.evaluation.plots.canvas import figure_bytes
from rrhf_peft.evaluation.plots.figures import (
    best_of_figure,
    histogram_figure,
    plane_figure,
    reward_figure,
    wins_figure,
)
from rrhf_peft.evaluation.plots.folder import EvaluationFolder, read_evaluation
from rrhf_peft.evaluation.plots.palette import Style, styles
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
    if label is not None:
        rewards = evaluation.rewards(label)
        if rewards:
            yield Plot("reward", reward_figure(rewards, look, label=label), _said_rewards(evaluation, label))
        plane = {
            name: (own.perplexity, rewards[name].mean)
            for name, own in evaluation.policies.items()
            if name in rewards and own.perplexity is not None and 0 < own.perplexity < float("inf")
        }
        if plane:
            said = "; ".join(f"{name}: perplexity {x:.2f}, reward {y:.2f}" for name, (x, y) in plane.items())
            yield Plot(
                "reward_perplexity", plane_figure(plane, look, label=label), f"Mean reward against perplexity. {said}."
            )
        curves = evaluation.best_of_n(label)
        if curves:
            said = "; ".join(
                f"{name}: {', '.join(f'n={n} {one.mean:.2f}' for n, one in curve.items())}"
                for name, curve in curves.items()
            )
            yield Plot("best_of_n", best_of_figure(curves, look, label=label), f"Reward of the best of n. {said}.")
        scores = evaluation.response_scores(label)
        if scores:
            first = next(iter(scores))
            said = f"Histograms of the rewards of single responses by {label}: {', '.join(scores)}."
            over = f" Each is drawn over {first}." if len(scores) > 1 else ""
            yield Plot("reward_histogram", histogram_figure(scores, look, label=label), said + over)
    if evaluation.wins:
        said = "; ".join(
            f"{row.policy} against {row.against} by {row.by}: {row.win:g} won, {row.tie:g} tied, {row.lose:g} lost"
            for row in evaluation.wins
        )
        yield Plot("wins", wins_figure(evaluation.wins), f"Shares of prompts won, tied and lost. {said}.")


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


def _said_rewards(evaluation: EvaluationFolder, label: str) -> str:
    said = "; ".join(f"{name}: {interval}" for name, interval in evaluation.rewards(label).items())
    return f"Mean reward by {label} with its interval. {said}."


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
