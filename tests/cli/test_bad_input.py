"""What can be wrong with a user's files and settings, one kind after the other.

Each is answered with one paragraph that says what is wrong where and how to mend it, and a non-zero
exit code; there is no traceback, and every file is as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cli.conftest import Run
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Workshop:
    """A folder in which everything is right, until a case spoils one thing."""

    folder: Path
    model: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.folder / "ranked.jsonl"

    @property
    def adapter(self) -> Path:
        """A trained run folder, made beforehand."""
        return self.folder / "adapter"

    def write_rows(self, *rows: Any) -> None:
        self.data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def own_model(self) -> Path:
        """A copy of the base model that may be spoilt."""
        copy = self.folder / "model"
        if not copy.exists():
            shutil.copytree(self.model, copy)
        return copy

    def edit_adapter(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        path = self.adapter / "adapter_model.safetensors"
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)

    def edit_json(self, path: Path, **values: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


GOOD = {"prompt": "A question?", "responses": ["Yes.", "No."], "scores": [1, 0]}


class Case(NamedTuple):
    """What is spoilt, the command (after `rrhf-peft`), and what the answer must say."""

    spoil: Callable[[Workshop], Any]
    command: str
    says: tuple[str, ...]


def _nothing(shop: Workshop) -> None:
    pass


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _other_base(shop: Workshop) -> None:
    """Another model, as large as the adapter's base is not, under the base's name."""
    other = shop.folder / "other" / shop.model.name
    shutil.copytree(shop.model, other)
    config = LlamaConfig.from_pretrained(shop.model)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 32, 2, 2
    LlamaForCausalLM(config).save_pretrained(other)
    shop.edit_json(shop.adapter / "adapter_config.json", base_model_name_or_path=str(other))


TRAIN = "train {recipe}"
MERGE = "merge {adapter} --output {folder}/merged"

CASES: dict[str, Case] = {
    # the recipe
    "missing recipe": Case(_nothing, "train {folder}/recip.yaml", ("no such recipe", "did you mean", "recipe.yaml")),
    "recipe is not YAML": Case(
        lambda shop: shop.recipe.write_text("model: {name: x\ndata: y\n"), TRAIN, ("line 2", "not valid YAML")
    ),
    "misspelt key": Case(
        _nothing, TRAIN + " training.learning_rat=1", ("training.learning_rat", "did you mean 'learning_rate'?")
    ),
    "wrong type": Case(_nothing, TRAIN + " data.max_tokens=many", ("data.max_tokens", "whole number", "'many'")),
    "missing section": Case(
        lambda shop: shop.recipe.write_text("model: {name: x}\n"), TRAIN, ("data: this key is required",)
    ),
    "impossible combination": Case(
        _nothing, TRAIN + " adapter=null model.quantization=nf4", ("adapter", "nf4", "set model.quantization: none")
    ),
    "not an override": Case(_nothing, TRAIN + " overwrite", ("'overwrite' is not an override", "section.key=value")),
    # the data
    "missing data": Case(_nothing, TRAIN + " data.train={folder}/rankd.jsonl", ("rankd.jsonl",)),
    "empty file": Case(lambda shop: shop.data.write_text(""), TRAIN, ("ranked.jsonl", "holds no rows")),
    "malformed line": Case(
        lambda shop: shop.write_rows(GOOD, '{"prompt": '), TRAIN, ("ranked.jsonl:2", "not valid JSON")
    ),
    "wrong column": Case(
        lambda shop: shop.write_rows({"prompt": "a", "respones": ["b", "c"], "scores": [1, 0]}),
        TRAIN,
        ("respones", "responses"),
    ),
    "score is text": Case(
        lambda shop: shop.write_rows(GOOD, {**GOOD, "scores": ["high", 0]}), TRAIN, ("ranked.jsonl:2", "scores")
    ),
    "score is NaN": Case(
        lambda shop: shop.write_rows(GOOD, '{"prompt": "a", "responses": ["b", "c"], "scores": [NaN, 0]}'),
        TRAIN,
        ("ranked.jsonl:2", "scores"),
    ),
    "fewer scores than responses": Case(
        lambda shop: shop.write_rows(GOOD, {**GOOD, "scores": [1]}), TRAIN, ("ranked.jsonl:2", "scores")
    ),
    "response is no text": Case(
        lambda shop: shop.write_rows({**GOOD, "responses": ["Yes.", 3]}), TRAIN, ("ranked.jsonl:1", "responses")
    ),
    "all tied": Case(lambda shop: shop.write_rows({**GOOD, "scores": [1, 1]}), TRAIN, ("no data is left", "scores")),
    "only empty responses": Case(
        lambda shop: shop.write_rows({**GOOD, "responses": ["", " "]}),
        TRAIN,
        ("no data is left", "only empty responses"),
    ),
    "not text at all": Case(lambda shop: shop.data.write_bytes(b"\xff\xfe\x00\x01"), TRAIN, ("ranked.jsonl", "UTF-8")),
    "unknown kind of file": Case(
        lambda shop: (shop.folder / "ranked.txt").write_text("Yes or no\n"),
        TRAIN + " data.train={folder}/ranked.txt",
        ("ranked.txt", ".jsonl"),
    ),
    "folder without data": Case(
        lambda shop: (shop.folder / "nothing").mkdir(), TRAIN + " data.train={folder}/nothing", ("nothing", "jsonl")
    ),
    "prompt longer than its limit": Case(
        _nothing,
        TRAIN + " data.max_prompt_tokens=4 data.overlong_prompt=error",
        ("ranked.jsonl:1", "data.overlong_prompt"),
    ),
    "limit beyond the model's context": Case(
        _nothing, TRAIN + " data.max_tokens=100000", ("data.max_tokens", "100000", "512")
    ),
    "chat template that is not there": Case(_nothing, TRAIN + " data.template=chat", ("no chat template", "raw")),
    "everything held out": Case(_nothing, TRAIN + " data.eval_size=50", ("eval_size",)),
    # the model and the adapter
    "missing model": Case(_nothing, TRAIN + " model.name={folder}/nowhere", ("no such model folder", "nowhere")),
    "model is a file": Case(_nothing, TRAIN + " model.name={recipe}", ("this is a file",)),
    "adapter as model": Case(
        lambda shop: (shop.adapter / "config.json").unlink(missing_ok=True),
        TRAIN + " model.name={adapter}",
        ("this is an adapter", "model.init_adapter"),
    ),
    "truncated model weights": Case(
        lambda shop: _truncate(shop.own_model() / "model.safetensors"),
        TRAIN + " model.name={folder}/model",
        ("model.safetensors",),
    ),
    "model without weights": Case(
        lambda shop: (shop.own_model() / "model.safetensors").unlink(),
        TRAIN + " model.name={folder}/model",
        ("/model", "weights"),
    ),
    "tokenizer is missing": Case(
        lambda shop: [path.unlink() for path in shop.own_model().glob("tokenizer*")],
        TRAIN + " model.name={folder}/model",
        ("tokenizer",),
    ),
    "target module that matches nothing": Case(
        _nothing, TRAIN + " adapter.target_modules=[q_prj]", ("q_prj", "q_proj")
    ),
    "adapter of another base, to train further": Case(
        _other_base,
        "train {recipe} adapter={} model.init_adapter={adapter} model.name={folder}/other/" + "{model_name}",
        ("does not fit the base model",),
    ),
    # the run folder
    "run folder is taken": Case(
        _nothing,
        TRAIN + " training.output_dir={adapter} training.learning_rate=0.5",
        ("already holds files", "--resume", "--overwrite"),
    ),
    "overwriting what is no run": Case(
        _nothing,
        TRAIN + " --overwrite training.output_dir={folder}",
        ("holds", "which this run reads", "Choose another"),
    ),
    "output cannot be written": Case(
        _nothing, TRAIN + " training.output_dir={recipe}/run", ("cannot be written", "is no folder")
    ),
    "resuming another recipe": Case(
        _nothing,
        TRAIN + " --resume training.output_dir={adapter} training.learning_rate=0.5",
        ("cannot resume", "training.learning_rate", "--ignore-changes"),
    ),
    # merging
    "merge of no adapter": Case(
        _nothing, "merge {folder}/nowhere --output {folder}/merged", ("nowhere", "no such adapter folder")
    ),
    "merge of a truncated adapter": Case(
        lambda shop: _truncate(shop.adapter / "adapter_model.safetensors"), MERGE, ("adapter_model.safetensors",)
    ),
    "merge of an adapter that is not finite": Case(
        lambda shop: shop.edit_adapter(lambda tensor: tensor * float("nan")), MERGE, ("not finite",)
    ),
    "merge of an adapter that does nothing": Case(
        lambda shop: shop.edit_adapter(torch.zeros_like), MERGE, ("changes nothing",)
    ),
    "merge of an adapter without its weights": Case(
        lambda shop: (shop.adapter / "adapter_model.safetensors").unlink(), MERGE, ("adapter_model.safetensors",)
    ),
    "merge of a pickled adapter": Case(
        lambda shop: (shop.adapter / "adapter_model.safetensors").rename(shop.adapter / "adapter_model.bin"),
        MERGE,
        ("pickled", "safetensors"),
    ),
    "merge into another base": Case(_other_base, MERGE, ("does not fit the base model", "Name the base model")),
    "merge onto an existing folder": Case(
        _nothing, "merge {adapter} --output {adapter}", ("is what this run reads", "another output")
    ),
    "merge with a size that is none": Case(_nothing, MERGE + " --shard-size huge", ("huge", "5GB")),
    # looking
    "plan of a missing model": Case(_nothing, "plan {recipe} model.name={folder}/nowhere", ("no such model folder",)),
    "inspect of a group without a tokenizer": Case(_nothing, "inspect {data} --group 1", ("--tokenizer NAME",)),
    "schema where nothing can be written": Case(_nothing, "schema --output {recipe}/schema.json", ("cannot be",)),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Recipe, data and a trained adapter that work."""
    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.train.run import train_recipe

    shop = Workshop(tmp_path_factory.mktemp("good"), tiny_model_folder)
    shop.write_rows(GOOD, {**GOOD, "prompt": "Another question, a little longer?"})
    shop.recipe.write_text(
        f"""\
model:
  name: {tiny_model_folder}
adapter:
  r: 4
data:
  train: {shop.data}
  max_tokens: 64
training:
  output_dir: {shop.folder / "run"}
  max_steps: 2
  learning_rate: 0.01
  use_cpu: true
"""
    )
    train_recipe(load_recipe(shop.recipe, [f"training.output_dir={shop.adapter}"]))
    return shop.folder


@pytest.fixture
def shop(good: Path, tmp_path: Path, tiny_model_folder: Path) -> Workshop:
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    for path in folder.rglob("*.yaml"):
        path.write_text(path.read_text().replace(str(good), str(folder)))
    return Workshop(folder, tiny_model_folder)


def files_in(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def arguments_of(command: str, shop: Workshop) -> list[str]:
    names = {
        "recipe": shop.recipe,
        "data": shop.data,
        "adapter": shop.adapter,
        "folder": shop.folder,
        "model_name": shop.model.name,
    }
    words = command.split()
    for name, path in names.items():
        words = [word.replace("{" + name + "}", str(path)) for word in words]
    return words


def the_error_in(stderr: str) -> str:
    """The one paragraph; progress and reports may stand before it."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert [line.startswith("Error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("Error: "), lines[-1]
    return lines[-1]


def test_nothing_is_wrong_to_begin_with(shop: Workshop, rrhf: Run) -> None:
    assert rrhf("train", shop.recipe).exit_code == 0
    assert rrhf("merge", shop.adapter, "--output", shop.folder / "merged").exit_code == 0


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_answered_with_the_remedy(name: str, shop: Workshop, rrhf: Run) -> None:
    case = CASES[name]
    case.spoil(shop)
    before = files_in(shop.folder)
    result = rrhf(*arguments_of(case.command, shop))
    assert result.exit_code == 1, result.output
    error = the_error_in(result.stderr)
    for part in case.says:
        assert part in error, error
    assert error.rstrip().endswith((".", "?"))
    assert files_in(shop.folder) == before


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("malformed line", [sys.executable, "-m", "rrhf_peft.train"]),
        pytest.param(
            "truncated model weights", [sys.executable, "-m", "rrhf_peft.cli", "train"], marks=pytest.mark.slow
        ),
        pytest.param(
            "merge of an adapter that does nothing",
            [sys.executable, "-m", "rrhf_peft.cli", "merge"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_real_process_answers_alike(name: str, command: list[str], shop: Workshop) -> None:
    case = CASES[name]
    case.spoil(shop)
    before = files_in(shop.folder)
    words = arguments_of(case.command, shop)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert all(part in the_error_in(done.stderr) for part in case.says)
    assert files_in(shop.folder) == before
