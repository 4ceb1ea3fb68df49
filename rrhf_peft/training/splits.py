"""A recipe's data section, done: which groups are trained on and which are held out, as text and as tokens.

`train` and `rrhf-peft inspect` both go through here, so that what is inspected is what is trained on.

Left to others: reading and tokenising themselves (`rrhf_peft.data`).
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, TrainingArguments

from rrhf_peft.data import DataReport, hold_out, read_groups, tokenize_groups
from rrhf_peft.objectives import NEEDS_PAIRS
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import RankedGroup, TokenizedGroup


def read_splits(recipe: Recipe) -> dict[str, list[RankedGroup]]:
    """The groups of `train`, and of `eval` where the recipe names or holds out such data.

    `training.seed` decides which groups `data.eval_size` holds out.
    """
    data, training = recipe.data, recipe.training
    seed = TrainingArguments.seed if training.seed is None else training.seed  # type: ignore[attr-defined]
    groups = {"train": read_groups(data.train, format=data.format, split=data.split, max_groups=data.max_groups)}
    if data.eval is not None:
        groups["eval"] = read_groups(data.eval, format=data.format, split=data.eval_split, max_groups=data.max_groups)
    elif data.eval_size is not None:
        groups["train"], groups["eval"] = hold_out(groups["train"], data.eval_size, seed)
    return groups


def tokenize_splits(
    recipe: Recipe, groups: dict[str, list[RankedGroup]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[TokenizedGroup]], dict[str, DataReport]]:
    """The same splits as tokens, each with its report."""
    data = recipe.data
    splits, reports = {}, {}
    for name, split in groups.items():
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
