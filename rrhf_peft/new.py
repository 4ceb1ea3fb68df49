"""`rrhf-peft new`: a recipe for this model, this data and this much memory, with the reason beside each choice.

What can be measured is measured: the data's format, template, k and lengths, and the memory by the plan. The rest are
the settings that published adapters of this kind were trained with, to change where one knows better.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rrhf_peft.data import chat_messages, prompt_text, ranked_statistics, read_groups
from rrhf_peft.files import replace_text
from rrhf_peft.modeling import load_tokenizer, resolve_source
from rrhf_peft.modeling.base_model import load_config
from rrhf_peft.plan.run import MemoryPlan, plan_memory
from rrhf_peft.recipe import json_schema, make_recipe
from rrhf_peft.records import RankedGroup, UserError

SCHEMA = "recipe.schema.json"
#: Assumed of the GPU where none is here and --fit does not say.
USUAL_GIB = 24.0
#: The CUDA context and fragmentation, which no plan counts.
UNCOUNTED_GIB = 2.0
#: Groups whose lengths are counted.
_MOST_MEASURED = 1000


class Lengths(NamedTuple):
    """Tokens that all but one in a hundred groups stay within, in multiples of 64 and within the model's context."""

    prompt: int
    whole: int
    longer: float  # share of groups that max_tokens cuts


@dataclass(frozen=True)
class NewRecipe:
    """A recipe's text, and what its reader should know besides."""

    text: str
    notes: list[str]
    plan: MemoryPlan


def new_recipe(model: str, data: str, name: str, *, fit_gib: float | None = None) -> NewRecipe:
    """Look at model and data, and write the recipe of an adapter that fits into the memory.

    Args:
        model: Hub id or folder of the base model.
        data: Ranked data: a file, a folder or a hub id.
        name: Of the recipe and of its run folder below `runs`.
        fit_gib: Memory of the GPU; None: of the one that is here, else `USUAL_GIB`.

    Raises:
        UserError: model or data cannot be read.
    """
    groups = read_groups(data)
    tokenizer = load_tokenizer(model)
    context = getattr(load_config(resolve_source(model)).get_text_config(), "max_position_embeddings", None) or 4096
    template, why = _template(tokenizer, groups)
    lengths = _lengths(groups, tokenizer, template, context)
    statistics = ranked_statistics(groups)
    gib, whose = _memory(fit_gib)
    values = _values(model, data, name, template, lengths, len(groups))
    plan, fits = _within(values, gib - UNCOUNTED_GIB)
    notes = []
    if not fits:
        notes.append(
            f"The plan's {plan.peak_bytes / 2**30:.1f} GiB do not fit into {gib:g} GiB with {UNCOUNTED_GIB:g} GiB for "
            "CUDA itself: take a smaller model, or shard it over several GPUs (recipes/accelerate)."
        )
    if statistics.groups_without_order:
        notes.append(
            f"{statistics.groups_without_order:,} of {statistics.groups:,} groups have no two different scores: "
            "they teach nothing about order, and training leaves them out."
        )
    if template == "raw" and re.search(r"instruct|chat|[-_]it\b", Path(model).name, flags=re.IGNORECASE):
        notes.append(
            f"{model} is named like an instruct model, and its tokenizer has no chat template: with template raw it "
            "reads prompts as it never did before. Name a tokenizer that has one in model.tokenizer."
        )
    ks = sorted(statistics.k_histogram)
    comments = {
        "quantization": f"planned: {plan.peak_bytes / 2**30:.1f} GiB of the {gib:g} GiB {whose}, and about "
        f"{UNCOUNTED_GIB:g} GiB for CUDA itself",
        "train": f"{statistics.groups:,} groups with k = {ks[0]}"
        + (f" to {ks[-1]}" if len(ks) > 1 else "")
        + f"; {statistics.tied_pairs / max(statistics.pairs, 1):.0%} of the pairs are tied",
        "template": why,
        "max_prompt_tokens": "all but one prompt in a hundred; longer ones lose their beginning",
        "max_tokens": f"prompt and response; {lengths.longer:.1%} of the groups have a longer response, which is cut",
        "eval_size": "groups to measure on that are not trained on",
        "chunk_tokens": "as many tokens as the memory takes at once" if fits else "the least; see `rrhf-peft plan`",
        "variant": "both losses matter; paper and released are the other two",
        "learning_rate": "usual for LoRA; try half and double",
        "num_train_epochs": "more where the data is small",
        "gradient_accumulation_steps": "times the batch: groups per optimizer step",
    }
    return NewRecipe(_text(values, comments, name, model, data), notes, plan)


def write_recipe(recipe: NewRecipe, path: Path) -> None:
    """Write the recipe, and beside it the schema that its first line names for editors.

    Raises:
        UserError: there is a file of that name already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path}: is there already. Name another file with --output, or remove it.")
    write_schema(path.with_name(SCHEMA))
    replace_text(path, recipe.text)


def write_schema(path: Path) -> None:
    """Write the recipe's JSON schema to a file, in place of an earlier one.

    Raises:
        UserError: `path` is there and is not what `rrhf-peft schema` wrote before.
    """
    if path.exists():
        try:
            is_small = path.is_file() and path.stat().st_size < 10**7
            now = json.loads(path.read_text(encoding="utf-8")) if is_small else None
        except (OSError, ValueError, RecursionError):
            now = None
        if not isinstance(now, dict) or now.get("title") != "Recipe" or "$schema" not in now:
            raise UserError(
                f"{path}: is there already, and is not a recipe's JSON schema. Name another file, or remove it."
            )
    replace_text(path, json.dumps(json_schema(), indent=2) + "\n")


def _template(tokenizer: Any, groups: Sequence[RankedGroup]) -> tuple[str, str]:
    """The template to train with, and why."""
    if tokenizer.chat_template:
        return "chat", "the tokenizer's own chat template, which this model was trained with"
    if any(isinstance(group.prompt, str) and len(chat_messages(group.prompt)) > 1 for group in groups[:100]):
        return "hh", "the prompts are transcripts of Human and Assistant, and the tokenizer has no chat template"
    return "raw", "prompts as they are: the tokenizer has no chat template"


def _lengths(groups: Sequence[RankedGroup], tokenizer: Any, template: str, context: int) -> Lengths:
    measured = random.Random(0).sample(list(groups), min(_MOST_MEASURED, len(groups)))
    prompts, wholes = [], []
    for group in measured:
        texts = [prompt_text(group, tokenizer, template), *group.responses]
        prompt, *responses = map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        prompts.append(prompt + 1)  # BOS
        wholes.append(prompt + max(responses, default=0) + 2)

    def rounded(lengths: list[int]) -> int:
        return int(-(-np.percentile(lengths, 99, method="higher") // 64) * 64)

    whole = min(context, rounded(wholes))
    return Lengths(min(rounded(prompts), whole - whole // 4), whole, float(np.mean(np.array(wholes) > whole)))


def _memory(fit_gib: float | None) -> tuple[float, str]:
    """GiB to fit into, and whose they are."""
    if fit_gib is not None:
        return fit_gib, "to fit into"
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1), "of the GPU here"
    return USUAL_GIB, "that were assumed, as no GPU is here"


def _values(model: str, data: str, name: str, template: str, lengths: Lengths, groups: int) -> dict[str, Any]:
    """The recipe as values, before its memory is known."""
    per_step = 64 if groups >= 2000 else 32 if groups >= 500 else 8
    held_out = {"eval_size": min(200, groups // 10)} if groups >= 20 else {}
    return {
        "model": {"name": model, "quantization": "none"},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {
            "train": data,
            "template": template,
            "max_prompt_tokens": lengths.prompt,
            "max_tokens": lengths.whole,
            **held_out,
        },
        "objective": {"name": "rrhf", "variant": "balanced"},
        "engine": {"chunk_tokens": "auto"},
        "training": {
            "output_dir": f"runs/{name}",
            "learning_rate": 1e-4,
            "num_train_epochs": 1 if groups >= 10_000 else 3,
            "per_device_train_batch_size": min(8, per_step),
            "gradient_accumulation_steps": max(1, per_step // 8),
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            **({"eval_strategy": "epoch"} if held_out else {}),
            "seed": 0,
        },
    }


def _within(values: dict[str, Any], gib: float) -> tuple[MemoryPlan, bool]:
    """Set quantisation and chunk to the first that fits, in place; else to the least there is."""
    for quantization, chunk in (("none", "auto"), ("nf4", "auto"), ("nf4", 4096), ("nf4", 2048), ("nf4", 1024)):
        values["model"]["quantization"] = quantization
        values["engine"]["chunk_tokens"] = chunk
        plan = plan_memory(make_recipe(values, where="the new recipe"))
        if plan.peak_bytes <= gib * 2**30:
            return plan, True
    return plan, False


def _text(values: dict[str, Any], comments: dict[str, str], name: str, model: str, data: str) -> str:
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# Made by `rrhf-peft new` from {model} and {data}; the comments say what it saw.".replace("\n", " "),
        "#",
        f"#   rrhf-peft train {name}.yaml --dry-run     the longest batch, the memory, an estimate of the time",
        f"#   rrhf-peft train {name}.yaml",
        f"#   rrhf-peft chat runs/{name}",
        f"#   rrhf-peft merge runs/{name} --output runs/{name}-merged",
    ]
    for section, keys in values.items():
        lines += ["", f"{section}:"]
        for key, value in keys.items():
            comment = f"  # {comments[key]}" if key in comments else ""
            lines.append(f"  {key}: {_yaml(value)}{comment}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z./~][\w./~-]*", value):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
