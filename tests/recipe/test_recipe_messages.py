"""A mistake in a recipe is answered with the file, the line, the key and the way out, in one paragraph."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from rrhf_peft.recipe import load_recipe, recipe_text
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
        ("loops.k=4", ["loops (override): unknown key; known keys: adapter, compare, data, engine"]),
        ("training.gradient_checkpointing=true", ["set engine.gradient_checkpointing instead"]),
        ("training.warmup_ratio=0.03", ["set training.warmup_steps to a share below 1"]),
        ("adapter.rank=8", ["set adapter.r instead"]),
        ("adapter.frobnicate=8", ["`rrhf-peft schema` prints the known keys"]),
        ("model.load_in_4bit=true", ["set model.quantization: nf4 instead"]),
        # wrong values
        ("model.quantization=nf5", ["'nf5' is not one of 'none', 'int8', 'nf4' or 'fp4'; did you mean 'nf4'?"]),
        (
            "objective.name=rrfh",
            ["'rrfh' is not one of the known values; did you mean 'rrhf'?"],
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
        ("1: 2\n", ["line 1: this is not valid YAML (the key 1 is not text; put quotes around it)"]),
        ("model: &again\n  name: x\n  more: *again\n", ["line 1", "contains itself, through an alias"]),
        ("model:\n  <<: {name: x}\n  ~: y\n", ["line 3", "the key ~ is not text"]),
        ("model:\n  name: !!int x\n", ["line 2", "'x' is not a whole number"]),
        ("model:\n  name: !!float 1:x\n", ["line 2", "'1:x' is not a number"]),
        ("model:\n  name: !!timestamp 2024-13-45\n", ["line 2", "could not determine a constructor"]),
        ("model:\n  name: !!python/name:os.system x\n", ["line 2", "could not determine a constructor"]),
        ("model:\n  name: !!binary aGk=\n", ["line 2", "could not determine a constructor"]),
        ("data:\n  max_tokens: 9" + 30 * "9", ["line 2", "is not a whole number below 2**63"]),
        ("data:\n  max_tokens: 9" + 9000 * "9", ["line 2", "is not a whole number below 2**63"]),
        ("data:\n  max_tokens: 0100\n", ["data.max_tokens (line 2)", "without zeros in front"]),
        ("data:\n  max_tokens: 1:30\n", ["data.max_tokens (line 2): must be a whole number, not '1:30'"]),
        ("data:\n  max_tokens: 0x10\n", ["data.max_tokens (line 2): must be a whole number, not '0x10'"]),
        ("data:\n  max_tokens: 2024-01-01\n", ["data.max_tokens (line 2)", "not '2024-01-01' (text)"]),
        ('model:\n  name: "a\\0b"\n', ["line 2", "a character that no file can hold"]),
        ('model:\n  name: "\\uD800"\n', ["line 2", "a character that no file can hold"]),
        ("model: " + 5000 * "[", ["line 1", "levels of nesting"]),
        ("model:\n" + "".join(" " * depth + "a:\n" for depth in range(1, 200)), ["levels of nesting"]),
        ("model: *nowhere\n", ["line 1", "undefined alias"]),
        ("model: {name: x}\n---\nmodel: {name: y}\n", ["line 2", "but found another document"]),
        (
            "a: &a [x]\n" + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in itertools.pairwise("abcdefghijklmnopqrs")),
            ["aliases written out"],
        ),
        (
            "a: &a [x]\n" + "".join(f"k{n + 1}: &k{n + 1} [*{'a' if n == 0 else f'k{n}'}]\n" for n in range(60)),
            ["aliases written out"],
        ),
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
    binary.write_bytes(b"model:\n \xff\xfe")
    assert "it is not UTF-8 text, line 2" in error_of(binary)
    binary.write_text("model: {name: x}", encoding="utf-16")
    assert "UTF-16" in error_of(binary)
    binary.write_text("#" * 300_000)
    assert "larger than 256 KiB" in error_of(binary)
    assert "it is not a regular file" in error_of(Path("/dev/null"))
    assert "cannot read this recipe" in error_of(tmp_path / ("x" * 5000))


def test_a_fifo_is_no_recipe_and_nobody_waits_for_it(tmp_path: Path) -> None:
    fifo = tmp_path / "recipe.yaml"
    os.mkfifo(fifo)
    assert "it is not a regular file" in error_of(fifo)


def test_a_byte_order_mark_is_no_part_of_the_first_key(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\xef\xbb\xbf" + recipe_file.read_bytes())
    assert load_recipe(recipe_file).model.name == "some/model"


def test_dates_and_hashes_are_text_and_stay_so_in_the_snapshot(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["model.revision=2024-01-01", 'model.tokenizer="123e4567"'])
    assert (recipe.model.revision, recipe.model.tokenizer) == ("2024-01-01", "123e4567")
    (tmp_path / "snapshot.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "snapshot.yaml") == recipe


def test_merge_keys_work_and_a_change_of_one_alias_is_not_one_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sampling:\n  prompts: p\n  output: o.jsonl\n  candidates:\n"
        "  - &first {strategy: top_p, k: 2}\n  - *first\n  - {<<: *first, source: third}\n"
    )
    recipe = load_recipe(path, ["sampling.candidates.0.k=4"], needs=[])
    assert [entry.k for entry in recipe.sampling.candidates] == [4, 2, 2]


@pytest.mark.parametrize("key", ["sampling.candidates.0.k", "sampling.candidates[0].k", '"sampling".candidates.0."k"'])
def test_an_override_reaches_into_lists(tmp_path: Path, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"sampling": {"prompts": "a", "output": "b", "candidates": [{"strategy": "top_p"}]}}))
    assert load_recipe(path, [f"{key}=9"], needs=[]).sampling.candidates[0].k == 9
    for wrong in ("sampling.candidates.1.k", "sampling.candidates.x.k", "sampling.candidates[99999999999]"):
        assert "is a list of 1" in error_of(path, f"{wrong}=4")


def test_an_override_names_keys_with_points_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    policies = {"v1.5": {"adapter": "a"}}
    path.write_text(json.dumps({"evaluation": {"prompts": "a", "output": "b", "policies": policies}}))
    changed = load_recipe(path, ['evaluation.policies."v1.5".adapter=other'], needs=[])
    assert changed.evaluation.policies["v1.5"].adapter == "other"
    assert 'evaluation.policies."v1.5".adaptr (override): unknown key; did you mean' in error_of(
        path, 'evaluation.policies."v1.5".adaptr=x'
    )


JUDGE = {"name": "judge", "base_url": "u", "model": "m"}
RULE = {"name": "rule", "function": "a:b"}


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ({"scoring": {"scorer": {**RULE, "functon": "x"}}}, "scoring.scorer.functon", "function"),
        (
            {"scoring": {"scorer": {"name": "composite", "parts": {"a": {"scorer": {**JUDGE, "temprature": 1}}}}}},
            "scoring.scorer.parts.a.scorer.temprature",
            "temperature",
        ),
        ({"scoring": {"scorer": {"name": "composite", "parts": {"a": {"wieght": 1}}}}}, "parts.a.wieght", "weight"),
        ({"evaluation": {"policies": {"mine": {"adaptor": "x"}}}}, "evaluation.policies.mine.adaptor", "adapter"),
        ({"evaluation": {"scorers": {"s": {**RULE, "fuction": "x"}}}}, "evaluation.scorers.s.fuction", "function"),
        (
            {"evaluation": {"wins": {"against": "base", "by": {**JUDGE, "aspcts": {}}}}},
            "evaluation.wins.by.aspcts",
            "aspects",
        ),
        ({"online": {"scorer": {**RULE, "functon": "x"}}}, "online.scorer.functon", "function"),
        ({"online": {"decoding": {"strategy": "top_p", "tempratur": 1}}}, "online.decoding.tempratur", "temperature"),
        ({"objective": {"name": "kto", "desirable_wieght": 1}}, "objective.desirable_wieght", "desirable_weight"),
    ],
)
def test_a_misspelt_key_has_its_neighbour_named_in_every_depth(
    tmp_path: Path, section: dict[str, object], key: str, nearest: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(section, indent=1))
    message = error_of(path)
    assert f"{key} (line " in message
    assert f"unknown key; did you mean '{nearest}'?" in message


def test_the_key_in_an_error_can_be_pasted_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    candidates = [{"strategy": "top_p"}, {"strategy": "top_p", "k": "four"}]
    path.write_text(json.dumps({"sampling": {"prompts": "a", "output": "b", "candidates": candidates}}))
    key = re.search(r"(sampling\S+) \(line 1\): must be a whole number", error_of(path))
    assert key is not None
    assert load_recipe(path, [f"{key[1]}=4"], needs=[]).sampling.candidates[1].k == 4


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"training.{key}={value}"
            for key in ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
            for value in (0, -1)
        ),
        *(
            f"training.{key}=0"
            for key in (
                "learning_rate",
                "max_steps",
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "gradient_accumulation_steps",
                "save_total_limit",
                "adam_epsilon",
            )
        ),
        *(f"training.{key}=-1" for key in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed")),
        "training.max_steps=-2",
        "training.adam_beta1=1",
        "training.seed=99999999999",
        "adapter.r=0",
        "adapter.r=-4",
        "adapter.lora_alpha=0",
        "adapter.lora_dropout=1",
        "data.train=",
        "data.train=[]",
        "data.train=' '",
        "data.train=[a, '']",
        "data.eval=",
        "model.name=' '",
        "model.tokenizer=",
        "model.init_adapter=",
        *(f"training.output_dir={path}" for path in ("", ".", "..", "/", "./", "../..", "'~'", "' '")),
    ],
)
def test_nonsense_is_refused_before_anything_is_read(recipe_file: Path, override: str) -> None:
    message = error_of(recipe_file, override)
    assert override.partition("=")[0] in message


@pytest.mark.parametrize("section", ["sampling", "scoring", "evaluation", "rounds"])
@pytest.mark.parametrize("path", ["", ".", "/", "..", "././"])
def test_an_output_that_is_everybodys_folder_is_refused(tmp_path: Path, section: str, path: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({section: {"output": path}}))
    assert f"{section}.output (line 1): " in error_of(recipe)


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc/passwd", "..", "", "a\nb", "\x1b[31m"])
def test_names_of_policies_and_scorers_stay_inside_the_evaluations_folder(tmp_path: Path, name: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {"prompts": "a", "output": "b", "policies": {name: {}}}
    recipe.write_text(json.dumps({"evaluation": values}))
    assert "names a file as well" in error_of(recipe)
    values = {"prompts": "a", "output": "b", "policies": {"base": {}}, "scorers": {name: RULE}}
    recipe.write_text(json.dumps({"evaluation": values}))
    assert "names a file as well" in error_of(recipe)
