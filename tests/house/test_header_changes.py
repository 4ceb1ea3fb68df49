"""Changes that headers and tables of recipes name: each is understood as it stands, and those of training are run.

Hub ids are folders with their names below the working folder, which are taken in the hub's place; the machine's limits
(one step on a CPU, few tokens) are added behind what the header says.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from house.recipe_checks import ROOT, header_of
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rrhf_peft.cli import app
from rrhf_peft.recipe import load_recipe

#: `key=value` of a recipe's section, its value bare or in single quotes.
CHANGE = re.compile(r"(?<![\w.-])((?:model|adapter|data|objective|training|engine|sampling|scoring|online|evaluation)"
                    r"(?:\.[\w.]+)?=(?:'[^']*'|[^\s'`;,)]+))")  # fmt: skip


def changes_in(text: str) -> list[str]:
    """The changes that a text names, without the point that ends a sentence and the lines that a comment breaks."""
    joined = re.sub(r"\s*\\?\n#?\s*", " ", text)
    return [shlex.split(found)[0].rstrip(".") for found in CHANGE.findall(joined) if "$" not in found]


RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if path.parent.name != "accelerate" and path.name != "paper_numbers.yaml" and changes_in(header_of(path))
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_change_that_a_header_names_is_understood(path: Path) -> None:
    changes = changes_in(header_of(path))
    if load_recipe(path, needs=[]).evaluation is None:  # they go to the evaluation recipe that the same header names
        changes = [change for change in changes if not change.startswith("evaluation.")]
    if path.parent.name == "rounds" and "adapter=null" in changes:
        assert "model.quantization=none" in changes  # the two of them only together
        load_recipe(path, changes, needs=[])
        changes = []
    for change in changes:
        load_recipe(path, [change], needs=[])


def test_the_headers_are_read() -> None:
    assert len(RECIPES) >= 12
    assert changes_in(header_of(ROOT / "recipes" / "qlora_7b.yaml")) == ["data.train=my_ranked.jsonl"]


#: One step on a CPU with a byte-level model.
SMALL = ("training.max_steps=1", "training.use_cpu=true", "data.max_tokens=256", "data.max_prompt_tokens=128")
ONLINE = ("online.decoding.max_new_tokens=8", "online.scorer={name: rule, function: 'rrhf_peft.score:vader'}")
FULL = ("training.bf16=false", "training.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize(
    ("recipe", "changes", "limits"),
    [
        ("qlora_7b", [], SMALL),
        ("qlora_7b", ["data.train=my_ranked.jsonl"], SMALL),
        ("online", ["data.train=prompts.txt"], (*SMALL, *ONLINE)),
        ("full_8xa100", ["objective.variant=paper", "model.name=path/to/alpaca-7b"], (*SMALL, *FULL)),
    ],
)
def test_what_a_header_says_trains(
    recipe: str, changes: list[str], limits: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = changes_in(header_of(ROOT / "recipes" / f"{recipe}.yaml"))
    assert set(changes) <= set(named), named
    monkeypatch.chdir(workplace)
    shutil.rmtree(workplace / "runs", ignore_errors=True)
    result = CliRunner().invoke(app, ["train", f"recipes/{recipe}.yaml", *changes, *limits])
    assert result.exit_code == 0, result.output
    assert (workplace / "runs" / recipe / "metrics.jsonl").is_file()
