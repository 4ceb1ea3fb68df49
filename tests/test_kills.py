"""Killed right before any act on a file, and run again: every verb ends with the files of an undisturbed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from evaluate.evaluate_recipes import evaluation_values, write_rows
from kills import Verb, launch, left_over, moments, rerun, sampled
from rounds.round_recipes import NEEDS, evaluated, round_values
from sample.sample_recipes import sample_values, write_prompts
from train.ranked_files import small_recipe, write_groups


def sample(values: Any) -> None:
    from rrhf_peft.recipe import make_recipe
    from rrhf_peft.sample.run import sample_recipe

    sample_recipe(make_recipe(values, needs=["sampling"]))


def score(values: Any) -> None:
    from rich.console import Console

    from rrhf_peft.recipe import make_recipe
    from rrhf_peft.score.run import score_recipe

    score_recipe(make_recipe(values, needs=["scoring"]), console=Console(quiet=True))


def evaluate(values: Any) -> None:
    from rrhf_peft.evaluate.run import evaluate_recipe
    from rrhf_peft.recipe import make_recipe

    evaluate_recipe(make_recipe(values, needs=["evaluation"]))


def train(values: Any) -> None:
    from rich.console import Console

    from rrhf_peft.recipe import make_recipe
    from rrhf_peft.train.run import train_recipe

    folder = Path(values["training"]["output_dir"])
    train_recipe(make_recipe(values), resume=folder.is_dir() and any(folder.iterdir()), console=Console(quiet=True))


def rounds(values: Any) -> None:
    from rich.console import Console

    from rrhf_peft.recipe import make_recipe
    from rrhf_peft.rounds.run import run_rounds

    run_rounds(make_recipe(values, needs=NEEDS), console=Console(quiet=True))


def merge(values: Any) -> None:
    from rrhf_peft.merge.run import merge_adapter

    merge_adapter(values["adapter"], values["output"], shard_size="60KB")


def convert(values: Any) -> None:
    from rrhf_peft.data import convert

    convert(values["source"], output=values["output"], overwrite=True)


class Case(NamedTuple):
    """A verb, what it is called with, and the files that have to be the same in the end."""

    verb: Verb
    values: Any
    results: tuple[str, ...]


ENTRIES = [{"strategy": "top_p", "k": 2, "temperature": 1.5, "max_new_tokens": 4}]
RULE = {"name": "rule", "function": "score_rules:small_letters"}


def write_candidates(path: Path) -> str:
    rows = [{"prompt": f"{n}?", "responses": ["yes", "no", "never " * n][: 1 + n % 3]} for n in range(7)]
    return str(write_rows(path, rows))


def case_of(verb: str, model: Path, folder: Path) -> Case:
    """Small work for a verb in `folder`, which has several units."""
    if verb == "sample":
        other = {**ENTRIES[0], "temperature": 0.5, "source": "cold"}
        prompts = write_prompts(folder / "prompts.json", 6)
        return Case(sample, sample_values(model, prompts, folder / "out.jsonl", [*ENTRIES, other]), ("out.jsonl",))
    if verb == "score":
        source = write_candidates(folder / "candidates.jsonl")
        scoring = {"input": source, "output": str(folder / "out.jsonl"), "unit_groups": 2, "scorer": RULE}
        return Case(score, {"scoring": scoring}, ("out.jsonl", "out.failures.jsonl", "out.report.json"))
    if verb == "evaluate":
        pairs = [{"prompt": f"{i}?", "responses": ["yes", "no, never"], "scores": [i % 2, 0.5]} for i in range(3)]
        values = evaluation_values(
            model,
            folder,
            policies={"base": {}},
            decoding={"k": 2, "max_new_tokens": 4},
            perplexity={},
            pairs=write_rows(folder / "pairs.jsonl", pairs),
            max_tokens=64,
        )
        return Case(evaluate, values, ("out/evaluation.json", "out/table.md"))
    if verb in ("train", "merge"):
        training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "use_cpu": True}
        recipe = small_recipe(model, write_groups(folder / "ranked.jsonl", 16), folder / "run", training=training)
        values = json.loads(recipe.model_dump_json(exclude_unset=True))
        if verb == "train":
            return Case(train, values, ("run/adapter_model.safetensors", "run/adapter_config.json"))
        train(values)
        names = ("model.safetensors.index.json", "model-00001-of-00009.safetensors", "config.json", "tokenizer.json")
        merged = {"adapter": str(folder / "run"), "output": str(folder / "merged")}
        return Case(merge, merged, tuple(f"merged/{name}" for name in names))
    if verb == "convert":
        write_groups(folder / "ranked.jsonl", 8)
        return Case(
            convert, {"source": str(folder / "ranked.jsonl"), "output": str(folder / "out.jsonl")}, ("out.jsonl",)
        )
    values = round_values(model, folder, prompts=4, training={"max_steps": 3, "save_steps": 2}, rounds={"count": 2})
    run = "rounds/round-2/run/adapter_model.safetensors"
    return Case(rounds, evaluated(values, folder), ("rounds/rounds.json", "rounds/table.md", run))


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, bytes | None]:
    found = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in names}
    assert any(found.values())
    return found


def kill_everywhere(verb: str, model: Path, tmp_path: Path, count: int | None) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    case = case_of(verb, model, folder)
    chosen = moments(case.verb, case.values, folder, tmp_path / "copies")
    expected = contents(folder, case.results)
    assert left_over(folder) == []
    wrong = []
    for moment in chosen if count is None else sampled(chosen, count):
        try:
            rerun(case.verb, case.values, folder, moment)
            assert contents(folder, case.results) == expected
            assert left_over(folder) == []
        except AssertionError as error:
            wrong.append(f"{moment.name}: {error}")
    assert not wrong, f"{len(wrong)} of {len(chosen)}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", ["convert", "sample", "score", "evaluate", "merge"])
def test_killed_at_some_moments(tiny_model_folder, tmp_path, verb):
    kill_everywhere(verb, tiny_model_folder, tmp_path, count=4)


@pytest.mark.timeout(900)
def test_rounds_killed_at_some_moments(tiny_model_folder, tmp_path):
    kill_everywhere("rounds", tiny_model_folder, tmp_path, count=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", ["convert", "sample", "score", "evaluate", "merge", "train", "rounds"])
def test_killed_at_every_moment(tiny_model_folder, tmp_path, verb):
    kill_everywhere(verb, tiny_model_folder, tmp_path, count=None)


def kill_two(verb: str, model: Path, tmp_path: Path, numbers: list[int]) -> int:
    """Kill both processes at each of these acts of the main one; how often it came to that."""
    folder = tmp_path / "work"
    folder.mkdir()
    case = case_of(verb, model, folder)
    shutil.copytree(folder, tmp_path / "before")
    assert not launch(case.verb, case.values, folder, count=2)
    expected = contents(folder, case.results)
    kills = 0
    for number in numbers:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
        if not launch(case.verb, case.values, folder, count=2, number=number):
            break  # it has no more acts
        kills += 1
        assert not launch(case.verb, case.values, folder, count=2), f"act {number}"
        assert contents(folder, case.results) == expected, f"act {number}"
        assert left_over(folder) == [], f"act {number}"
    return kills


@pytest.mark.timeout(900)
def test_two_processes_killed_at_some_moments(tiny_model_folder, tmp_path):
    assert kill_two("score", tiny_model_folder, tmp_path, [9, 22]) == 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", ["sample", "score", "evaluate", "train", "rounds"])
def test_two_processes_killed_at_every_moment(tiny_model_folder, tmp_path, verb):
    step = {"rounds": 7, "train": 3, "evaluate": 3}.get(verb, 1)
    assert kill_two(verb, tiny_model_folder, tmp_path, list(range(1, 1000, step))) > 5
