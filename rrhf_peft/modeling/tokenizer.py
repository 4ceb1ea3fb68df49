"""Load the tokenizer and give it a padding token without changing the vocabulary."""

from __future__ import annotations

import os
import re

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rrhf_peft.modeling.sources import resolve_source
from rrhf_peft.records import UserError

_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")

#: Added tokens that a vocabulary keeps for padding, then those it keeps for nothing in particular.
_RESERVED = (re.compile(r"(^|[^a-z])pad([^a-z]|$)", re.I), re.compile(r"reserved|unused|extra_id|placeholder", re.I))


def load_tokenizer(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a padding token that it already has.

    Without one of its own, padding becomes an added token reserved for it, else a reserved token
    without a use, else the unknown token, else EOS. Masks come from lengths, so any of them is right.

    Raises:
        UserError: no such tokenizer, damaged files, or no token that could end a sequence.
    """
    source = resolve_source(name, revision=revision, required=_FILES, what="tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        # tokenizers raises bare Exceptions for damaged files.
        text = str(error)
        if "trust_remote_code" in text:
            remedy = "Read the code that comes with it, then set model.trust_remote_code: true if you trust it."
        elif "sentencepiece" in text or "tiktoken" in text:
            remedy = "Its tokenizer.json is missing: download it, or pip install 'rrhf-peft[sentencepiece]' to convert."
        else:
            remedy = "Download its tokenizer files again."
        first = next((line.strip().rstrip(".:") for line in text.splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: the tokenizer cannot be loaded ({first[:500]}). {remedy}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source}: the tokenizer names no end-of-sequence token, so no response could end. Set eos_token in "
            "its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        size = len(tokenizer)
        tokenizer.pad_token = _padding_token(tokenizer)
        assert len(tokenizer) == size, "padding must not grow the vocabulary"
    return tokenizer


def refuse_unknown_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """Make sure that the model has an embedding for every token that the tokenizer can give.

    Special tokens that no text becomes do not count: some language models leave out the pictures' token of the
    multimodal model that they share a tokenizer with.

    Args:
        tokenizer: The tokenizer.
        rows: Tokens that the model has embeddings for.
        where: What the error message names.

    Raises:
        UserError: there are ids from `rows` on.
    """
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template
    rendered = "".join(template.values()) if isinstance(template, dict) else template or ""
    added = tokenizer.added_tokens_decoder
    used = [
        index
        for index, token in sorted(beyond.items())
        if index in named or token in rendered or index not in added or not added[index].special
    ]
    if used:
        raise UserError(
            f"{where}: the tokenizer knows token ids up to {used[-1]} ({beyond[used[-1]]!r}), and the model has {rows} "
            "embeddings. Name the model's own tokenizer, or save the model with its vocabulary resized "
            "(resize_token_embeddings) and use that."
        )


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    added = [str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items()) if index not in used]
    for pattern in _RESERVED:
        for token in added:
            if pattern.search(token):
                return token
    return str(tokenizer.unk_token or tokenizer.eos_token)
