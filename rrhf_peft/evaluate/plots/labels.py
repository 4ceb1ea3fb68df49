"""Names beside what they name: shortened so that they stay different, and moved apart where they would touch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rrhf_peft.evaluate.plots.canvas import FONT_SIZE
from rrhf_peft.evaluate.plots.palette import ink


def shortened(names: Sequence[str], width: int = 26) -> dict[str, str]:
    """Name -> at most `width` characters of it; long ones lose their middle and all stay different."""
    short: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        if name in short:
            continue
        plain = " ".join(name.split()) or "(no name)"
        text, number = _without_middle(plain, width), 1
        while text in taken:
            number += 1
            text = f"{_without_middle(plain, width - len(str(number)) - 3)} ({number})"
        taken.add(text)
        short[name] = text
    return short


def _without_middle(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions nearest to `places`, in the same order, at least `gap` apart, between `low` and `high`.

    Where there is no room for all, they stay `gap` apart and run over `high`.
    """
    order = np.argsort(places, kind="stable")
    blocks: list[list[float]] = []  # mean and number of neighbours that were pushed together
    for rank, index in enumerate(order):
        blocks.append([places[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, first), (other, second) = blocks[-2:]
            blocks[-2:] = [[(one * first + other * second) / (first + second), first + second]]
    flat = [mean for mean, count in blocks for _ in range(int(count))]
    top = max(low, high - (len(order) - 1) * gap)
    moved = [0.0] * len(order)
    for rank, (index, place) in enumerate(zip(order, flat, strict=True)):
        moved[index] = min(max(place, low), top) + rank * gap
    return moved


#: Where the names of lines begin, as a share of the axes' width; the lines that lead to them need some room.
_BESIDE = 1.05


class LineEnd(NamedTuple):
    """The last point of a line, in data coordinates, with the text to stand beside it."""

    y: float
    text: str
    color: str


def label_line_ends(figure: Any, axes: Any, ends: Sequence[LineEnd]) -> None:
    """Write each line's name to the right of the axes at the height of its end, without overlaps."""
    from matplotlib.transforms import blended_transform_factory

    right = blended_transform_factory(axes.transAxes, axes.transData)
    texts = [
        axes.annotate(
            end.text,
            xy=(1.0, end.y),
            xycoords=right,
            xytext=(_BESIDE, end.y),
            textcoords=right,
            color=ink(end.color),
            fontsize=FONT_SIZE - 1,
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 1},
        )
        for end in ends
    ]
    figure.draw_without_rendering()  # only now is it known where the axes are
    box = axes.get_window_extent()
    heights = [axes.transData.transform((0, end.y))[1] for end in ends]
    gap = (FONT_SIZE + 1.5) * figure.dpi / 72
    for text, place in zip(texts, spread(heights, gap, box.y0, box.y1), strict=True):
        text.set_position((_BESIDE, axes.transData.inverted().transform((0, place))[1]))


def label_points(figure: Any, axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside points (x, y, text, colour), each on the side where it covers least."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    box = axes.get_window_extent()
    scale = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in centres]
    for (x, y, name, color), centre in zip(points, centres, strict=True):
        text = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            color=ink(color),
            fontsize=FONT_SIZE - 1,
            parse_math=False,
            annotation_clip=False,
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        best: tuple[float, tuple[float, float], tuple[float, float, float, float]] | None = None
        for distance in (8.0, 16.0, 26.0):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                left = distance * scale * dx + (0 if dx > 0 else -width if dx < 0 else -width / 2)
                low = distance * scale * dy * 0.8 + (0 if dy > 0 else -height if dy < 0 else -height / 2)
                x0, y0 = centre[0] + left, centre[1] + low
                own = (x0, y0, x0 + width, y0 + height)
                cost = sum(_overlap(own, other) for other in taken) + 4 * _outside(own, box) + distance * scale
                if best is None or cost < best[0]:
                    best = (cost, (left / scale, low / scale), own)
        assert best is not None
        text.set_position(best[1])
        taken.append(best[2])


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Area that two rectangles (x0, y0, x1, y1) share."""
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0.0, min(one[3], other[3]) - max(one[1], other[1])
    )


def _outside(own: tuple[float, float, float, float], box: Any) -> float:
    area = (own[2] - own[0]) * (own[3] - own[1])
    return area - _overlap(own, (box.x0, box.y0, box.x1, box.y1))
