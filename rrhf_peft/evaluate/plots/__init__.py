"""Plots of an evaluation: plain data in, matplotlib figures out, and all of a folder's plots as files."""

from rrhf_peft.evaluate.plots.canvas import figure_bytes
from rrhf_peft.evaluate.plots.figures import (
    best_of_figure,
    histogram_figure,
    plane_figure,
    reward_figure,
    wins_figure,
)
from rrhf_peft.evaluate.plots.folder import EvaluationFolder, WinRow, joined, read_evaluation
from rrhf_peft.evaluate.plots.palette import Style, styles
from rrhf_peft.evaluate.plots.writing import Plot, evaluation_plots, write_plots

__all__ = [
    "EvaluationFolder",
    "Plot",
    "Style",
    "WinRow",
    "best_of_figure",
    "evaluation_plots",
    "figure_bytes",
    "histogram_figure",
    "joined",
    "plane_figure",
    "read_evaluation",
    "reward_figure",
    "styles",
    "wins_figure",
    "write_plots",
]
