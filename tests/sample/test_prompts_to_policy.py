"""From a list of prompts to a trained adapter with one recipe and three commands, on a real small model."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml
from reward_folders import train_sentiment_model
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.data import read_groups


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_one_recipe_samples_scores_and_trains(shared_data, tinystories, tmp_path, count):
    stories = json.loads((shared_data / "text" / "tinystories_1000.json").read_text(encoding="utf-8"))[:count]
    prompts = [" ".join(story.split()[:12]) for story in stories]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    assert train_sentiment_model(shared_data, tmp_path / "sst2", epochs=1) > 0.7

    decoding = {"k": 4, "temperature": 0.8, "max_new_tokens": 40}
    model_score = {"name": "reward_model", "model": str(tmp_path / "sst2"), "template": "response", "label": "positive"}
    vader = {"name": "rule", "function": "rrhf_peft.score:vader"}
    recipe = {
        "model": {"name": str(tinystories)},
        "sampling": {
            "prompts": str(tmp_path / "prompts.json"),
            "output": str(tmp_path / "candidates.jsonl"),
            "candidates": [{"strategy": "diverse_beam", **decoding}, {"strategy": "top_p", **decoding}],
        },
        "scoring": {
            "input": str(tmp_path / "candidates.jsonl"),
            "output": str(tmp_path / "scored.jsonl"),
            "scorer": {
                "name": "composite",
                "parts": {
                    "vader": {"scorer": vader, "normalize": "zscore"},
                    "sst2": {"scorer": model_score, "normalize": "zscore"},
                },
            },
        },
        "data": {"train": str(tmp_path / "scored.jsonl"), "max_tokens": 128},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 3,
            "learning_rate": 2e-3,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for verb in ("sample", "score", "train"):
        done = CliRunner().invoke(app, [verb, str(tmp_path / "recipe.yaml")])
        assert done.exit_code == 0, (verb, done.output)

    groups = read_groups(str(tmp_path / "scored.jsonl"))
    assert len(groups) > 0.85 * count  # this model ends some beginnings at once: one response, nothing to rank
    written = Counter(source.partition(":")[0] for group in groups for source in group.sources)
    assert set(written) == {"diverse_beam", "top_p"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["pair_accuracy"] for line in lines if "pair_accuracy" in line]
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:5]) / 5
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
