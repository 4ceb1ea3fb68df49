"""The prompts of online training: read from `data.train`, as token ids, with the responses that they came with.

`data.train` may be ranked data, whose scores do not count here, or plain prompts in any form that sampling takes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from rrhf_peft.data import TEMPLATES
from rrhf_peft.records import Message, RankedGroup, UserError
from rrhf_peft.sample.prompt_files import Prompt, read_prompts
from rrhf_peft.sample.prompts import encode_prompts


@dataclass(frozen=True, slots=True)
class OnlinePrompt:
    """One prompt to answer during training.

    Attributes:
        index: its place in the data as read; part of the names of its random streams.
        prompt: text or chat messages, for the scorer.
        prompt_ids: what the policy continues and is trained on.
        responses: what the data holds for it; ranked with the new ones where that is asked for.
        sources: who wrote each of these.
    """

    index: int
    prompt: str | list[Message]
    prompt_ids: Sequence[int]
    responses: list[str]
    sources: list[str]


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


def read_online_groups(
    where: str | Sequence[str], *, format: str, split: str, max_groups: int | None
) -> list[RankedGroup]:
    """The prompts with what they came with; a response without a score has 0, which online training never reads.

    Raises:
        UserError: names file, line and field; or there is no prompt at all.
    """
    prompts = read_prompts(where, format=format, split=split, max_prompts=max_groups)
    return [_as_group(item) for item in prompts]


def _as_group(item: Prompt) -> RankedGroup:
    scores = [0.0 if score is None else score for score in item.scores]
    return RankedGroup(item.prompt, item.responses, scores, item.sources, item.meta)


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
    texts = [form.prompt(group.prompt, tokenizer) for group in groups]
    encoded = encode_prompts(tokenizer, texts, add_bos=not form.writes_bos)
    overlong = {place for place, ids in enumerate(encoded) if len(ids) > max_prompt_tokens}
    if overlong and overlong_prompt == "error":
        place = min(overlong)
        raise UserError(
            f"data.train: prompt {place} (from 0) has {len(encoded[place])} tokens, and {max_prompt_tokens} leave room "
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
        digest.update(json.dumps([item.index, list(item.prompt_ids), item.responses, item.sources]).encode())
    return digest.hexdigest()
