"""The look of all plots and how they become files: matplotlib without pyplot, a window or global state.

A drawing function is decorated with `styled`, makes its figure with `new_figure`, and gives a policy, run or source the
`Style` that it has in every other plot.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from rrhf_peft.records import UserError

P = ParamSpec("P")
T = TypeVar("T")

#: Inches. The report shows a figure of this width in half of its own, and a wide one in all of it.
WIDTH, WIDE = 6.4, 13.0
#: The policy that the others are compared with, and everybody else's hues, markers and lines.
BASELINE = "#6b6b6b"
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_STYLE_FILE = Path(__file__).with_name("plots.mplstyle")


class Style(NamedTuple):
    """How one policy, run or source is drawn: a hex colour, a matplotlib marker and a matplotlib line style."""

    color: str
    marker: str
    dashes: Any


def styles(names: Sequence[str], *, baseline: str | None = None) -> dict[str, Style]:
    """Name -> style, by position; `baseline` is grey and takes no hue from the others.

    Marker and dashes change with every hue, so that no two of twenty look alike, also without colour vision.
    """
    chosen: dict[str, Style] = {}
    for name in dict.fromkeys(names):
        number = len(chosen) - (baseline in chosen)
        chosen[name] = (
            Style(BASELINE, "o", "-")
            if name == baseline
            else Style(
                HUES[number % len(HUES)],
                MARKERS[number % len(MARKERS)],
                DASHES[number // len(HUES) % len(DASHES)],
            )
        )
    return chosen


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw in the style of `plots.mplstyle`, whatever the caller's matplotlib is set to.

    Raises:
        UserError: matplotlib is not installed.
    """

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            import matplotlib.style
        except ImportError:
            raise UserError(
                "drawing needs matplotlib, which is not installed. Install it with: pip install 'rrhf-peft[plots]'"
            ) from None
        with matplotlib.style.context(_STYLE_FILE):
            return draw(*arguments, **keywords)

    return drawn


@styled
def new_figure(width: float = WIDTH, height: float = 4.0) -> Any:
    """An empty matplotlib Figure of this size in inches, which arranges itself and has a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


@styled
def figure_bytes(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes.

    Text in an SVG is drawn as outlines: it looks the same where the fonts are others.
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script the font lacks
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()


def shortened(names: Sequence[str], width: int = 26) -> dict[str, str]:
    """Name -> at most `width` characters of it; long ones lose their middle and all stay different."""
    short: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = " ".join(name.split()) or "(no name)"
        text, number = _without_middle(plain, width), 1
        while text in short.values():
            number += 1
            text = f"{_without_middle(plain, width - len(str(number)) - 3)} ({number})"
        short[name] = text
    return short


def _without_middle(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, fewer at both ends."""
    half = window // 2
    parts = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [math.fsum(part) / len(part) for part in parts]


def log_scale_if_wide(axis: Any, values: Sequence[float], ratio: float) -> None:
    """Give an axis a logarithmic scale, labelled 10, 20, 50, where positive values lie further apart than `ratio`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    known = [value for value in values if math.isfinite(value)]
    if not known or min(known) <= 0 or max(known) / min(known) <= ratio:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
