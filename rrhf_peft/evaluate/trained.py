"""What a policy's training took, read from its run folder, where it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def training_of(folder: str | None) -> dict[str, Any] | None:
    """Seconds, peak memory, optimizer steps and objective of the run in a folder; None where there is no run.

    Of a run that was resumed, the seconds are those of its last session.
    """
    if folder is None:
        return None
    metrics, recipe = Path(folder).expanduser() / "metrics.jsonl", Path(folder).expanduser() / "recipe.yaml"
    if not metrics.is_file() or not recipe.is_file():
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    closing = next((line for line in reversed(lines) if "train_runtime" in line), None)
    if closing is None:
        return None
    peaks = [line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line]
    objective = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("objective") or {}
    return {
        "seconds": float(closing["train_runtime"]),
        "peak_memory_gib": float(max(peaks)) if peaks else None,
        "steps": int(closing["step"]),
        "objective": str(objective.get("name", "rrhf")),
    }
