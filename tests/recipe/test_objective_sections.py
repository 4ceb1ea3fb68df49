"""Each objective's section has its function's keyword arguments, with the same defaults, and refuses what cannot be."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest

from rrhf_peft.objectives import NEEDS_REFERENCE, OBJECTIVES, ONLINE_ONLY, TAKES_REFERENCE
from rrhf_peft.recipe import load_recipe, recipe_text
from rrhf_peft.recipe.schema import OBJECTIVE_NAMES, ObjectiveSection
from rrhf_peft.records import UserError

SECTIONS = {
    get_args(section.model_fields["name"].annotation)[0]: section for section in get_args(get_args(ObjectiveSection)[0])
}


def test_every_objective_has_a_section() -> None:
    assert set(OBJECTIVES) == OBJECTIVE_NAMES == set(SECTIONS)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_fields_are_the_keyword_arguments(name: str, recipe_file: Path) -> None:
    arguments = {
        key: parameter.default
        for key, parameter in inspect.signature(OBJECTIVES[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != "reference"
    }
    section = SECTIONS[name]
    fields = {key: field.default for key, field in section.model_fields.items() if key not in ("name", "reference")}
    assert fields == arguments
    assert ("reference" in section.model_fields) == (name in TAKES_REFERENCE - ONLINE_ONLY)
    if "reference" in section.model_fields:
        assert section.model_fields["reference"].default == ("auto" if name in NEEDS_REFERENCE else "none")
    assert all(field.description for key, field in section.model_fields.items() if key != "name")
    assert "arXiv" in section.__doc__ or name in ("sft", "plackett_luce")

    overrides = [f"objective.name={name}"]
    if name in ONLINE_ONLY:
        with pytest.raises(UserError, match="add a section online"):
            load_recipe(recipe_file, overrides)
        scorer = "{name: rule, function: 'train.online_rules:letters'}"
        overrides += ["online.every=1", f"online.scorer={scorer}", "training.save_strategy=epoch"]
        overrides += ["online.decoding={strategy: top_p, k: 4, max_new_tokens: 8}"]
        with pytest.raises(UserError, match=r"online\.keep_provided: .* set it to false"):
            load_recipe(recipe_file, overrides)
        overrides.append("online.keep_provided=false")
    recipe = load_recipe(recipe_file, overrides)
    again = recipe_file.with_name("again.yaml")
    again.write_text(recipe_text(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["objective.name=dpo", "objective.reference=adapter_off", "adapter=null"], "adapter_off needs an adapter"),
        (
            ["objective.name=kto", "objective.reference=adapter_off", "adapter.init_lora_weights=pissa_niter_4"],
            "objective.reference: adapter.init_lora_weights pissa_niter_4 moves a part of the base into the adapter",
        ),
        (["objective.name=dpo", "objective.reference=none"], "'none' is not one of 'auto', 'adapter_off' or 'cached'"),
        (["objective.name=dpo", "objective.beta=0"], "must be greater than 0"),
        (["objective.name=simpo", "objective.simpo_gamma=1"], "set objective.gamma instead"),
        (["objective.name=cpo", "objective.cpo_alpha=1"], "set objective.sft_weight instead"),
        (["objective.name=dpo", "objective.rank_weight=1"], "known keys of objective dpo: beta, label_smoothing"),
        (["objective.name=kto", "objective.threshold=mean"], "objective.threshold"),
        (["objective.loss_type=ipo"], "set objective.name instead"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(recipe_file: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, overrides)
    assert part in str(caught.value)


def test_online_training_has_no_cache(recipe_file: Path) -> None:
    online = "online={every: 2, decoding: {strategy: top_p, k: 2}, scorer: {name: rule, function: vader}}"
    with pytest.raises(UserError, match=r"objective\.reference: online training makes new responses"):
        load_recipe(recipe_file, ["objective.name=dpo", "objective.reference=cached", online])
