"""Prompts as the token ids that a policy continues: the same ids that it is later trained on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import UserError


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, add_bos: bool = True, max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of each prompt with the sequence's one BOS, where the tokenizer has one.

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
    if not prompts:
        return []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded: list[list[int]] = []
    for index, ids in enumerate(tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]):
        has_bos = bool(bos) and ids[:1] == bos
        head, body = (bos if add_bos or has_bos else []), (ids[1:] if has_bos else ids)
        if not head and not body:
            raise UserError(
                f"prompt {index} is empty, and this tokenizer has no BOS token to start from. Give it some text."
            )
        if max_tokens is not None and len(head) + len(body) > max_tokens:
            body = body[len(head) + len(body) - max_tokens :]
        encoded.append([*head, *body])
    return encoded
