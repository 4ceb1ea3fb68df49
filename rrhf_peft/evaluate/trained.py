"""What a policy's run folder tells: how it was trained, and what training took."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_peft.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class TrainedAs:
    """How a policy read prompts and held its weights in training.

    Attributes:
        template: as `data.template`.
        quantization, double_quant: as in `model`.
        max_prompt_tokens, max_tokens: as in `data`; None where training computes it group by group.
        stop: strings that ended its own answers in online training.
    """

    template: str
    quantization: str
    double_quant: bool
    max_prompt_tokens: int | None
    max_tokens: int
    stop: tuple[str, ...]


def trained_as(folder: str | None) -> TrainedAs | None:
    """Read from the recipe.yaml of a run folder, or of the run folder that a checkpoint lies in.

    No other parent's recipe says anything about an adapter, and none says whether a model's code may run.

    Returns:
        None where the folder is no run.

    Raises:
        UserError: the recipe is damaged.
    """
    recipe = _run_recipe(folder)
    if recipe is None or recipe.model is None or recipe.data is None:
        return None
    return TrainedAs(
        template=recipe.data.template,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_tokens=recipe.data.max_tokens,
        stop=tuple(recipe.online.stop) if recipe.online is not None else (),
    )


def training_of(folder: str | None) -> dict[str, Any] | None:
    """Seconds, peak memory, optimizer steps and objective of the run in a folder; None where there is no run.

    Of a run that was resumed, the seconds are those of its last session.
    """
    recipe = _run_recipe(folder)
    metrics = Path(folder or "").expanduser() / "metrics.jsonl"
    if recipe is None or not metrics.is_file():
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    closing = next((line for line in reversed(lines) if "train_runtime" in line), None)
    if closing is None:
        return None
    peaks = [line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line]
    return {
        "seconds": float(closing["train_runtime"]),
        "peak_memory_gib": float(max(peaks)) if peaks else None,
        "steps": int(closing["step"]),
        "objective": recipe.objective.name,
    }


def _run_recipe(folder: str | None) -> Recipe | None:
    if folder is None:
        return None
    path = Path(folder).expanduser()
    homes = [path, path.resolve().parent] if re.fullmatch(r"checkpoint-\d+", path.resolve().name) else [path]
    file = next((home / "recipe.yaml" for home in homes if (home / "recipe.yaml").is_file()), None)
    return None if file is None else load_recipe(file, needs=())
