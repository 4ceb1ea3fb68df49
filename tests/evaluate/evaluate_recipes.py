"""Small evaluation recipes on the tiny model, and a rule for them."""

from __future__ import annotations

import json

from rrhf_peft.recipe import make_recipe


def letters(prompt, responses):
    """Share of letters; 0 for the empty text."""
    return [sum(char.isalpha() for char in text) / len(text) if text else 0.0 for text in responses]


LETTERS = {"name": "rule", "function": "evaluate.evaluate_recipes:letters"}


def write_json(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluation_values(model, folder, **settings):
    """Values of a recipe with six prompts, one policy and one rule, into `folder`/out."""
    prompts = folder / "prompts.json"
    if not prompts.exists():
        write_json(prompts, [f"Question {number}: {'why ' * number}" for number in range(6)])
    evaluation = {
        "output": str(folder / "out"),
        "prompts": str(prompts),
        "policies": {"base": {}},
        "decoding": {"k": 3, "max_new_tokens": 8, "temperature": 1.5},
        "scorers": {"letters": LETTERS},
        "resamples": 200,
        "batch_tokens": 600,
        **settings,
    }
    return {"model": {"name": str(model)}, "evaluation": evaluation}


def evaluation_recipe(*arguments, **settings):
    return make_recipe(evaluation_values(*arguments, **settings), needs=["evaluation"])
