"""Prompt and response as the token ids that a reward model reads.

Unlike training, where prompt and response are tokenised apart, a reward model's text is tokenised as a
whole, with whatever special tokens its tokenizer adds. Too long ones lose their beginning, because the
response stands at the end.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from rrhf_peft.data import TEMPLATES
from rrhf_peft.modeling import resolve_source
from rrhf_peft.records import Message, UserError
from rrhf_peft.score.reward_model import TokenRow

_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt")


class RewardTexts:
    """Makes token rows, and counts those that were cut.

    Args:
        tokenizer: the reward model's.
        template: raw, hh, alpaca, chat, pair (prompt and response as two texts) or response (alone).
        append_eos: end with the EOS token.
        max_tokens: longest row.

    Raises:
        UserError: `append_eos` without an EOS token, or template chat without a chat template.
    """

    def __init__(self, tokenizer: Any, *, template: str, append_eos: bool, max_tokens: int) -> None:
        self.tokenizer, self.template, self.append_eos, self.max_tokens = tokenizer, template, append_eos, max_tokens
        self.truncated = 0
        tokenizer.truncation_side = "left"
        if append_eos and tokenizer.eos_token_id is None:
            raise UserError("scoring.scorer.append_eos: the tokenizer has no EOS token. Name another in .tokenizer.")
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("scoring.scorer.template: the tokenizer has no chat template. Use raw, hh, alpaca or pair.")

    def row(self, prompt: str | list[Message], response: str) -> TokenRow:
        """The token row of one response; never longer than `max_tokens`."""
        if self.template == "chat":
            return self._finished(self._chat(prompt, response), None)
        if self.template == "response":
            texts = [response]
        elif self.template == "pair":
            texts = [TEMPLATES["raw"].prompt(prompt, self.tokenizer), response]
        else:
            form = TEMPLATES[self.template]
            texts = [form.prompt(prompt, self.tokenizer) + form.response(response)]
        # Nothing in these texts is meant as a special token, whatever a response spells.
        encoded = self.tokenizer(*texts, split_special_tokens=True, verbose=False)
        room = self.max_tokens - self.append_eos
        if len(encoded["input_ids"]) > room:
            self.truncated += 1
            encoded = self.tokenizer(
                *texts, split_special_tokens=True, verbose=False, truncation="longest_first", max_length=room
            )
        return self._finished(encoded["input_ids"], encoded.get("token_type_ids"))

    def _chat(self, prompt: str | list[Message], response: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = [*messages, {"role": "assistant", "content": response}]
        ids = list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        room = self.max_tokens - self.append_eos
        if len(ids) <= room:
            return ids
        self.truncated += 1
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return [*head, *ids[len(ids) - room + len(head) :]]

    def _finished(self, ids: list[int], types: list[int] | None) -> TokenRow:
        if not self.append_eos or (ids and ids[-1] == self.tokenizer.eos_token_id):
            return TokenRow(ids, types) if ids else self._empty()
        return TokenRow([*ids, self.tokenizer.eos_token_id], None if types is None else [*types, types[-1]])

    def _empty(self) -> TokenRow:
        """A text without any token still needs a position to be read at."""
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if start is None:
            raise UserError(
                "a text to score has no tokens, and the tokenizer no BOS or EOS to stand for it. Remove it."
            )
        return TokenRow([start])


def load_reward_tokenizer(name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a reward model; it needs neither EOS nor padding token.

    Raises:
        UserError: no such tokenizer, or damaged files.
    """
    source = resolve_source(name, revision=revision, required=_FILES, what="tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{source}: the tokenizer cannot be loaded ({reason}). Name one in scoring.scorer.tokenizer."
        ) from None


def longest_row(wanted: int, tokenizer: Any, config: Any) -> int:
    """The longest row that recipe, tokenizer and model all allow."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, int(tokenizer.model_max_length), context if isinstance(context, int) else wanted)
