"""Small ranked files and recipes over the tiny model, for runs that take seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rrhf_peft.recipe import Recipe, make_recipe

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sun",
    "ran",
    "sat",
    "sang",
    "fell",
    "über",
    "café",
    "naïve",
    "你好",
    "🙂",
    "and",
    "so",
]


def write_groups(path: Path, count: int, seed: int = 0) -> Path:
    """`count` groups of 2 to 5 responses with distinct texts, some ties, never all tied."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            k = draw.randint(2, 5)
            responses = [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 7))) for i in range(k)]
            scores = [float(draw.randrange(3)) for _ in range(k)]
            scores[0] = 3.0
            row = {
                "prompt": f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + ":",
                "responses": responses,
                "scores": scores,
                "sources": [f"writer-{i % 2}" for i in range(k)],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def small_recipe(folder: Path, train: Path, run: Path, /, **sections: dict[str, Any] | None) -> Recipe:
    """A recipe for the tiny model; keyword sections are merged over the defaults, empty ones replace them."""
    values: dict[str, Any] = {
        "model": {"name": str(folder)},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(train), "max_tokens": 128},
        "training": {
            "output_dir": str(run),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    for name, changes in sections.items():
        values[name] = {**(values.get(name) or {}), **changes} if changes else changes
    return make_recipe(values)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold a training loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]
