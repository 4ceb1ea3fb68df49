"""A recipe's data section, done: which groups are trained on and which are held out, as text and as tokens.

`train` and `rrhf-peft inspect` both go through here, so that what is inspected is what is trained on. Online
training reads prompts: ranked data, whose scores do not count there, or plain prompts in any form that sampling takes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TrainingArguments

from rrhf_peft.data import TEMPLATES, hold_out, prompt_text, read_groups, tokenize_groups
from rrhf_peft.objectives import NEEDS_PAIRS
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import PER_RESPONSE, Message, RankedGroup, UserError
from rrhf_peft.sample.prompts import encode_prompts


def read_splits(recipe: Recipe) -> dict[str, list[RankedGroup]]:
    """The groups of `train`, and of `eval` where the recipe names or holds out such data.

    `training.seed` decides which groups `data.eval_size` holds out. Of an online recipe the groups of `train` may
    have no responses.
    """
    data, training = recipe.data, recipe.training
    where: dict[str, Any] = {"format": data.format, "split": data.split, "max_groups": data.max_groups}
    seed = TrainingArguments.seed if training.seed is None else training.seed  # type: ignore[attr-defined]
    groups = {"train": read_groups(data.train, **where, needs="scores" if recipe.online is None else "prompt")}
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


@dataclass(frozen=True, slots=True)
class OnlinePrompt:
    """One prompt to answer during training.

    Attributes:
        index: its row in the data as read; part of the names of its random streams.
        prompt: text or chat messages, for the scorer.
        prompt_ids: what the policy continues and is trained on.
        responses: what the data holds for it; ranked with the new ones where that is asked for.
        sources: who wrote each of these.
        sampled_as: `PER_RESPONSE` name -> what is known of how each of these was sampled.
    """

    index: int
    prompt: str | list[Message]
    prompt_ids: Sequence[int]
    responses: list[str]
    sources: list[str]
    sampled_as: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in PER_RESPONSE})


@dataclass(frozen=True)
class PromptReport:
    """What became of the prompts.

    Attributes:
        prompts_read: prompts in the data.
        prompts_kept: prompts to train on.
        prompts_truncated: prompts that lost their beginning.
        provided_responses: responses that came with the prompts kept and are ranked with the new ones.
        prompt_tokens: p10, p50, p90, p99 and max of the prompts' lengths in tokens, BOS included.
        fingerprint: SHA-256 over all of them, in order.
    """

    prompts_read: int
    prompts_kept: int
    prompts_truncated: int
    provided_responses: int
    prompt_tokens: dict[str, int]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title="prompts for online training", show_header=False)
        table.add_row("prompts", f"{self.prompts_kept:,} of {self.prompts_read:,}")
        table.add_row("lost their beginning", f"{self.prompts_truncated:,}")
        table.add_row("provided responses", f"{self.provided_responses:,}")
        table.add_row("prompt tokens", "  ".join(f"{name} {value}" for name, value in self.prompt_tokens.items()))
        return table


def tokenize_prompts(
    groups: Sequence[RankedGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    overlong_prompt: str = "truncate",
    keep_provided: bool = True,
) -> tuple[list[OnlinePrompt], PromptReport]:
    """Prompts as token ids, by the rules of `rrhf_peft.data.tokenizing`.

    Args:
        groups: prompts, with or without responses.
        tokenizer: the policy's.
        template: a name in `TEMPLATES`.
        max_prompt_tokens: longest prompt, BOS included.
        overlong_prompt: truncate cuts the beginning, drop leaves the prompt out, error stops.
        keep_provided: keep the responses that came with the prompts.

    Raises:
        UserError: no prompt is left, one is too long under ``error``, or empty without a BOS token.
    """
    form = TEMPLATES[template]
    texts = [prompt_text(group, tokenizer, template) for group in groups]
    encoded = encode_prompts(tokenizer, texts, add_bos=not form.writes_bos)
    overlong = {index for index, ids in enumerate(encoded) if len(ids) > max_prompt_tokens}
    if overlong and overlong_prompt == "error":
        index = min(overlong)
        raise UserError(
            f"data.train: prompt {index} (from 0) has {len(encoded[index])} tokens, and {max_prompt_tokens} leave room "
            "for a response. Raise data.max_tokens, shorten the prompt, or set data.overlong_prompt to truncate or "
            "drop."
        )
    cut = encode_prompts(tokenizer, texts, add_bos=not form.writes_bos, max_tokens=max_prompt_tokens)
    kept = [
        OnlinePrompt(
            index,
            group.prompt,
            array("i", ids),
            list(group.responses) if keep_provided else [],
            list(group.sources) if keep_provided else [],
            {name: list(getattr(group, name)) if keep_provided else [] for name in PER_RESPONSE},
        )
        for index, (group, ids) in enumerate(zip(groups, cut, strict=True))
        if overlong_prompt == "truncate" or index not in overlong
    ]
    if not kept:
        raise UserError(
            f"data.train: all {len(groups)} prompts are longer than {max_prompt_tokens} tokens and were dropped. Raise "
            "data.max_tokens, or set data.overlong_prompt: truncate."
        )
    lengths = np.percentile([len(item.prompt_ids) for item in kept], [10, 50, 90, 99, 100], method="inverted_cdf")
    report = PromptReport(
        prompts_read=len(groups),
        prompts_kept=len(kept),
        prompts_truncated=len(overlong) if overlong_prompt == "truncate" else 0,
        provided_responses=sum(len(item.responses) for item in kept),
        prompt_tokens=dict(zip(("p10", "p50", "p90", "p99", "max"), map(int, lengths), strict=True)),
        fingerprint=_fingerprint(kept),
    )
    return kept, report


def _fingerprint(prompts: Sequence[OnlinePrompt]) -> str:
    digest = hashlib.sha256()
    for item in prompts:
        provided = [item.responses, item.sources, item.sampled_as]
        digest.update(json.dumps([item.index, list(item.prompt_ids), *provided], default=list).encode())
    return digest.hexdigest()
