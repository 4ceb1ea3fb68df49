"""Ranked groups into token ids: templating, one BOS and one EOS, truncation, clean-up, and the count of it all.

A sequence is ``[BOS] prompt | response EOS``. Prompt and response are tokenised apart and nothing stands
between them, so all k responses of a group share the same prompt ids.

Decisions, besides those of `cleaning`:
    * Without a prompt limit of its own, a prompt is shortened only where it and the group's longest response
      do not fit together, and then by as little as makes room for that response; but it always keeps half
      of the tokens, and responses that need more than the other half lose their end.
    * A response that already ends with the EOS text does not get a second one. Any other special token
      spelled out in a response is plain text: ``<s>`` is also HTML. In prompts, which may be written
      in a model's own control tokens, special tokens are special.
    * A chat template says itself whether there is a BOS, as at inference: none is added to what it writes.
    * A tokenizer without BOS adds none. Where that leaves a prompt without any token, EOS starts the
      sequence, because the first response token needs something to be predicted from.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rrhf_peft.data.cleaning import Counts, Encoded, no_data_left, why_dropped, without_duplicates
from rrhf_peft.data.report import DataReport, make_report
from rrhf_peft.data.templates import TEMPLATES, Template
from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError

#: Groups that the tokenizer sees at once: enough to keep its threads busy, few enough to hold as lists.
_BATCH = 256


@dataclass(frozen=True)
class Limits:
    """The special tokens and lengths that shape a sequence.

    `bos` is None where the tokenizer has none, `prompt` where the user has set no limit for prompts.
    """

    bos: int | None
    eos: int
    prompt: int | None
    total: int

    def for_prompt(self, responses: Sequence[Encoded]) -> int:
        """How many tokens, BOS included, a prompt with these responses may have."""
        if self.prompt is not None:
            return self.prompt
        longest = max((len(response.ids) for response in responses if not response.is_empty), default=0) + 1
        half = self.total - self.total // 2
        return max(self.total - longest, half)


@dataclass(frozen=True)
class _Prompt:
    """A prompt within its limit; `num_tokens` is its length before it was cut, BOS included."""

    ids: array[int]
    num_tokens: int
    limit: int
    is_empty: bool

    @property
    def is_overlong(self) -> bool:
        return self.num_tokens > self.limit


def tokenize_groups(
    groups: Sequence[RankedGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "raw",
    max_prompt_tokens: int | None = None,
    max_tokens: int = 512,
    overlong_prompt: str = "truncate",
    needs_pairs: bool = True,
    min_score_gap: float = 0.0,
) -> tuple[list[TokenizedGroup], DataReport]:
    """Turn groups into token ids by the rules above, and report what became of them.

    Args:
        template: A name in `TEMPLATES`.
        max_prompt_tokens: Longest prompt, BOS included. None: `max_tokens` less the group's longest response,
            but at least half of `max_tokens`.
        max_tokens: Longest prompt + response, BOS and EOS included. Longer responses lose their end and EOS.
        overlong_prompt: ``truncate`` cuts the beginning and keeps the BOS, ``drop`` drops the group,
            ``error`` stops.
        needs_pairs: Drop groups in which no two scores differ by more than `min_score_gap`.

    Returns:
        The groups that stay, in order, with ``index`` their position in `groups`; and the report.

    Raises:
        UserError: no group is left; a prompt is too long under ``error``; the tokenizer has no EOS, or no
            chat template under template ``chat``; impossible limits.
    """
    form = _template(template)
    limits = _limits(tokenizer, max_prompt_tokens, max_tokens)
    if overlong_prompt not in ("truncate", "drop", "error"):
        raise UserError(f"overlong_prompt {overlong_prompt!r}: there is no such choice. Use truncate, drop or error.")
    counts = Counts()
    kept: list[TokenizedGroup] = []
    for index, prompt, responses in _token_ids(groups, tokenizer, form, limits):
        group = groups[index]
        counts.read(group)
        if prompt.is_overlong and overlong_prompt == "error":
            raise UserError(
                f"{where_is(group, index)}: the prompt has {prompt.num_tokens} tokens and the limit is {prompt.limit}. "
                "Raise data.max_prompt_tokens or data.max_tokens, shorten the prompt, or set data.overlong_prompt to "
                "truncate or drop."
            )
        if prompt.is_overlong and overlong_prompt == "drop":
            counts.dropped("overlong_prompt", len(group.responses))
            continue
        counts.empty_prompts += prompt.is_empty
        counts.prompts_truncated += prompt.is_overlong
        own = without_duplicates(group, responses, limits.total - len(prompt.ids), limits.eos, counts)
        scores = [response.score for response in own]
        if reason := why_dropped(scores, needs_pairs, min_score_gap):
            counts.dropped(reason, len(own))
            continue
        ids, sources = [response.ids for response in own], [response.source for response in own]
        kept.append(TokenizedGroup(prompt.ids, list(ids), scores, sources, index))
    if not kept:
        raise no_data_left(counts)
    settings = {
        "template": template,
        "max_prompt_tokens": max_prompt_tokens,
        "max_tokens": max_tokens,
        "overlong_prompt": overlong_prompt,
        "needs_pairs": needs_pairs,
        "min_score_gap": min_score_gap,
    }
    return kept, make_report(kept, vars(counts), settings)


def _token_ids(
    groups: Sequence[RankedGroup], tokenizer: PreTrainedTokenizerBase, form: Template, limits: Limits
) -> Iterator[tuple[int, _Prompt, list[Encoded]]]:
    """Yield (index, prompt ids within the limit, responses) for every group; tokenised in batches."""
    eos_text = str(tokenizer.eos_token)
    for start in range(0, len(groups), _BATCH):
        batch = groups[start : start + _BATCH]
        prompts = [_prompt_text(group, start + place, tokenizer, form) for place, group in enumerate(batch)]
        texts = [form.response(text).removesuffix(eos_text) for group in batch for text in group.responses]
        prompt_ids = _encode(tokenizer, prompts, special=True)
        responses = map(Encoded, texts, _encode(tokenizer, texts, special=False))
        for place, group in enumerate(batch):
            own = [next(responses) for _ in group.responses]
            yield start + place, _prompt(prompt_ids[place], own, form, limits), own


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text, nothing added; `special` says whether special tokens in the text are special."""
    if not texts:
        return []
    # verbose=False silences the warning about texts beyond the model's length: they are cut here.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=not special, verbose=False)
    return encoded["input_ids"]


def _prompt_text(group: RankedGroup, index: int, tokenizer: PreTrainedTokenizerBase, form: Template) -> str:
    try:
        return form.prompt(group.prompt, tokenizer)
    except UserError as error:
        raise UserError(f"{where_is(group, index)}: {error}") from None


def _prompt(ids: list[int], responses: Sequence[Encoded], form: Template, limits: Limits) -> _Prompt:
    """The prompt with its one BOS, if any, cut at the beginning to its limit."""
    bos = [] if limits.bos is None else [limits.bos]
    brought = bos if bos and ids[:1] == bos else []  # a template, or the text itself, may have written it
    head, body = (brought if form.writes_bos else bos), ids[len(brought) :]
    is_empty = not body
    if not head and not body:
        head = bos or [limits.eos]
    num_tokens, limit = len(head) + len(body), limits.for_prompt(responses)
    return _Prompt(array("i", head + body[max(0, num_tokens - limit) :]), num_tokens, limit, is_empty)


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        nearest = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known templates: {', '.join(TEMPLATES)}."
        raise UserError(f"template {name!r}: there is no such template; {hint}")
    return TEMPLATES[name]


def _limits(tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int | None, max_tokens: int) -> Limits:
    if not 1 <= (1 if max_prompt_tokens is None else max_prompt_tokens) < max_tokens:
        raise UserError(
            f"data.max_prompt_tokens = {max_prompt_tokens} and data.max_tokens = {max_tokens} leave no room for prompt "
            "and response. Set 1 <= max_prompt_tokens < max_tokens."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no EOS token, so no response "
            "could end. Set its eos_token, save it, and name it in model.tokenizer."
        )
    return Limits(tokenizer.bos_token_id, tokenizer.eos_token_id, max_prompt_tokens, max_tokens)


def where_is(group: RankedGroup, index: int) -> str:
    """Where a group was read, or its position in the list that was given."""
    return group.where if "file" in group.origin else f"group {index}"
