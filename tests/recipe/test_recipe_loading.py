"""YAML and overrides in, the same recipe out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rrhf_peft.recipe import RRHFObjective, SFTObjective, json_schema, load_recipe, make_recipe, recipe_text
from rrhf_peft.recipe.shipped import NO_RECIPES
from rrhf_peft.records import UserError


def test_what_is_left_out_has_the_documented_default(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.model.name == "some/model"
    assert recipe.model.trust_remote_code is False
    assert recipe.adapter is not None  # LoRA, unless adapter: null
    assert isinstance(recipe.objective, RRHFObjective)
    assert recipe.objective.variant == "balanced"
    assert recipe.engine.layout == "auto"


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("training.learning_rate=.5e-4", "training.learning_rate", 0.5e-4),
        ("training.learning_rate=2E-5", "training.learning_rate", 2e-5),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("training.max_steps=-1", "training.max_steps", -1),
        ("training.eval_strategy=no", "training.eval_strategy", "no"),
        ("training.bf16=true", "training.bf16", True),
        ("training.report_to=[tensorboard, wandb]", "training.report_to", ["tensorboard", "wandb"]),
        ("training.lr_scheduler_kwargs.num_cycles=2", "training.lr_scheduler_kwargs", {"num_cycles": 2}),
        ("training.lr_scheduler_kwargs={num_cycles: 2}", "training.lr_scheduler_kwargs", {"num_cycles": 2}),
        ("adapter=null", "adapter", None),
        ("adapter.target_modules=[q_proj, v_proj]", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("adapter.target_modules=all-linear", "adapter.target_modules", "all-linear"),
        ("adapter.init_lora_weights=pissa_niter_4", "adapter.init_lora_weights", "pissa_niter_4"),
        ("data.train=[a.jsonl, b.jsonl]", "data.train", ["a.jsonl", "b.jsonl"]),
        ("data.train=dir/with=sign.jsonl", "data.train", "dir/with=sign.jsonl"),
        ("data.eval_size=0.1", "data.eval_size", 0.1),
        ("data.eval_size=20", "data.eval_size", 20),
        ('model.revision="12345"', "model.revision", "12345"),
        ("model={name: other}", "model.name", "other"),
        ("engine.chunk_tokens=2048", "engine.chunk_tokens", 2048),
        ("engine.gradient_checkpointing=false", "engine.gradient_checkpointing", False),
    ],
)
def test_an_override_replaces_one_value(recipe_file: Path, override: str, key: str, expected: Any) -> None:
    value: Any = load_recipe(recipe_file, [override])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_later_overrides_win_and_reach_into_a_null_section(recipe_file: Path) -> None:
    recipe: Any = load_recipe(recipe_file, ["adapter=null", "adapter.r=4", "adapter.r=8"])
    assert recipe.adapter.r == 8


def test_an_objective_without_a_name_is_rrhf_and_sft_is_its_own(recipe_file: Path) -> None:
    assert isinstance(load_recipe(recipe_file, ["objective.margin=0.5"]).objective, RRHFObjective)
    assert isinstance(load_recipe(recipe_file, ["objective.name=sft"]).objective, SFTObjective)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter=null"],
        ["adapter.r=8", "adapter.target_modules=[q_proj]", "adapter.rank_pattern={q_proj: 4}"],
        ["model.init_adapter=runs/first"],
        ["objective.name=sft", "objective.tied_best=mean"],
        ["objective.variant=paper", "objective.rank_weight=1e-3", "objective.sft_reduction=mean"],
        ["training.learning_rate=1e-4", "training.eval_strategy=no", "training.save_strategy=no"],
        ["training.optim=paged_adamw_8bit", "training.report_to=[tensorboard]"],
        ["data.train=[ä.jsonl, 'b: c.jsonl']", "data.eval_size=0.25", "engine.chunk_tokens=512"],
    ],
)
def test_the_snapshot_loads_to_an_equal_recipe(recipe_file: Path, tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(recipe_file, overrides)
    snapshot = tmp_path / "snapshot.yaml"
    snapshot.write_text(recipe_text(recipe), encoding="utf-8")
    again = load_recipe(snapshot)
    assert again == recipe
    assert recipe_text(again) == recipe_text(recipe)


def test_a_snapshot_says_what_the_run_used_even_where_the_recipe_did_not(recipe_file: Path) -> None:
    values = yaml.safe_load(recipe_text(load_recipe(recipe_file)))
    assert values["objective"]["rank_weight"] == 1.0
    assert values["data"]["max_tokens"] == 512
    assert list(values) == ["model", "adapter", "data", "objective", "engine", "training"]


def test_a_recipe_without_training_serves_the_verbs_that_do_not_train(tmp_path: Path) -> None:
    candidates = [{"strategy": "diverse_beam", "temperature": 0.8}]
    values = {"sampling": {"prompts": "a.txt", "output": "b.jsonl", "candidates": candidates}}
    recipe = make_recipe(values, needs=["sampling"])
    assert recipe.data is None
    (tmp_path / "snapshot.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "snapshot.yaml", needs=["sampling"]) == recipe
    with pytest.raises(UserError, match=r"data: this key is required\. training: this key is required"):
        load_recipe(tmp_path / "snapshot.yaml")


def test_the_json_schema_takes_a_good_recipe_and_refuses_bad_ones(recipe_file: Path) -> None:
    schema = json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    good = yaml.safe_load(recipe_file.read_text())
    validator.validate(good)
    validator.validate({**good, "adapter": None, "objective": {"name": "sft"}})
    for bad in (
        {"model": {}},
        {**good, "modell": {}},
        {**good, "training": {"learning_rat": 1.0}},
        {**good, "data": {"train": "a", "max_tokens": "many"}},
        {**good, "objective": {"name": "rrhf", "variant": "papers"}},
    ):
        assert not validator.is_valid(bad)


SHIPPED = sorted(
    path
    for path in (Path(__file__).resolve().parents[2] / "recipes").rglob("*.yaml")
    if path.parent.name != "accelerate" and path.parts[-2:] not in [tuple(name.split("/")) for name in NO_RECIPES]
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_json_schema_takes_every_shipped_recipe(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_json_schema_knows_incomplete_recipes(validator: jsonschema.Draft202012Validator) -> None:
    validator.validate({"extends": "a.yaml", "data": {"eval_size": None}, "scoring": {"scorer": {"template": "hh"}}})
    validator.validate({"extends": "a.yaml", "evaluation": {"policies": {"base": None, "mine": {"adapter": "run"}}}})
    validator.validate({"rounds": {"output": "runs/x"}, "sampling": {"prompts": "a"}})
    for bad in (
        {"extends": 3},
        {"extends": "a.yaml", "data": {"max_tokns": 3}},
        {"extends": "a.yaml", "data": {"max_tokens": "many"}},
        {"rounds": {"output": "x"}, "sampling": {"promts": "a"}},
        {"sampling": {"prompts": "a"}},
    ):
        assert not validator.is_valid(bad), bad


def test_every_field_of_our_own_sections_is_documented() -> None:
    ours = ("ModelSection", "DataSection", "RRHFObjective", "SFTObjective", "EngineSection")
    for name in (*ours, "SamplingSection", "CandidatesSection", "EndpointSection"):
        fields = json_schema()["$defs"][name]["properties"]
        assert not [field for field, item in fields.items() if field != "name" and not item.get("description")]


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = make_recipe({"model": {"name": "x"}, "data": {"train": "a"}, "training": {"output_dir": "o"}})
    with pytest.raises(ValueError, match="frozen"):
        recipe.model.name = "y"  # type: ignore[misc]


def test_a_recipe_made_in_python_takes_overrides_and_leaves_its_values_alone() -> None:
    values = {"model": {"name": "x"}, "data": {"train": "a"}, "training": {"output_dir": "o"}}
    recipe = make_recipe(values, overrides=["model.quantization=nf4", "data.max_tokens=8"])
    assert (recipe.model.quantization, recipe.data.max_tokens) == ("nf4", 8)
    assert values == {"model": {"name": "x"}, "data": {"train": "a"}, "training": {"output_dir": "o"}}


def test_a_recipe_made_in_python_names_its_origin_in_errors() -> None:
    with pytest.raises(UserError, match=r"^my-sweep: model\.nme: unknown key; did you mean 'name'\?"):
        make_recipe({"model": {"name": "x", "nme": "y"}, "data": {"train": "a"}, "training": {}}, where="my-sweep")
