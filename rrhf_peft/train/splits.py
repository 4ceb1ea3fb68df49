"""A recipe's data section, done: which groups are trained on and which are held out, as text and as tokens.

`train` and `rrhf-peft inspect` both go through here, so that what is inspected is what is trained on.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from rrhf_peft.data import hold_out, read_groups, tokenize_groups
from rrhf_peft.objectives import NEEDS_PAIRS
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.train.online_prompts import read_online_groups, tokenize_prompts


def read_splits(recipe: Recipe) -> dict[str, list[RankedGroup]]:
    """The groups of `train`, and of `eval` where the recipe names or holds out such data.

    `training.seed` decides which groups `data.eval_size` holds out. Of an online recipe the groups of `train` may
    have no responses.
    """
    data, training = recipe.data, recipe.training
    where: dict[str, Any] = {"format": data.format, "split": data.split, "max_groups": data.max_groups}
    seed = TrainingArguments.seed if training.seed is None else training.seed  # type: ignore[attr-defined]
    groups = {"train": (read_groups if recipe.online is None else read_online_groups)(data.train, **where)}
    if data.eval is not None:
        groups["eval"] = read_groups(data.eval, format=data.format, split=data.eval_split, max_groups=data.max_groups)
    elif data.eval_size is not None:
        groups["train"], groups["eval"] = hold_out(groups["train"], data.eval_size, seed)
        if recipe.online is not None and not any(group.responses for group in groups["eval"]):
            raise UserError(
                "data.eval_size: online training needs no responses in data.train, but held-out data does, and there "
                "are none. Name ranked data in data.eval, or remove data.eval_size."
            )
    return groups


def tokenize_splits(
    recipe: Recipe, groups: dict[str, list[RankedGroup]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same splits as tokens, each with its report.

    They are `TokenizedGroup` with a `DataReport`; of an online recipe, `train` is `OnlinePrompt` with a `PromptReport`.
    """
    data, online = recipe.data, recipe.online
    splits: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    for name, split in groups.items():
        if name == "train" and online is not None:
            splits[name], reports[name] = tokenize_prompts(
                split,
                tokenizer,
                template=data.template,
                max_prompt_tokens=data.max_prompt_tokens or data.max_tokens - online.decoding.max_new_tokens,
                overlong_prompt=data.overlong_prompt,
                keep_provided=online.keep_provided,
            )
            continue
        splits[name], reports[name] = tokenize_groups(
            split,
            tokenizer,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_tokens=data.max_tokens,
            overlong_prompt=data.overlong_prompt,
            needs_pairs=recipe.objective.name in NEEDS_PAIRS,
            min_score_gap=getattr(recipe.objective, "min_score_gap", 0.0),
        )
    return splits, reports
