"""A folder as the recipes and the pages of the documentation expect one, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from house.recipe_checks import ROOT
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder in which the hub ids of recipes, and the files that headers speak of, are."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("Qwen/Qwen2.5-7B-Instruct", "huggyllama/llama-7b", "path/to/alpaca-7b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny_model_folder, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder / "Qwen/Qwen2.5-7B-Instruct")
    rows = [
        {"prompt": f"Question {n}?", "responses": ["Yes.", "No, not at all.", "Maybe."], "scores": [2, 0, 1]}
        for n in range(8)
    ]
    (folder / "my_ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"chosen": f"\n\nHuman: {n}?\n\nAssistant: Yes.", "rejected": f"\n\nHuman: {n}?\n\nAssistant: No."}
        for n in range(8)
    ]
    (folder / "Anthropic" / "hh-rlhf").mkdir(parents=True)
    (folder / "Anthropic/hh-rlhf/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "data").mkdir()
    queries = [{"query": row["prompt"], "responses": row["responses"], "scores": row["scores"]} for row in rows]
    (folder / "data/alpaca_responses_hh.json").write_text(json.dumps(queries))
    (folder / "prompts.txt").write_text("".join(f"Question {n}?\n" for n in range(8)))
    return folder
