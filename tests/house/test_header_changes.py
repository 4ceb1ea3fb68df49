"""Changes that headers and tables of recipes name: each is understood as it stands, and those of training are run.

Hub ids are folders with their names below the working folder, which are taken in the hub's place; the machine's limits
(one step on a CPU, few tokens) are added behind what the header says.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from house.recipe_checks import ROOT, header_of
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
