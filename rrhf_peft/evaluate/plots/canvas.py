"""A figure's first and last moments: made without pyplot, a window or global state; turned into PNG or SVG bytes."""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

from rrhf_peft.records import UserError

#: Inches. The report shows a figure of this width in half of its own, and a wide one in all of it.
WIDTH, WIDE = 6.4, 13.0
FONT_SIZE = 10.0
INK, FAINT, GRID = "#222222", "#666666", "#dddddd"


def new_figure(width: float, height: float) -> Any:
    """An empty figure that arranges itself, with a canvas of its own.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise UserError(
            "drawing needs matplotlib, which is not installed. Install it with: pip install 'rrhf-peft[plots]'"
        ) from None
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Any, *, title: str = "", x: str = "", y: str = "", grid: Literal["x", "y", "both"] = "y") -> None:
    """The look that all plots share: two spines, a light grid behind the data, small grey ticks."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aaaaaa")
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=FONT_SIZE - 1, length=3)
    axes.set_xlabel(x, fontsize=FONT_SIZE, color=INK, parse_math=False)
    axes.set_ylabel(y, fontsize=FONT_SIZE, color=INK, parse_math=False)
    if title:
        axes.set_title(title, fontsize=FONT_SIZE + 1, color=INK, loc="left", parse_math=False, pad=8)


def figure_bytes(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes.

    Text in an SVG is drawn as outlines: it looks the same where the fonts are others.
    """
    import matplotlib

    content = io.BytesIO()
    settings = matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rrhf-peft"})
    with settings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script the font lacks
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
    return content.getvalue()
