"""Which colour, marker and line a policy has, the same in every plot; readable without colour vision.

Hues are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), without the yellow that white
paper swallows. Marker and dashes change with every hue, so that no two of twenty policies look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

#: The policy that the others are compared with.
BASELINE = "#6b6b6b"
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))

WIN, TIE, LOSE = "#0072b2", "#c9c9c9", "#d55e00"


class Style(NamedTuple):
    """How one policy is drawn: a hex colour, a matplotlib marker and a matplotlib line style."""

    color: str
    marker: str
    dashes: Any


def styles(names: Sequence[str], *, baseline: str | None = None) -> dict[str, Style]:
    """Name -> style, by position; `baseline` is grey and takes no hue from the others."""
    found: dict[str, Style] = {}
    for name in names:
        if name in found:
            continue
        place = len(found) - (baseline in found)
        hue = BASELINE if name == baseline else HUES[place % len(HUES)]
        marker = "o" if name == baseline else MARKERS[place % len(MARKERS)]
        found[name] = Style(hue, marker, "-" if name == baseline else DASHES[place // len(HUES) % len(DASHES)])
    return found


def ink(color: str) -> str:
    """A hex colour darkened until small text in it reads on white: contrast 4.5, as WCAG 2 asks (1.4.3)."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    while 1.05 / (_luminance(channels) + 0.05) < 4.5:
        channels = [0.95 * channel for channel in channels]
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _luminance(channels: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
