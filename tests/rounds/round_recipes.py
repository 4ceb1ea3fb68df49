"""Small recipes of rounds on the tiny model."""

from __future__ import annotations

import json

from rich.console import Console

from rrhf_peft.recipe import make_recipe

NEEDS = ["rounds", "model", "sampling", "scoring"]


def write_prompts(path, count):
    path.write_text(json.dumps([f"{number} " for number in range(count)]), encoding="utf-8")
    return path


def round_values(model, folder, /, *, prompts=12, **changes):
    """Two rounds with a rule that an untrained byte-level model learns fast: the share of small letters."""
    values = {
        "model": {"name": str(model)},
        "adapter": {"r": 8, "lora_alpha": 64, "target_modules": ["lm_head"]},
        "data": {"max_tokens": 64},
        "training": {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 4,
            "learning_rate": 2e-2,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
        },
        "sampling": {
            "prompts": str(write_prompts(folder / "prompts.json", prompts)),
            "candidates": [{"strategy": "top_p", "k": 6, "max_new_tokens": 12}],
            "unit_prompts": 4,
        },
        "scoring": {"scorer": {"name": "rule", "function": "score_rules:small_letters"}, "unit_groups": 4},
        "rounds": {"output": str(folder / "rounds"), "count": 2},
    }
    for section, own in changes.items():
        held = values.get(section)
        values[section] = {**held, **own} if isinstance(held, dict) and isinstance(own, dict) else own
    return values


def evaluated(values, folder, **changes):
    """The same with an evaluation after every round, by all measures that the tables show."""
    (folder / "held_out.json").write_text(json.dumps([f"{number} " for number in range(100, 108)]))
    pairs = [{"prompt": f"{number} ", "responses": ["abcd", "@#!?"], "scores": [1, 0]} for number in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    evaluation = {
        "prompts": str(folder / "held_out.json"),
        "decoding": {"k": 2, "max_new_tokens": 12},
        "scorers": {"letters": values["scoring"]["scorer"]},
        "perplexity": {},
        "pairs": str(folder / "pairs.jsonl"),
        "resamples": 200,
        "max_tokens": 64,
        **changes,
    }
    return {**values, "evaluation": evaluation}


def round_recipe(*arguments, **changes):
    return make_recipe(round_values(*arguments, **changes), needs=NEEDS)


def open_rounds(output, recipe, *, overwrite):
    """As a run does that ends before its first stage."""
    from rrhf_peft.rounds import run

    with run.open_rounds(output, recipe, overwrite=overwrite):
        pass


def run_quietly(recipe, **options):
    from rrhf_peft.rounds.run import run_rounds

    return run_rounds(recipe, console=Console(quiet=True), **options)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tables(folder):
    """What a resumed run has to give again, byte for byte."""
    return {name: (folder / name).read_bytes() for name in ("rounds.json", "table.md")}
