"""Top-p samples as plain texts: the short way from Python to k responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import UserError
from rrhf_peft.sample.candidate import Decoding
from rrhf_peft.sample.prompts import encode_prompts
from rrhf_peft.sample.transformers_policy import TokenBudget, respond


def sample_top_p(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    k: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """Draw k responses to each prompt by nucleus sampling (SP in https://arxiv.org/abs/2304.05302).

    Every response has its own random stream, named by the seed, the prompt's place and the response's
    number: the caller's random state is neither used nor changed.

    Args:
        model: Causal LM, or a PEFT model around one; put into evaluation mode for the call.
        tokenizer: Its tokenizer, with EOS and padding tokens.
        prompts: Finished prompt texts; see `encode_prompts` for special tokens.
        k: Responses per prompt, drawn independently, so that duplicates may occur.
        temperature: Divides the logits; above 0.
        top_p: Keep the fewest tokens whose probabilities sum to at least this; 1 keeps all.
        max_new_tokens: A response that has not ended by then is cut.
        batch_size: About how many responses are decoded at the same time; at least one prompt's k.
        seed: Of the sampling.
        progress: Called with the number of responses that a batch has added.

    Returns:
        For each prompt, in order, k texts without special tokens. ``prompt + text`` is the whole text: where
        the tokenizer writes words with a space before them, the text begins with that space.

    Raises:
        UserError: a setting outside its range, nothing to continue, or no room for it in context or memory.
    """
    for name, value, ok in (
        ("k", k, k >= 1),
        ("temperature", temperature, temperature > 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
    ):
        if not ok:
            raise UserError(
                f"sampling: {name} = {value} is out of range. k and max_new_tokens are 1 or more, temperature is "
                "above 0, and top_p is above 0 and at most 1."
            )
    encoded = encode_prompts(tokenizer, prompts)
    longest = max(map(len, encoded), default=0) + max_new_tokens

    def advance(prompts: int, tokens: int) -> None:
        if progress is not None:
            progress(prompts * k)

    candidates = respond(
        model,
        tokenizer,
        encoded,
        [f"{seed}/{place}" for place in range(len(encoded))],
        Decoding("top_p", k, max_new_tokens, temperature=temperature, top_p=top_p),
        TokenBudget(batch_size * longest),
        advance,
    )
    return [[candidate.text for candidate in own] for own in candidates]
