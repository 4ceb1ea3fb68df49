"""Candidates from a causal LM through transformers: on any device, quantised or not, adapter or not.

Prompts of similar length share a batch within a budget of tokens; when the accelerator's memory is out,
the budget is halved and the batch done again in smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rrhf_peft.records import UserError
from rrhf_peft.sample.candidate import Candidate, Decoding, FinishReason
from rrhf_peft.sample.diverse_beam import diverse_beam_search
from rrhf_peft.sample.stopping import StopStringCriteria, StopStrings
from rrhf_peft.sample.token_rows import end_ids, left_padded, response_text
from rrhf_peft.sample.top_p import Generated, sample_rows


@dataclass
class TokenBudget:
    """How many tokens are decoded together; `halvings` counts how often memory was out."""

    tokens: int
    halvings: int = 0

    def halve(self) -> None:
        """Ask for half as much from now on."""
        self.tokens = max(1, self.tokens // 2)
        self.halvings += 1


@torch.no_grad()
def respond(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
    budget: TokenBudget,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Candidate]]:
    """Decode k candidates for each prompt.

    Args:
        model: Causal LM, or a PEFT model around one; put into evaluation mode for the call.
        tokenizer: Its tokenizer, with EOS and padding tokens.
        prompts: Token ids of each prompt; never empty.
        keys: A name for each prompt; with a candidate's number it names the candidate's random stream.
        decoding: Strategy and settings.
        budget: Lowered in place when memory runs out.
        progress: Called with the numbers of prompts and of tokens that a batch has added.

    Returns:
        For each prompt, in order, its candidates. A beam search that ends early may give fewer than k.

    Raises:
        UserError: a single prompt does not fit into memory, or not into the model's context.
    """
    _refuse_beyond_context(model, prompts, decoding)
    stop, ends = StopStrings(tokenizer, decoding.stop), end_ids(model, tokenizer)
    found: list[list[Candidate]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.eval()
    try:
        while order:
            batch = _first_batch(order, prompts, decoding, budget)
            generated = _decode_or_none(
                [prompts[index] for index in batch], [keys[index] for index in batch], model, tokenizer, decoding, stop
            )
            if generated is None:
                if len(batch) == 1:
                    raise UserError(
                        f"a prompt of {len(prompts[batch[0]])} tokens with {decoding.rows} responses of up to "
                        f"{decoding.max_new_tokens} does not fit into the accelerator's memory on its own. Lower k, "
                        "num_beams, max_new_tokens or sampling.max_prompt_tokens, or set model.quantization: nf4."
                    )
                torch.cuda.empty_cache()
                budget.halve()
                continue
            for index, own in zip(batch, generated, strict=True):
                found[index] = [_candidate(tokenizer, prompts[index], item, ends, stop) for item in own]
            order = order[len(batch) :]
            if progress is not None:
                progress(len(batch), sum(len(item.ids) for own in generated for item in own))
    finally:
        model.train(was_training)
    return found


def _first_batch(
    order: Sequence[int], prompts: Sequence[Sequence[int]], decoding: Decoding, budget: TokenBudget
) -> list[int]:
    """The longest prompts that are left, as many as fit into the budget, and one at least."""
    width = (len(prompts[order[0]]) + decoding.max_new_tokens) * decoding.rows
    return list(order[: max(1, budget.tokens // width)])


def _decode_or_none(
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    stop: StopStrings,
) -> list[list[Generated]] | None:
    """The responses, or None where memory ran out: what the failed attempt held is free once this has returned."""
    try:
        return _decode(prompts, keys, model, tokenizer, decoding, stop)
    except torch.OutOfMemoryError:
        return None


def _decode(
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    stop: StopStrings,
) -> list[list[Generated]]:
    ends = end_ids(model, tokenizer)
    pad = int(tokenizer.pad_token_id)
    if decoding.strategy == "top_p":
        return sample_rows(
            model,
            prompts,
            [[f"{key}/{number}" for number in range(decoding.k)] for key in keys],
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_new_tokens=decoding.max_new_tokens,
            ends=ends,
            pad=pad,
            stop=stop,
        )
    if decoding.strategy == "beam":
        return _beam_search(model, prompts, decoding, ends, pad, stop)
    found = diverse_beam_search(
        model,
        prompts,
        num_beams=decoding.num_beams,
        num_beam_groups=decoding.num_beam_groups,
        diversity_penalty=decoding.diversity_penalty,
        temperature=decoding.temperature,
        length_penalty=decoding.length_penalty,
        early_stopping=decoding.early_stopping,
        max_new_tokens=decoding.max_new_tokens,
        ends=ends,
        pad=pad,
        stop=stop,
    )
    return [own[: decoding.k] for own in found]


def _beam_search(
    model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, ends: list[int], pad: int, stop: StopStrings
) -> list[list[Generated]]:
    """transformers' own; it keeps no log-probs unless it keeps those of the whole vocabulary."""
    rows = left_padded(prompts, pad, model.device)
    width = rows["input_ids"].shape[1]
    generation = GenerationConfig(
        do_sample=False,
        num_beams=max(decoding.num_beams, 1),
        num_return_sequences=decoding.k,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty,
        early_stopping=decoding.early_stopping,
        repetition_penalty=1.0,  # some models' own settings would change the strategy
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    criteria = [StopStringCriteria(stop, width)] if stop else []
    output = model.generate(**rows, generation_config=generation, stopping_criteria=criteria)
    found = [Generated(_without_filling(ids, ends, pad), None) for ids in output[:, width:].tolist()]
    return [found[start : start + decoding.k] for start in range(0, len(found), decoding.k)]


def _without_filling(ids: list[int], ends: Sequence[int], pad: int) -> list[int]:
    """A response up to its end token, without what fills the row behind it."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _candidate(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], item: Generated, ends: Sequence[int], stop: StopStrings
) -> Candidate:
    ended = bool(item.ids) and item.ids[-1] in ends
    # A model may end turns with a token that its tokenizer does not call special.
    text, stopped = stop.cut(response_text(tokenizer, prompt, item.ids[:-1] if ended else item.ids))
    reason: FinishReason = "stop" if stopped else "eos" if ended else "length"
    return Candidate(text, len(item.ids), item.log_prob, reason)


def _refuse_beyond_context(model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
    """Models with learnt positions fail in the middle of a batch, and others write nonsense."""
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if context is not None and longest + decoding.max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and a response of up to {decoding.max_new_tokens} go beyond the model's "
            f"context of {context}. Set sampling.max_prompt_tokens to {max(context - decoding.max_new_tokens, 1)} or "
            "less, or lower max_new_tokens."
        )
