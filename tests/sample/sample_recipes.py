"""Small sampling recipes on the tiny model, and reading what came of them."""

from __future__ import annotations

import json

from rrhf_peft.recipe import make_recipe

#: All three strategies in one run.
MIXED = (
    {"strategy": "top_p", "k": 3, "temperature": 1.5, "max_new_tokens": 10},
    {"strategy": "diverse_beam", "k": 4, "temperature": 0.8, "max_new_tokens": 10},
    {"strategy": "beam", "k": 2, "max_new_tokens": 10},
)


def write_prompts(path, count):
    """Prompts of very different lengths, the empty one among them."""
    prompts = [f"{'Grüße 🙂 ' * (index % 5)}{index}"[: 3 * (index % 9)] for index in range(count)]
    path.write_text(json.dumps(prompts, ensure_ascii=False), encoding="utf-8")
    return path


def sample_values(model, prompts, output, candidates=MIXED, **settings):
    sampling = {
        "prompts": str(prompts),
        "output": str(output),
        "candidates": list(candidates),
        "unit_prompts": 3,
        "batch_tokens": 600,
        **settings,
    }
    return {"model": {"name": str(model)}, "sampling": sampling}


def sample_recipe_of(*arguments, **settings):
    return make_recipe(sample_values(*arguments, **settings), needs=["sampling"])


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
