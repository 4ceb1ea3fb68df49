"""Numbers as text: few digits, and a dash for what was not measured or is not a number."""

from __future__ import annotations

import math

from rrhf_peft.evaluate.statistics import Interval

MISSING = "–"


def is_number(value: object) -> bool:
    """Whether a value out of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | None, form: str = ".2f") -> str:
    """The number in a format, or a dash."""
    return format(value, form) if value is not None and math.isfinite(value) else MISSING


def estimate(value: Interval | None, form: str = ".2f") -> str:
    """Mean and interval: 0.72 [0.68, 0.76]."""
    if value is None or not math.isfinite(value.mean):
        return MISSING
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return format(value.mean, form)
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def duration(seconds: float | None) -> str:
    """28 s, 12 min, 3 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(gib: float | None) -> str:
    """0.7 GiB."""
    return MISSING if gib is None or not math.isfinite(gib) else f"{gib:.1f} GiB"


def count(value: int | None) -> str:
    """12,345."""
    return MISSING if value is None else f"{value:,}"
