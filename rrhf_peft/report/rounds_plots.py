"""Reward from round to round as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrhf_peft.evaluate.plots.canvas import FAINT, WIDTH, dress, new_figure
from rrhf_peft.evaluate.plots.labels import LineEnd, label_line_ends, shortened
from rrhf_peft.evaluate.plots.palette import HUES
from rrhf_peft.evaluate.reward import Interval

HELD_OUT, MEAN_OF_MAX = HUES[0], HUES[1]


def rounds_figure(
    policies: Sequence[str], rewards: Sequence[Interval | None], mean_of_max: Sequence[float | None], *, label: str
) -> Any:
    """Held-out reward of each policy with its interval, and the mean of max of the candidates it was trained on.

    The paper expects the first to approach the second (arXiv 2304.05302).
    """
    figure = new_figure(WIDTH, 3.8)
    axes = figure.subplots()
    dress(axes, x="policy", y=f"reward by {label}", grid="y")
    ends = []
    held_out = [(place, value) for place, value in enumerate(rewards) if value is not None]
    if held_out:
        places, means = [place for place, _ in held_out], [value.mean for _, value in held_out]
        axes.fill_between(
            places, [v.low for _, v in held_out], [v.high for _, v in held_out], color=HELD_OUT, alpha=0.14, linewidth=0
        )
        axes.plot(places, means, color=HELD_OUT, marker="o", linewidth=1.9)
        ends.append(LineEnd(means[-1], "held-out prompts", HELD_OUT))
    best = [(place, value) for place, value in enumerate(mean_of_max) if value is not None]
    if best:
        axes.plot(*zip(*best, strict=True), color=MEAN_OF_MAX, marker="s", linestyle=(0, (4, 2)), linewidth=1.6)
        ends.append(LineEnd(best[-1][1], "best candidates", MEAN_OF_MAX))
    short = shortened(policies, 14)
    axes.set_xticks(range(len(policies)), [short[name] for name in policies], parse_math=False)
    if len(policies) > 6:
        axes.tick_params(axis="x", rotation=45, labelcolor=FAINT)
    axes.margins(x=0.04)
    label_line_ends(figure, axes, ends)
    return figure
