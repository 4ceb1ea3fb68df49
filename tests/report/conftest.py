"""Folders to report on: a run that was trained here, and evaluations written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report.html_page import Page
from train.ranked_files import small_recipe, write_groups

from rrhf_peft.report.run import write_report
from rrhf_peft.train.run import train_recipe

#: What a model might say to whoever reads the report in a browser.
ATTACK = "<script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A real run of a few steps, with held-out data."""
    folder = tmp_path_factory.mktemp("report-run")
    train = write_groups(folder / "ranked.jsonl", 24)
    recipe = small_recipe(
        tiny_model_folder,
        train,
        folder / "tiny-run",
        data={"eval_size": 4},
        training={"num_train_epochs": 2, "logging_steps": 1, "eval_strategy": "epoch"},
    )
    train_recipe(recipe)
    return folder / "tiny-run"


def policy(mean: float | None = 0.5, label: str = "vader", **more: Any) -> dict[str, Any]:
    """One policy of evaluation.json; without a mean it was not rewarded."""
    values: dict[str, Any] = {"model": "tiny", "adapter": None, "responses": 12, "train": None}
    values |= {"rewards": {}, "best_of_n": {}, "perplexity": None, "reference_perplexity": None, "preference": None}
    if mean is not None:
        estimates = {str(n): {"mean": mean + 0.1 * n, "low": mean, "high": mean + 0.2 * n} for n in (1, 2)}
        values["rewards"] = {label: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
        values |= {"best_of_n": {label: estimates}, "perplexity": 10 + 10 * mean}
    return values | more


def write_evaluation(folder: Path, policies: dict[str, dict[str, Any]], **more: Any) -> Path:
    """Write an evaluation folder; `more` are further keys of evaluation.json.

    Policies with rewards have scored responses to six prompts; the first response of the fourth prompt attacks.
    """

    (folder / "scored").mkdir(parents=True)
    headline = next((label for own in policies.values() for label in own["rewards"]), None)
    for place, (policy_name, own) in enumerate(policies.items()):
        for label in own["rewards"]:
            rows = [
                {
                    "prompt": [{"role": "user", "content": f"Tell me {i} & more"}] if i % 2 else f"Story {i}:",
                    "responses": [f"{ATTACK} from {policy_name}" if i == 3 else f"{policy_name} {i}", "the end"],
                    "scores": [0.1 * i + 0.2 * place, 0.5],
                    "sources": [policy_name] * 2,
                }
                for i in range(6)
            ]
            path = folder / "scored" / f"{policy_name}.{label}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"version": 1, "settings": {}, "headline": headline, "policies": policies, "wins": [], **more}
    (folder / "evaluation.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Two policies, rewarded and compared."""
    return compared(tmp_path / "evaluation")


@pytest.fixture(scope="session")
def page(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report on an evaluation and a run."""
    folder = tmp_path_factory.mktemp("page")
    return Page(write_report([compared(folder / "evaluation"), trained_run], folder / "report.html"))


def compared(folder: Path) -> Path:
    """An evaluation of two policies, rewarded and compared."""
    won = {"policy": "after", "against": "base", "by": "vader", "win": 0.75, "tie": 0.0, "lose": 0.25, "prompts": 6}
    trained = {"seconds": 65.0, "peak_memory_gib": 1.25, "steps": 12, "objective": "rrhf"}
    return write_evaluation(folder, {"base": policy(0.1), "after": policy(0.7, train=trained)}, wins=[won])
