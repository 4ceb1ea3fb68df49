"""A mistake in a recipe is answered with the file, the line, the key and the way out, in one paragraph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rrhf_peft.recipe import load_recipe
from rrhf_peft.records import UserError


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.rstrip().endswith((".", "?"))
    assert not message.endswith("?.")
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys: the nearest name, the right section, or where the setting lives now
        ("training.learning_rat=1e-4", ["training.learning_rat (override)", "did you mean 'learning_rate'?"]),
        ("traning.learning_rate=1e-4", ["traning (override)", "did you mean 'training'?"]),
        ("learning_rate=1e-4", ["did you mean 'training.learning_rate'?"]),
        ("training.variant=paper", ["did you mean 'objective.variant'?"]),
        ("objective.rank_weigth=2", ["did you mean 'rank_weight'?"]),
        ("loops.k=4", ["loops (override): unknown key; known keys: adapter, data, engine"]),
        ("training.gradient_checkpointing=true", ["set engine.gradient_checkpointing instead"]),
        ("training.warmup_ratio=0.03", ["set training.warmup_steps to a share below 1"]),
        ("adapter.rank=8", ["set adapter.r instead"]),
        ("adapter.frobnicate=8", ["`rrhf-peft schema` prints the known keys"]),
        ("model.load_in_4bit=true", ["set model.quantization: nf4 instead"]),
        # wrong values
        ("model.quantization=nf5", ["'nf5' is not one of 'none', 'int8', 'nf4' or 'fp4'; did you mean 'nf4'?"]),
        (
            "objective.name=rrfh",
            ["'rrfh' is not one of 'rrhf', 'sft', 'dpo', 'ipo'", "'pro'; did you mean 'rrhf'?"],
        ),
        ("training.optim=adamw_torc", ["not one of the known values; did you mean 'adamw_torch'?"]),
        ("engine.chunk_tokens=0", ["must be 'auto' or greater than or equal to 1, not 0"]),
        ("engine.chunk_tokens=big", ["must be 'auto' or a whole number, not 'big' (text)"]),
        ("objective.rank_weight=-1", ["must be greater than or equal to 0, not -1"]),
        ("objective.rank_weight=.nan", ["must be a finite number, not nan"]),
        ("training.logging_steps=.inf", ["must be a finite number, not inf"]),
        # wrong types
        ("training.learning_rate=fast", ["must be a number, not 'fast' (text)"]),
        ('training.learning_rate="1e-4"', ["must be a number", "write the number without quotes"]),
        ("training.learning_rate=true", ["must be a number, not true"]),
        ("data.max_tokens=12.5", ["must be a whole number, not 12.5"]),
        ("data.eval_size=true", ["must be a number, not true"]),
        ("engine.gradient_checkpointing=yes", ["must be 'auto' or true or false", "without quotes"]),
        ("model.revision=1234567", ["must be text, not 1234567; write 'model.revision=\"1234567\"'"]),
        ("model.name=", ["must be text that is not empty"]),
        ("data.train={a: 1}", ["must be text or a list, not {'a': 1} (a mapping)"]),
        ("data=5", ["must be a section with keys of its own, not 5"]),
        ("objective=rrhf", ["must be a section with keys of its own, not 'rrhf' (text)"]),
        ("data.train=null", ["must be text or a list, not nothing"]),
        # what is not an override
        ("training.learning_rate", ["'training.learning_rate' is not an override. Write section.key=value"]),
        ("=3", ["is not an override"]),
        ("model.name.first=x", ["model.name is text, not a section"]),
        ("model.name=[a", ["the value is not valid YAML", "Put quotes around text"]),
    ],
)
def test_a_wrong_override(recipe_file: Path, override: str, parts: list[str]) -> None:
    message = error_of(recipe_file, override)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.quantization=nf4", "adapter=null"], ["adapter: null trains all weights, but nf4", "none"]),
        (["model.init_adapter=a", "adapter.r=3"], ["init_adapter brings its own"]),
        (["model.init_adapter=a", "adapter=null"], ["init_adapter brings its own"]),
        (["engine.layout=shared", "model.attention=flash_attention_2"], ["use sdpa or plain"]),
        (["data.max_tokens=16", "data.max_prompt_tokens=16"], ["leaves no token", "raise data.max_tokens"]),
        (["data.eval=e.jsonl", "data.eval_size=5"], ["already names held-out data"]),
        (["data.eval_size=1.5"], ["is a share and must be below 1"]),
        (["training.eval_strategy=steps"], ["needs held-out data; set data.eval or data.eval_size"]),
        (["training.fp16=true", "training.bf16=true"], ["exclude each other"]),
        (["training.output_dir=null"], ["training.output_dir: is required"]),
        (["objective.variant=released", "objective.sft_reduction=sum"], ["padded length; remove it"]),
        (["objective.rank_weight=0", "objective.sft_weight=0"], ["nothing would be trained"]),
        (["objective.name=sft", "objective.variant=paper"], ["known keys of objective sft: name, sft_reduction"]),
    ],
)
def test_settings_that_cannot_go_together(recipe_file: Path, overrides: list[str], parts: list[str]) -> None:
    message = error_of(recipe_file, *overrides)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {name: x\ndata: 3", ["line 2: this is not valid YAML"]),
        ("model:\n  name: x\n  name: y\n", ["line 3: this is not valid YAML (the key 'name' is given twice)"]),
        ("model:\n\tname: x\n", ["line 2: this is not valid YAML"]),
        ("model: \x00", ["not valid YAML"]),
        ("", ["a recipe is a mapping of sections (model, data, training ...), not nothing"]),
        ("- model", ["not a list"]),
        ("model", ["not text"]),
        ("model:\n  name: x\n  quant: nf4\ndata:\n  trian: y\n", ["model.quant (line 3)", "data.trian (line 5)"]),
        ("? [a, b]\n: 1\n", ["not valid YAML"]),
        ("1: 2\n", ["1 (line 1): a key must be text; put quotes around it"]),
        ("model: &again\n  name: x\n  more: *again\n", ["model.more (line 3): unknown key"]),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    message = error_of(path)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"temprature": 0.7}, "sampling.candidates.0.temprature (line 1): unknown key; did you mean 'temperature'?"),
        ({"num_beams": 4}, "sampling.candidates.0.num_beams: has no effect with strategy top_p"),
        ({"backend": "endpoint"}, "sampling.candidates.0.endpoint: goes with backend: endpoint"),
        ({"strategy": "beam", "k": 4, "num_beams": 2}, "4 responses cannot come from 2 beams"),
        ({"strategy": "diverse_beam", "num_beam_groups": 3}, "4 beams do not split into 3 equal groups"),
        ({"strategy": "diverse_beam", "backend": "vllm"}, "vllm has no diverse beam search"),
        ({"endpoint": {"base_url": "u"}}, "sampling.candidates.0.endpoint.model"),
    ],
)
def test_wrong_candidates(tmp_path: Path, entry: dict[str, object], part: str) -> None:
    path = tmp_path / "wrong.yaml"
    candidates = [{"strategy": "top_p", **entry}]
    path.write_text(json.dumps({"sampling": {"prompts": "a", "output": "b", "candidates": candidates}}))
    assert part in error_of(path)


def test_every_missing_section_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("model: {name: x}\n")
    message = error_of(path)
    assert "data: this key is required" in message
    assert "training: this key is required" in message


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path, recipe_file: Path) -> None:
    message = error_of(recipe_file.with_name("recip.yaml"))
    assert "there is no such recipe" in message
    assert f"did you mean '{recipe_file}'" in message
    assert "there is no such recipe. Check the path." in error_of(tmp_path / "nowhere" / "x.yaml")


def test_a_folder_and_bytes_that_are_not_text_are_no_recipe(tmp_path: Path) -> None:
    assert "cannot read this recipe" in error_of(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe")
    assert "it is not UTF-8 text" in error_of(binary)
