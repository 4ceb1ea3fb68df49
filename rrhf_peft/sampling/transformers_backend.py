"""Sample responses with transformers' `generate`: on any device, quantised or not, adapter or not.

Left to others: templates and what the prompts are (`rrhf_peft.data`), scores (`rrhf_peft.scoring`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rrhf_peft.records import UserError
from rrhf_peft.sampling.prompts import encode_prompts
from rrhf_peft.sampling.token_rows import end_ids, left_padded, response_text


@torch.no_grad()
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

    Prompts of similar length share a batch, padded on the left. The same arguments on the same machine
    give the same responses: every batch has its own seed, and the caller's random state is left alone.

    Args:
        model: Causal LM, or a PEFT model around one; put into evaluation mode for the call.
        tokenizer: Its tokenizer, with EOS and padding tokens.
        prompts: Finished prompt texts; see `encode_prompts` for special tokens.
        k: Responses per prompt, drawn independently, so that duplicates may occur.
        temperature: Divides the logits; above 0.
        top_p: Keep the fewest tokens whose probabilities sum to at least this; 1 keeps all.
        max_new_tokens: A response that has not ended by then is cut.
        batch_size: Responses generated at the same time; at least one prompt's k.
        seed: Of the sampling.
        progress: Called with the number of responses that a batch has added.

    Returns:
        For each prompt, in order, k texts without special tokens. ``prompt + text`` is the whole text: where
        the tokenizer writes words with a space before them, the text begins with that space.

    Raises:
        UserError: a setting outside its range, or nothing to continue.
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
    generation = GenerationConfig(
        do_sample=True,
        num_return_sequences=k,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    encoded = encode_prompts(tokenizer, prompts)
    responses: list[list[str]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for number, batch in enumerate(_batches(encoded, max(1, batch_size // k))):
            rows = left_padded([encoded[index] for index in batch], tokenizer.pad_token_id, model.device)
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seed * 1_000_003 + number)
                generated = model.generate(**rows, generation_config=generation)
            new = generated[:, rows["input_ids"].shape[1] :].tolist()
            for place, index in enumerate(batch):
                own = new[place * k : (place + 1) * k]
                responses[index] = [response_text(tokenizer, encoded[index], ids) for ids in own]
            if progress is not None:
                progress(len(new))
    finally:
        model.train(was_training)
    return responses


def _batches(encoded: Sequence[Sequence[int]], prompts_per_batch: int) -> Iterator[list[int]]:
    """Indices of prompts, longest first, so that what does not fit into memory fails at once."""
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    for start in range(0, len(order), prompts_per_batch):
        yield order[start : start + prompts_per_batch]
