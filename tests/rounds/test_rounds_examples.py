"""The shipped recipes for rounds: their headers, their plans, and each run with a tiny model and a few prompts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from house.test_recipes import CONFIGS
from rounds.round_recipes import NEEDS, run_quietly

from rrhf_peft.plan.run import plan_memory
from rrhf_peft.recipe import load_recipe, recipe_text

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "rounds"
RECIPES = sorted(FOLDER.glob("*.yaml"))
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
LETTERS = {"name": "rule", "function": "score_rules:small_letters"}
#: Responses to a prompt, provided ones among them, before duplicates are taken away.
RESPONSES = {"ip": 6, "raft": 8, "spin": 2}


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_each_has_a_row_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES} == set(RESPONSES)
    assert all(f"({path.name})" in table for path in RECIPES)


def test_the_header_says_how_to_run_it_where_what_to_expect_and_whether_it_was_run(path):
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group()
    assert f"rrhf-peft rounds recipes/rounds/{path.name}" in header
    for part in ("# Hardware: ", "# Expect: "):
        assert part in header
    assert re.search(r"^# (Run|Not run): ", header, flags=re.MULTILINE)


def test_its_snapshot_is_the_same_recipe_and_its_plan_the_one_in_its_header(path, tmp_path):
    recipe = load_recipe(path, needs=NEEDS)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml", needs=NEEDS) == recipe
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS.get(recipe.model.name, MISTRAL)))
    stated, name, k = re.search(
        r"peak of ([0-9.]+) GiB[^`]*`rrhf-peft plan (\S+) --responses (\d+)`", path.read_text()
    ).groups()
    assert (name, int(k)) == (f"recipes/rounds/{path.name}", RESPONSES[path.stem])
    plan = plan_memory(load_recipe(path, [f"model.name={tmp_path}"]), device="cuda", processes=1, responses=int(k))
    assert f"{plan.peak_bytes / 2**30:.1f}" == stated


def test_two_of_its_rounds_run_with_a_tiny_model(path, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing is the evaluation's to test, and takes a while
    prompts = tmp_path / "prompts.jsonl"
    row = {"responses": ["Yes."], "sources": ["provided"]}
    if path.stem != "spin":
        row = {"responses": ["Yes.", "No"], "scores": [1, 0], "sources": ["chosen", "rejected"]}
    prompts.write_text("".join(json.dumps({"prompt": f"Is it {number}?", **row}) + "\n" for number in range(5)))
    changes = [
        f"model.name={tiny_model_folder}",
        "model.quantization=none",
        "data.max_tokens=128",
        f"sampling.prompts={prompts}",
        "sampling.max_prompt_tokens=64",
        f"evaluation.prompts={prompts}",
        "evaluation.max_prompt_tokens=64",
        "evaluation.max_tokens=128",
        "evaluation.max_prompts=2",
        "evaluation.decoding.max_new_tokens=8",
        f"evaluation.scorers.reward={json.dumps(LETTERS)}",
        "training.max_steps=1",
        "training.gradient_accumulation_steps=1",
        "training.use_cpu=true",
        "training.bf16=false",
        "rounds.count=2",
        f"rounds.output={tmp_path / 'rounds'}",
    ]
    if path.stem == "spin":
        changes += ["data.template=raw", "sampling.template=raw", "evaluation.template=raw"]
    else:
        changes += [f"scoring.scorer={json.dumps(LETTERS)}", "evaluation.split=train"]
        changes += ["evaluation.perplexity={}"]
    if path.stem == "ip":
        changes += [f"evaluation.pairs={prompts}"]
    recipe = load_recipe(path, changes, needs=NEEDS)
    entries = [entry.model_copy(update={"max_new_tokens": 8}) for entry in recipe.sampling.candidates]
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"candidates": entries})})
    rows = run_quietly(recipe).rows
    assert [row.policy for row in rows] == ["base", "round-1", "round-2"]
    assert all(row.reward is not None for row in rows)
    lines = (tmp_path / "rounds" / "round-2" / "candidates.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert len(line["responses"]) + len(line["meta"]["removed"]) == RESPONSES[path.stem]
    if path.stem == "spin":
        scored = (tmp_path / "rounds" / "round-2" / "scored.jsonl").read_text().splitlines()
        pairs = [dict(zip(row["sources"], row["scores"], strict=True)) for row in map(json.loads, scored)]
        assert pairs == [{"provided": 1.0, "top_p:round-1": 0.0}] * 5
