"""Ranked groups into token ids and batches: templates, one BOS and one end, truncation, clean-up, and a count of it.

A sequence is ``[BOS] prompt | response end``. All k responses of a group share the prompt's ids, and each response is
tokenised as the continuation of its prompt, as generation would write it:

    * A response that was sampled under the same tokenizer and template (`RankedGroup.token_ids`) is trained on as the
      very tokens that were sampled.
    * Any other is tokenised together with the end of its prompt and split at the seam. Where the tokenizer would merge
      characters of both sides into one token, the prompt's ids stay as they are, because a model that continues the
      prompt starts from them, and the response is tokenised as it is after a line break or a full stop (counted as
      `seams_merged`).
    * Special tokens spelled out in a response are plain text: ``<s>`` is also HTML. In prompts, which may be written
      in a model's own control tokens, special tokens are special. A response that already ends with the EOS text is
      not ended twice.
    * A response that sampling cut at its length (`finish_reasons`) gets no end: the policy did not end there.

Other decisions:
    * Without a prompt limit of its own, a prompt is shortened only where it and the group's longest response
      do not fit together, and then by as little as makes room for that response; but it always keeps half
      of the tokens, and responses that need more than the other half lose their end.
    * A chat template says itself whether there is a BOS, as at inference: none is added to what it writes.
    * A tokenizer without BOS adds none. Where that leaves a prompt without any token, EOS starts the
      sequence, because the first response token needs something to be predicted from.
    * A response of white space only, or one that yields no tokens, is empty and rejected.
    * Two responses of a group with the same text or the same token ids, after truncation, are duplicates, unless one
      was cut and the other ended: the first stays, credited to all who wrote it. Equal scores stay as they are;
      different scores are a conflict, and their mean is taken.
    * Under a ranking objective a group needs two responses whose scores differ by more than the gap.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rrhf_peft.data.arrow import GroupTable, TokenTable, fingerprint, stored_tokens
from rrhf_peft.data.report import DataReport, make_report
from rrhf_peft.data.templates import (
    TEMPLATES,
    Frame,
    added_tokens,
    prompt_text,
    render_chat,
    response_frame,
    tokenization_fingerprint,
)
from rrhf_peft.records import GroupBatch, Message, RankedGroup, TokenizedGroup, UserError

#: Groups that the tokenizer sees at once: enough to keep its threads busy, few enough to hold as lists.
_BATCH = 256

#: Characters of the prompt's end that a response is tokenised with; more cannot change its tokens.
_CONTEXT = 200

#: Stands for a response while its conversation is rendered.
_STAND_IN = "Quince 0f3a91"

#: Texts after which a response is tokenised where it would merge with its prompt.
_ANCHORS = ("\n", ".", "a")


# ---- Texts as the continuation of texts ----


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str]
) -> list[list[int]]:
    """Token ids of each text as it stands after its prompt, nothing added; see the module's docstring.

    Training, policy scores, likelihoods and perplexity all tokenise responses with this.
    """
    return _continuations(tokenizer, prompts, texts)[0]


def conversation_ids(messages: Sequence[Message], response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a whole conversation that ends with the assistant's `response`, by the tokenizer's chat template.

    What the response spells stays text, special tokens too.

    Raises:
        UserError: there is no chat template, or it refuses the messages.
    """
    spells = added_tokens(tokenizer).search(response)
    shown = _STAND_IN if spells else response
    whole = render_chat([*messages, {"role": "assistant", "content": shown}], tokenizer)
    before, stand_in, after = whole.rpartition(_STAND_IN) if spells else (whole, "", "")
    if spells and not stand_in:
        raise UserError("the tokenizer's chat template does not write the assistant's text as it is.")
    ids = _encode(tokenizer, [before], special=True)[0]
    if not spells:
        return ids
    return [
        *ids,
        *continuation_ids(tokenizer, [before], [response.strip()])[0],
        *_encode(tokenizer, [after], special=True)[0],
    ]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, add_bos: bool = True, max_tokens: int | None = None
) -> list[list[int]]:
    """Prompts as the token ids that a policy continues: the same ids that it is trained on.

    Special tokens written out in a prompt are special, so a prompt that already begins with the BOS
    gets no second one.

    Args:
        tokenizer: Of the policy.
        prompts: Finished texts.
        add_bos: False where the text comes from a chat template, which writes its own BOS or means none.
        max_tokens: Longer prompts lose their beginning and keep the BOS; at least 2.

    Raises:
        UserError: an empty prompt and a tokenizer without BOS: there is nothing to continue.
    """
    encoded = _prompt_ids(tokenizer, prompts, add_bos=add_bos)
    if empty := [index for index, ids in enumerate(encoded) if not len(ids)]:
        raise UserError(
            f"prompt {empty[0]} is empty, and this tokenizer has no BOS token to start from. Give it some text."
        )
    return [ids.cut(max_tokens) for ids in encoded]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, add_bos: bool) -> list[PromptIds]:
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    encoded = []
    for ids in _encode(tokenizer, list(prompts), special=True):
        brought = bos if bos and ids[:1] == bos else []  # a template, or the text itself, may have written it
        head, body = (bos if add_bos else brought), ids[len(brought) :]
        encoded.append(PromptIds(head if head or body else bos, body))
    return encoded


def _continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str]
) -> tuple[list[list[int]], list[bool]]:
    """The token ids of each text, and whether it would have merged with its prompt."""
    added = added_tokens(tokenizer)
    contexts = {prompt: _context(prompt, added) for prompt in set(prompts)}
    tokens: list[list[int]] = [[] for _ in texts]
    merged = [False] * len(texts)
    # Where a text spells a special token, neither it nor the end of its prompt is read for special tokens.
    for spells in (False, True):
        chosen = [
            index
            for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            if (added.search(contexts[prompt][1] + text) is not None) == spells
        ]
        befores = ["".join(contexts[prompts[index]][spells:]) or _ANCHORS[0] for index in chosen]
        alone = dict(zip(set(befores), _encode(tokenizer, list(set(befores)), special=not spells), strict=True))
        joined = [before + texts[index] for index, before in zip(chosen, befores, strict=True)]
        for index, before, ids in zip(chosen, befores, _encode(tokenizer, joined, special=not spells), strict=True):
            start = alone[before]
            merged[index] = ids[: len(start)] != start
            tokens[index] = _after_anchor(tokenizer, texts[index]) if merged[index] else ids[len(start) :]
    return tokens, merged


def _context(prompt: str, added: re.Pattern[str]) -> tuple[str, str]:
    """The prompt's last special token, where it is near the end, and the text behind it, at most `_CONTEXT` long."""
    last = max(added.finditer(prompt), key=re.Match.start, default=None)
    tail = prompt[last.end() :] if last else prompt
    if len(tail) <= _CONTEXT:
        return (last[0] if last else ""), tail
    tail = tail[-_CONTEXT:]
    space = re.search(r"\s", tail)
    return "", tail[space.start() :] if space else tail


def _after_anchor(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text after a text that it does not merge with; special tokens in it are plain text."""
    for anchor in _ANCHORS:
        start, ids = _encode(tokenizer, [anchor, anchor + text], special=False)
        if ids[: len(start)] == start:
            return ids[len(start) :]
    return _encode(tokenizer, [text], special=False)[0]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text, nothing added; `special` says whether special tokens in the text are special."""
    if not texts:
        return []
    # verbose=False silences the warning about texts beyond the model's length: they are cut here.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


# ---- Groups ----


@dataclass(frozen=True)
class Settings:
    """How groups become tokens: the arguments of `tokenize_groups`, which explains them.

    Raises:
        UserError: limits that leave no room, or an unknown choice.
    """

    template: str = "raw"
    max_prompt_tokens: int | None = None
    max_tokens: int = 512
    overlong_prompt: str = "truncate"
    needs_pairs: bool = True
    min_score_gap: float = 0.0

    def __post_init__(self) -> None:
        prompt = 1 if self.max_prompt_tokens is None else self.max_prompt_tokens
        if not 1 <= prompt < self.max_tokens:
            raise UserError(
                f"data.max_prompt_tokens = {self.max_prompt_tokens} and data.max_tokens = {self.max_tokens} leave no "
                "room for prompt and response. Set 1 <= max_prompt_tokens < max_tokens."
            )
        if self.overlong_prompt not in ("truncate", "drop", "error"):
            raise UserError(
                f"overlong_prompt {self.overlong_prompt!r}: there is no such choice. Use truncate, drop or error."
            )

    def prompt_limit(self, responses: Sequence[Encoded]) -> int:
        """How many tokens, BOS included, a prompt with these responses may have."""
        if self.max_prompt_tokens is not None:
            return self.max_prompt_tokens
        longest = max((len(response.ids) for response in responses if not response.is_empty), default=1)
        half = self.max_tokens - self.max_tokens // 2
        return max(self.max_tokens - longest, half)


@dataclass(frozen=True)
class PromptIds:
    """A prompt as tokens: the head, which truncation keeps (the one BOS, if any), and the others."""

    head: list[int]
    body: list[int]

    def __len__(self) -> int:
        return len(self.head) + len(self.body)

    def cut(self, limit: int | None) -> list[int]:
        """All of it, or as much of its end as `limit` leaves to the body."""
        return [*self.head, *self.body[max(0, len(self) - limit) if limit is not None else 0 :]]


@dataclass(frozen=True)
class Encoded:
    """A response before truncation.

    Attributes:
        text: As the template has it.
        ids: Its tokens, with its end unless it was cut when it was sampled.
        was_cut: Sampling cut it at its length.
        as_sampled: The ids are those that were sampled.
        seam_merged: Tokenised with its prompt it would have shared a token with it.
        unlike_sampled: It is known how many tokens were sampled, and these are not as many.
    """

    text: str
    ids: list[int]
    was_cut: bool = False
    as_sampled: bool = False
    seam_merged: bool = False
    unlike_sampled: bool = False

    @property
    def is_empty(self) -> bool:
        """No tokens, or nothing but white space."""
        return not self.ids or not self.text.strip()


class Encoder:
    """Prompts and responses of groups as token ids, by the rules of this module.

    Args:
        tokenizer: The policy's.
        template: A name in `TEMPLATES`.

    Raises:
        UserError: unknown template, no EOS, or no chat template under template ``chat``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        if template not in TEMPLATES:
            nearest = difflib.get_close_matches(template, TEMPLATES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known templates: {', '.join(TEMPLATES)}."
            raise UserError(f"template {template!r}: there is no such template; {hint}")
        self.tokenizer, self.template, self.form = tokenizer, template, TEMPLATES[template]
        self._kept_characters: set[str] = set()
        if tokenizer.eos_token_id is None:
            response_frame(tokenizer, "raw")  # raises

    @cached_property
    def frame(self) -> Frame:
        """What the template puts around a response; after the prompts, whose errors name their group."""
        return response_frame(self.tokenizer, self.template)

    @cached_property
    def fingerprint(self) -> str:
        """Of tokenizer and template; tokens sampled under the same one are trained on as they are."""
        return tokenization_fingerprint(self.tokenizer, self.template)

    def prompt_texts(self, groups: Sequence[RankedGroup]) -> list[str]:
        """The text of each group's prompt.

        Raises:
            UserError: the template cannot say a prompt; names the group.
        """
        return [prompt_text(group, self.tokenizer, self.template) for group in groups]

    def prompt_ids(self, texts: Sequence[str]) -> list[PromptIds]:
        """The tokens of each prompt's text.

        An empty prompt of a tokenizer without BOS, whose template writes none either, starts from EOS, because the
        first token of a response needs something to be predicted from.
        """
        encoded = _prompt_ids(self.tokenizer, texts, add_bos=not self.form.writes_bos)
        return [ids if len(ids) else PromptIds([int(self.tokenizer.eos_token_id)], []) for ids in encoded]

    def lost_characters(self, texts: Iterable[str]) -> Counter[str]:
        """Those characters that the tokenizer cannot give back, with the number of texts that have them."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(set(text) - self._kept_characters)
        unknown = [one for one in counts if not one.isspace()]
        ids = _encode(self.tokenizer, unknown, special=False)
        spelled = self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) if ids else []
        lost = {one for one, text in zip(unknown, spelled, strict=True) if one not in text}
        self._kept_characters |= counts.keys() - lost
        return Counter({one: counts[one] for one in lost})

    def responses(self, groups: Sequence[RankedGroup], prompts: Sequence[str]) -> list[list[Encoded]]:
        """Every response of each group as tokens; `prompts` are the texts of the groups' prompts."""
        texts = [self._text(text) for group in groups for text in group.responses]
        befores = [
            prompt + self.frame.lead for prompt, group in zip(prompts, groups, strict=True) for _ in group.responses
        ]
        bodies, merged = _continuations(self.tokenizer, befores, texts)
        sampled = self._sampled_ids(groups)
        groups_encoded: list[list[Encoded]] = []
        index = 0
        lead = self.tokenizer(self.frame.lead, add_special_tokens=False)["input_ids"] if self.frame.lead else []
        for group in groups:
            encoded = []
            for number in range(len(group.responses)):
                encoded.append(
                    self._encoded(group, number, texts[index], [*lead, *bodies[index]], merged[index], sampled[index])
                )
                index += 1
            groups_encoded.append(encoded)
        return groups_encoded

    def _text(self, response: str) -> str:
        return (
            self.form.response(response).removesuffix(str(self.tokenizer.eos_token)).removesuffix(self.frame.end_text)
        )

    def _encoded(
        self, group: RankedGroup, number: int, text: str, body: list[int], merged: bool, sampled: list[int] | None
    ) -> Encoded:
        was_cut = group.finish_reasons[number] == "length"
        if sampled is not None:
            ends = {self.frame.end[-1], self.tokenizer.eos_token_id, *self.tokenizer.all_special_ids}
            end = [] if was_cut or sampled[-1] in ends else self.frame.end
            return Encoded(text, [*sampled, *end], was_cut, as_sampled=True)
        ids = [*body, *([] if was_cut or not body else self.frame.end)]
        length = group.num_tokens[number]
        differs = length is not None and group.finish_reasons[number] != "stop" and length != len(ids)
        return Encoded(text, ids, was_cut, seam_merged=merged, unlike_sampled=differs)

    def _sampled_ids(self, groups: Sequence[RankedGroup]) -> list[list[int] | None]:
        """The sampled tokens of each response, where they are this tokenizer's and still spell its text."""
        ids: list[list[int] | None] = [
            None
            if tokens is None or not len(tokens) or reason == "stop" or tokenizer != self.fingerprint
            else list(tokens)
            for group in groups
            for tokens, reason, tokenizer in zip(group.token_ids, group.finish_reasons, group.tokenizers, strict=True)
        ]
        known = [(index, tokens) for index, tokens in enumerate(ids) if tokens is not None]
        if not known:
            return ids
        texts = [text for group in groups for text in group.responses]
        spelled = self.tokenizer.batch_decode(
            [tokens for _, tokens in known], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for (index, _), text in zip(known, spelled, strict=True):
            if text.strip() != texts[index].strip():  # somebody has edited the text
                ids[index] = None
        return ids


# ---- What stays ----


@dataclass
class Counts:
    """What happened on the way from ranked to tokenized groups; `DataReport` explains each.

    `responses_of` and `score_of` hold the number and the sum of the scores of each source's responses.
    """

    groups_read: int = 0
    responses_read: int = 0
    pairs_read: int = 0
    tied_pairs_read: int = 0
    groups_dropped: Counter[str] = field(default_factory=Counter)
    responses_in_dropped_groups: int = 0
    empty_responses: int = 0
    duplicates_merged: Counter[str] = field(default_factory=Counter)
    conflicting_duplicates: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    empty_prompts: int = 0
    responses_as_sampled: int = 0
    responses_without_end: int = 0
    lengths_unlike_sampled: int = 0
    seams_merged: int = 0
    lost_characters: Counter[str] = field(default_factory=Counter)
    responses_of: Counter[str] = field(default_factory=Counter)
    score_of: Counter[str] = field(default_factory=Counter)

    def add(self, counted: Mapping[str, Any]) -> None:
        """Add what another process has counted."""
        for name, value in counted.items():
            if isinstance(value, dict):
                getattr(self, name).update(value)  # and not +, which loses sums below zero
            else:
                setattr(self, name, getattr(self, name) + value)

    def read(self, group: RankedGroup) -> None:
        """Count a group as the file has it."""
        scores = group.known_scores
        self.groups_read += 1
        self.responses_read += len(group.responses)
        self.pairs_read += math.comb(len(scores), 2)
        self.tied_pairs_read += sum(math.comb(count, 2) for count in Counter(scores).values())

    def encoded(self, responses: Sequence[Encoded]) -> None:
        """Count how a group's responses became tokens."""
        self.responses_as_sampled += sum(response.as_sampled for response in responses)
        self.responses_without_end += sum(response.was_cut for response in responses)
        self.lengths_unlike_sampled += sum(response.unlike_sampled for response in responses)
        self.seams_merged += sum(response.seam_merged for response in responses)

    def dropped(self, reason: str, num_responses: int) -> None:
        """Count a group as dropped, with the responses that are lost with it."""
        self.groups_dropped[reason] += 1
        self.responses_in_dropped_groups += num_responses


@dataclass
class Kept:
    """A response that stays, cut to length, with the sources and scores of all its duplicates.

    `index` is the first one's position in its group.
    """

    index: int
    ids: array[int]
    sources: list[str]
    scores: list[float]

    @property
    def source(self) -> str:
        """Who wrote it; of several, all of them."""
        return " & ".join(dict.fromkeys(self.sources))

    @property
    def score(self) -> float:
        if not self.is_conflict:
            return self.scores[0]
        return math.fsum(score / len(self.scores) for score in self.scores)

    @property
    def is_conflict(self) -> bool:
        return len(set(self.scores)) > 1


def without_duplicates(group: RankedGroup, responses: Sequence[Encoded], room: int, counts: Counts) -> list[Kept]:
    """The group's responses cut to `room` tokens, without empty ones and duplicates."""
    whole: set[bytes] = set()
    by_text: dict[tuple[str, bool], Kept] = {}
    by_ids: dict[bytes, Kept] = {}
    kept: list[Kept] = []
    entries = zip(responses, group.known_scores, group.sources, strict=True)
    for index, (encoded, score, source) in enumerate(entries):
        if encoded.is_empty:
            counts.empty_responses += 1
            continue
        ids = array("i", encoded.ids[:room])
        counts.responses_truncated += len(ids) < len(encoded.ids)
        full, key, text = array("i", encoded.ids).tobytes(), ids.tobytes(), (encoded.text, encoded.was_cut)
        first = by_text.get(text) or by_ids.get(key)
        if first is not None:
            first.scores.append(score)
            first.sources.append(source)
            how = "equal_text" if text in by_text else "equal_tokens" if full in whole else "equal_after_truncation"
            counts.duplicates_merged[how] += 1
        else:
            first = Kept(index, ids, [source], [score])
            kept.append(first)
        by_text[text] = by_ids[key] = first
        whole.add(full)
    counts.conflicting_duplicates += sum(response.is_conflict for response in kept)
    return kept


def why_dropped(scores: Sequence[float], needs_pairs: bool, min_score_gap: float) -> str | None:
    """The reason to drop a group whose remaining responses have these scores, or None to keep it."""
    if not scores:
        return "no_response"
    if needs_pairs and len(scores) == 1:
        return "single_response"
    if needs_pairs and not max(scores) - min(scores) > min_score_gap:
        return "no_ordered_pair"
    return None


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
) -> tuple[Sequence[TokenizedGroup], DataReport]:
    """Turn groups into token ids by the rules above, and report what became of them.

    Those of a `GroupTable` are tokenized once on a machine, by all of its cores, and stay on disk.

    Args:
        groups: Ranked groups; all responses have scores.
        tokenizer: The policy's.
        template: A name in `TEMPLATES`.
        max_prompt_tokens: Longest prompt, BOS included. None: `max_tokens` less the group's longest response,
            but at least half of `max_tokens`.
        max_tokens: Longest prompt + response, BOS and end included. Longer responses lose their end.
        overlong_prompt: ``truncate`` cuts the beginning and keeps the BOS, ``drop`` drops the group,
            ``error`` stops.
        needs_pairs: Drop groups in which no two scores differ by more than `min_score_gap`.
        min_score_gap: See there.

    Returns:
        The groups that stay, in order, with ``index`` their position in `groups`; and the report.

    Raises:
        UserError: no group is left; a prompt is too long under ``error``; a response has no score; the tokenizer has
            no EOS, or no chat template under template ``chat``; impossible limits.
    """
    settings = Settings(template, max_prompt_tokens, max_tokens, overlong_prompt, needs_pairs, min_score_gap)
    encoder, counts = Encoder(tokenizer, template), Counts()
    if isinstance(groups, GroupTable):
        return _tokenize_table(groups, encoder, settings)
    kept = list(tokenized(groups, encoder, settings, counts))
    return kept, report_of(kept, encoder, settings, counts)


def _tokenize_table(table: GroupTable, encoder: Encoder, settings: Settings) -> tuple[TokenTable, DataReport]:
    def tokenize(groups: list[RankedGroup], start: int) -> tuple[list[TokenizedGroup], dict[str, Any]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
        counts = Counts()
        return list(tokenized(groups, encoder, settings, counts, start)), vars(counts)

    def report(kept: TokenTable, counted: list[dict[str, Any]]) -> dict[str, Any]:
        counts = Counts()
        for values in counted:
            counts.add(values)
        return report_of(kept, encoder, settings, counts).to_dict()

    key = fingerprint(tokenization_fingerprint(encoder.tokenizer, settings.template), asdict(settings))
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kept, values = stored_tokens(table, tokenize, report, key=key, processes=processes)
    values["k_histogram"] = {int(k): count for k, count in values["k_histogram"].items()}
    return kept, DataReport(**values)


def report_of(kept: Sequence[TokenizedGroup], encoder: Encoder, settings: Settings, counts: Counts) -> DataReport:
    """The report of groups that `tokenized` gave.

    Raises:
        UserError: no group is left.
    """
    if not len(kept):
        raise _no_data_left(counts)
    ignores_chat = settings.template == "raw" and bool(encoder.tokenizer.chat_template)
    about = {"end_of_response": encoder.frame.end_text, "chat_template_ignored": ignores_chat}
    return make_report(kept, {**vars(counts), **about}, asdict(settings))


def tokenized(
    groups: Sequence[RankedGroup], encoder: Encoder, settings: Settings, counts: Counts, start: int = 0
) -> Iterator[TokenizedGroup]:
    """Yield the groups that stay, and add to `counts` what became of all of them; `start` is the first one's index."""
    for group, prompt, responses in _token_ids(groups, encoder, start):
        counts.read(group)
        counts.lost_characters += encoder.lost_characters(response.text for response in responses)
        limit = settings.prompt_limit(responses)
        if len(prompt) > limit and settings.overlong_prompt == "error":
            raise UserError(
                f"{group.where}: the prompt has {len(prompt)} tokens and the limit is {limit}. "
                "Raise data.max_prompt_tokens or data.max_tokens, shorten the prompt, or set data.overlong_prompt to "
                "truncate or drop."
            )
        if len(prompt) > limit and settings.overlong_prompt == "drop":
            counts.dropped("overlong_prompt", len(group.responses))
            continue
        counts.encoded(responses)
        counts.empty_prompts += not prompt.body
        counts.prompts_truncated += len(prompt) > limit
        prompt_ids = array("i", prompt.cut(limit))
        stay = without_duplicates(group, responses, settings.max_tokens - len(prompt_ids), counts)
        scores = [response.score for response in stay]
        if reason := why_dropped(scores, settings.needs_pairs, settings.min_score_gap):
            counts.dropped(reason, len(stay))
            continue
        for response in stay:
            for source in dict.fromkeys(response.sources):
                counts.responses_of[source] += 1
                counts.score_of[source] += response.score  # type: ignore[assignment]
        ids, sources = [response.ids for response in stay], [response.source for response in stay]
        yield TokenizedGroup(prompt_ids, list(ids), scores, sources, group.index)


def tokenize_every_response(
    groups: Sequence[RankedGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "raw",
    max_prompt_tokens: int | None = None,
    max_tokens: int = 512,
) -> tuple[list[TokenizedGroup], int]:
    """The same tokens as `tokenize_groups` makes, for measuring: nothing is merged, and no group needs an order.

    Returns:
        The groups that have tokens, with ``index`` their position in `groups`, ``sources`` the position of each
        response in its group, as text, and scores of 0; and how many responses lost their end.

    Raises:
        UserError: the tokenizer or the template cannot be used; impossible limits.
    """
    settings = Settings(template, max_prompt_tokens, max_tokens)
    measured: list[TokenizedGroup] = []
    truncated = 0
    for group, prompt, responses in _token_ids(groups, Encoder(tokenizer, template)):
        prompt_ids = array("i", prompt.cut(settings.prompt_limit(responses)))
        room = settings.max_tokens - len(prompt_ids)
        numbers = [number for number, response in enumerate(responses) if not response.is_empty]
        truncated += sum(len(responses[number].ids) > room for number in numbers)
        if numbers:
            ids = [array("i", responses[number].ids[:room]) for number in numbers]
            measured.append(
                TokenizedGroup(prompt_ids, list(ids), [0.0] * len(ids), list(map(str, numbers)), group.index)
            )
    return measured, truncated


def _token_ids(
    groups: Sequence[RankedGroup], encoder: Encoder, start: int = 0
) -> Iterator[tuple[RankedGroup, PromptIds, list[Encoded]]]:
    """Yield every group, its `index` its position in `groups` after `start`, with its tokens; made in batches."""
    for first in range(0, len(groups), _BATCH):
        batch = [
            group if group.index == index else replace(group, index=index)
            for index, group in enumerate(groups[first : first + _BATCH], start=start + first)
        ]
        texts = encoder.prompt_texts(batch)
        yield from zip(batch, encoder.prompt_ids(texts), encoder.responses(batch, texts), strict=True)


def _no_data_left(counts: Counts) -> UserError:
    """The error for a data set of which nothing stays: every reason that occurred, with its remedy."""
    if not counts.groups_read:
        return UserError("there are no groups to train on. Check data.train and data.max_groups.")
    explained = {
        "overlong_prompt": "have a prompt over the limit (raise it or data.max_tokens, or truncate)",
        "no_response": "have only empty responses (check the responses column)",
        "single_response": "have a single response left, so nothing to rank (objective sft can use them)",
        "no_ordered_pair": "have no two scores that differ by more than the gap (check the scores column)",
    }
    reasons = "; ".join(f"{count} {explained[reason]}" for reason, count in counts.groups_dropped.items())
    return UserError(f"no data is left: of {counts.groups_read} groups read, {reasons}.")


# ---- Batches ----


def source_names(*splits: Iterable[TokenizedGroup | RankedGroup]) -> list[str]:
    """Every source of these groups once, the most frequent first, equally frequent ones by name."""
    counts: Counter[str] = Counter()
    for groups in splits:
        known = groups.source_counts() if isinstance(groups, TokenTable) else None
        counts.update(known or (source for group in groups for source in group.sources))
    return sorted(counts, key=lambda source: (-counts[source], source))


class GroupCollator:
    """Data collator: a list of groups becomes one `GroupBatch`; k may differ from group to group.

    Args:
        source_names: The list that ``GroupBatch.source`` points into; holds every source of the data.
    """

    def __init__(self, source_names: Sequence[str]) -> None:
        self.source_names = list(source_names)
        self._index = {source: index for index, source in enumerate(self.source_names)}

    def __call__(self, groups: Sequence[TokenizedGroup]) -> GroupBatch:
        """Shapes as in `GroupBatch`.

        Raises:
            ValueError: a group has a source that is not among the collator's names.
        """
        unknown = sorted({source for group in groups for source in group.sources} - self._index.keys())
        if unknown:
            raise ValueError(
                f"source {unknown[0]!r} is not among the collator's source_names. Make these from training and "
                "evaluation groups together."
            )
        stretches = (chain(group.prompt_ids, *group.response_ids) for group in groups)
        # prompt_lengths comes first: Trainer takes the batch size, which is in groups, from the first tensor.
        return GroupBatch(
            prompt_lengths=_int64(len(group.prompt_ids) for group in groups),
            response_lengths=_int64(len(ids) for group in groups for ids in group.response_ids),
            group=_int64(index for index, group in enumerate(groups) for _ in group.response_ids),
            scores=torch.tensor([score for group in groups for score in group.scores], dtype=torch.float64),
            source=_int64(self._index[source] for group in groups for source in group.sources),
            index=_int64(group.index for group in groups),
            input_ids=_int64(chain.from_iterable(stretches)),
        )


def _int64(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
