"""What an `online:` section may not say, each with the key and the remedy."""

from __future__ import annotations

import pytest

from rrhf_peft.recipe import load_recipe, make_recipe, recipe_text
from rrhf_peft.records import UserError

SAMPLED = {"strategy": "top_p", "k": 4, "max_new_tokens": 16}
RULE = {"name": "rule", "function": "rrhf_peft.score:vader"}


def recipe(**sections):
    values = {
        "model": {"name": "tiny"},
        "data": {"train": "prompts.txt", "max_tokens": 64},
        "training": {"output_dir": "runs/x"},
        "online": {"every": 4, "decoding": SAMPLED, "scorer": RULE},
    }
    return make_recipe({**values, **{name: merged(values.get(name), own) for name, own in sections.items()}})


def merged(values, own):
    return {**(values or {}), **own} if isinstance(own, dict) else own


def test_a_plain_one_is_read_and_written(tmp_path):
    read = recipe(training={"save_strategy": "steps", "save_steps": 8}, online={"kl_coefficient": 0.1, "stop": ["\n"]})
    (tmp_path / "recipe.yaml").write_text(recipe_text(read))
    assert load_recipe(tmp_path / "recipe.yaml") == read


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"online": {"decoding": {**SAMPLED, "model": "gpt2"}}}, r"decoding\.model: the policy in training answers"),
        ({"online": {"decoding": {**SAMPLED, "adapter": "a"}}}, r"decoding\.adapter: the policy in training answers"),
        ({"online": {"decoding": {**SAMPLED, "backend": "vllm"}}}, r"decoding\.backend: .* remove it"),
        ({"online": {"decoding": {**SAMPLED, "num_beams": 4}}}, r"decoding\.num_beams: has no effect with .* top_p"),
        ({"online": {"scorer": {"name": "human", "sheet": "s.csv"}}}, r"online\.scorer: .* does not wait for people"),
        ({"online": {"kl_coefficient": 0.1}, "adapter": None}, r"online\.kl_coefficient: .* adapter is null; give an"),
        (
            {"online": {"kl_coefficient": 0.1}, "adapter": {"init_lora_weights": "pissa"}},
            r"online\.kl_coefficient: adapter\.init_lora_weights: pissa takes a part out",
        ),
        ({"data": {"max_prompt_tokens": 60}}, r"online\.decoding\.max_new_tokens: 16 with .*max_tokens = 64; raise"),
        ({"training": {"save_strategy": "steps"}, "online": {"every": 3}}, r"save_steps: 500 is not .*every = 3"),
        ({"training": {"save_strategy": "steps", "save_steps": 6}}, r"save_steps: 6 is not a multiple of .*every = 4"),
        ({"training": {"save_strategy": "steps", "save_steps": 0.5}}, r"save_steps: 0\.5 is not a multiple"),
        ({"training": {"save_strategy": "best"}}, r"training\.save_strategy: best may save between two samplings"),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_remedy(sections, message):
    with pytest.raises(UserError, match=message):
        recipe(**sections)


def test_rounds_do_not_train_online():
    values = {"online": {"every": 4, "decoding": SAMPLED, "scorer": RULE}, "rounds": {"output": "runs/rounds"}}
    with pytest.raises(UserError, match=r"online: rounds train on what they have sampled .* remove online or rounds"):
        make_recipe(values, needs=[])


def test_checkpoints_at_every_epoch_go_with_any_interval():
    assert recipe(training={"save_strategy": "epoch"}, online={"every": 7}).online.every == 7
