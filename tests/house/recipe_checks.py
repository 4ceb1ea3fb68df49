"""What is asked of every shipped recipe, and the models that they name, as far as a plan needs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rrhf_peft.plan.run import plan_memory
from rrhf_peft.recipe import load_recipe, recipe_text

ROOT = Path(__file__).resolve().parents[2]

_LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

#: config.json of the models that recipes name, so that they can be planned without a network.
CONFIGS = {
    "huggyllama/llama-7b": _LLAMA_7B,
    "chavinlo/alpaca-native": {**_LLAMA_7B, "vocab_size": 32001},
    "Qwen/Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}


def name_in_repository(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def header_of(path: Path) -> str:
    """The comment at the top, one line for each paragraph of it that goes on with three blanks."""
    lines = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group()
    return re.sub(r"(?<=[^\\])\n#   (?! )", " ", lines)


def assert_header_is_complete(path: Path) -> None:
    header = header_of(path)
    assert name_in_repository(path) in header
    for part in ("# Hardware: ", "# Expect: "):
        assert part in header
    assert re.search(r"^# (Run|Not run):? ", header, flags=re.MULTILINE)


def assert_snapshot_is_the_same(path: Path, folder: Path) -> None:
    recipe = load_recipe(path, needs=[])
    (folder / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(folder / "recipe.yaml", needs=[]) == recipe


#: What was planned in this session; recipes that differ only in what a plan does not read share one.
_peaks: dict[str, int] = {}


def assert_plan_is_the_stated_one(path: Path, folder: Path) -> None:
    """`Expect:` states a peak and the command that predicts it; the prediction is made again."""
    stated = re.search(r"peak of ([0-9.]+) GiB.*?`rrhf-peft plan (\S+)([^`]*)`", header_of(path), flags=re.DOTALL)
    assert stated is not None
    peak, name, options = stated.groups()
    assert name == name_in_repository(path)
    keywords = {option: int(value) for option, value in re.findall(r"--(\w+) (\d+)", options)}
    recipe = load_recipe(path)
    unread = {"data": {"train"}, "training": {"output_dir", "learning_rate"}}
    values = recipe.model_dump(mode="json", include={"model", "adapter", "data", "engine", "training"}, exclude=unread)
    key = json.dumps([values, keywords], sort_keys=True)
    if key not in _peaks:
        (folder / "config.json").write_text(json.dumps(CONFIGS[recipe.model.name]))
        _peaks[key] = plan_memory(load_recipe(path, [f"model.name={folder}"]), **keywords).peak_bytes
    assert f"{_peaks[key] / 2**30:.1f}" == peak
