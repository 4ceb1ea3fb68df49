"""Rules and recipes of the tests of online training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.ranked_files import small_recipe

from rrhf_peft.recipe import Recipe

PROMPTS = [f"say {word}:" for word in "one two three four five six seven eight nine ten eleven twelve".split()]


def letters(prompt: str, responses: list[str]) -> list[float]:
    """Share of plain letters: half of the way there is one token, so that even an untrained model finds it."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in responses]


def letters_of_some(prompt: str, responses: list[str]) -> list[float]:
    """The same, but prompts whose last word has an even length are answered by nothing but ties."""
    return letters(prompt, responses) if len(prompt.split()[-1]) % 2 else [0.0] * len(responses)


def all_the_same(prompt: str, responses: list[str]) -> list[float]:
    """A rule from which nothing can be learned."""
    return [1.0] * len(responses)


def write_prompts(path: Path) -> Path:
    """Twelve prompts, one on each line."""
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    return path


def online_recipe(folder: Path, train: Path, run: Path, /, rule: str = "letters", **sections: Any) -> Recipe:
    """Online training of the tiny model: steps of four prompts, four answers of at most twelve tokens.

    The head is trained too: that of an untrained model is too small for the layers below it to say much.
    """
    layers = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]}
    online = {
        "every": 1,
        "decoding": {"strategy": "top_p", "k": 4, "max_new_tokens": 12},
        "scorer": {"name": "rule", "function": f"train.online_rules:{rule}"},
        **sections.pop("online", {}),
    }
    training = {"num_train_epochs": 4, "learning_rate": 2e-2, **sections.pop("training", {})}
    data = {"max_tokens": 64, **sections.pop("data", {})}
    sections["adapter"] = {**layers, **sections.get("adapter", {})}
    return small_recipe(folder, train, run, online=online, training=training, data=data, **sections)
