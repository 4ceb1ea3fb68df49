"""Candidates from a causal LM through transformers: on any device, quantised or not, adapter or not.

Prompts of similar length share a batch within a budget of tokens; when the accelerator's memory is out,
the budget is halved and the batch done again in smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import UserError
from rrhf_peft.sample.candidate import Candidate, Decoding, FinishReason
from rrhf_peft.sample.diverse_beam import diverse_beam_search
from rrhf_peft.sample.prompts import encode_prompts
from rrhf_peft.sample.steps import Generated, StopStrings
from rrhf_peft.sample.top_p import sample_rows


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
    *,
    ends: Sequence[int] = (),
    too_long: Callable[[int, str], None] | None = None,
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
        ends: Token ids that end a response beside those of the model and its tokenizer, as a template's end of turn.
        too_long: Told of every prompt (index and reason) that goes beyond the model's context or alone fills the
            memory; it gets no candidates, and the others go on. None: such a prompt is an error.

    Returns:
        For each prompt, in order, its candidates. A beam search that ends early may give fewer than k.

    Raises:
        UserError: a prompt is too long and nobody is told, there are more beams than tokens, or the model's logits
            are not numbers.
    """
    if too_long is None:

        def too_long(index: int, reason: str) -> None:
            raise UserError(f"{reason}.")

    _refuse_beams_beyond_vocabulary(model, decoding)
    stop, all_ends = StopStrings(tokenizer, decoding.stop), sorted({*end_ids(model, tokenizer), *ends})
    candidates: list[list[Candidate]] = [[] for _ in prompts]
    order = _within_context(model, prompts, decoding, too_long)
    if progress is not None and len(order) < len(prompts):
        progress(len(prompts) - len(order), 0)
    was_training = model.training
    model.eval()
    try:
        while order:
            batch = _first_batch(order, prompts, decoding, budget)
            generated = _decode_or_none(
                [prompts[index] for index in batch],
                [keys[index] for index in batch],
                model,
                decoding,
                ends=all_ends,
                pad=int(tokenizer.pad_token_id),
                stop=stop,
            )
            if generated is None and len(batch) > 1:
                torch.cuda.empty_cache()
                budget.halve()
                continue
            if generated is None:
                torch.cuda.empty_cache()
                too_long(
                    batch[0],
                    f"a prompt of {len(prompts[batch[0]])} tokens with {decoding.rows} responses of up to "
                    f"{decoding.max_new_tokens} does not fit into the accelerator's memory on its own. Lower k, "
                    "num_beams, max_new_tokens or sampling.max_prompt_tokens, or set model.quantization: nf4",
                )
                generated = [[]]
            for index, group in zip(batch, generated, strict=True):
                candidates[index] = [_candidate(tokenizer, prompts[index], item, all_ends, stop) for item in group]
            order = order[len(batch) :]
            if progress is not None:
                progress(len(batch), sum(len(item.ids) for group in generated for item in group))
    finally:
        model.train(was_training)
    return candidates


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
    """Draw k responses to each prompt by nucleus sampling (SP in https://arxiv.org/abs/2304.05302), from Python.

    Every response has its own random stream, named by the seed, the prompt's index and the response's
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
        [f"{seed}/{index}" for index in range(len(encoded))],
        Decoding("top_p", k, max_new_tokens, temperature=temperature, top_p=top_p),
        TokenBudget(batch_size * longest),
        advance,
    )
    return [[candidate.text for candidate in group] for group in candidates]


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and whatever else the model's own generation settings stop at."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})


def response_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]) -> str:
    """The response as it reads after its prompt: decoded alone, some tokenizers lose its first space."""
    before, whole = (
        str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt, [*prompt, *response])
    )
    return whole[len(before) :]


def _refuse_beams_beyond_vocabulary(model: Any, decoding: Decoding) -> None:
    """There are no more different first tokens than that; what comes behind them would be filling."""
    vocabulary = model.config.get_text_config().vocab_size
    if decoding.strategy != "top_p" and decoding.num_beams > vocabulary:
        raise UserError(
            f"{decoding.num_beams} beams are more than the {vocabulary} tokens of the model's vocabulary. Lower k or "
            "num_beams."
        )


def _within_context(
    model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, too_long: Callable[[int, str], None]
) -> list[int]:
    """The prompts that leave room for a response, the longest first.

    Beyond their context, models with learnt positions fail in the middle of a batch, and others write nonsense.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    order = []
    for index, prompt in enumerate(prompts):
        if context is None or len(prompt) + decoding.max_new_tokens <= context:
            order.append(index)
            continue
        too_long(
            index,
            f"a prompt of {len(prompt)} tokens and a response of up to {decoding.max_new_tokens} go beyond the model's "
            f"context of {context}. Set sampling.max_prompt_tokens to {max(context - decoding.max_new_tokens, 1)} or "
            "less, or lower max_new_tokens",
        )
    return sorted(order, key=lambda index: -len(prompts[index]))


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
    decoding: Decoding,
    *,
    ends: Sequence[int],
    pad: int,
    stop: StopStrings,
) -> list[list[Generated]] | None:
    """The responses, or None where memory ran out: what the failed attempt held is free once this has returned."""
    limits: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "ends": ends, "pad": pad, "stop": stop}
    try:
        if decoding.strategy == "top_p":
            streams = [[f"{key}/{number}" for number in range(decoding.k)] for key in keys]
            return sample_rows(
                model, prompts, streams, temperature=decoding.temperature, top_p=decoding.top_p, **limits
            )
        is_diverse = decoding.strategy == "diverse_beam"
        beams = diverse_beam_search(
            model,
            prompts,
            num_beams=decoding.num_beams,
            # Plain beam search is one group, with nothing to differ from; it knows no temperature.
            num_beam_groups=decoding.num_beam_groups if is_diverse else 1,
            diversity_penalty=decoding.diversity_penalty if is_diverse else 0.0,
            temperature=decoding.temperature if is_diverse else 1.0,
            length_penalty=decoding.length_penalty,
            early_stopping=decoding.early_stopping,
            **limits,
        )
        return [group[: decoding.k] for group in beams]
    except torch.OutOfMemoryError:
        return None


def _candidate(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], item: Generated, ends: Sequence[int], stop: StopStrings
) -> Candidate:
    ended = bool(item.ids) and item.ids[-1] in ends
    # A model may end turns with a token that its tokenizer does not call special.
    text, stopped = stop.cut(response_text(tokenizer, prompt, item.ids[:-1] if ended else item.ids))
    reason: FinishReason = "stop" if stopped else "eos" if ended else "length"
    return Candidate(text, len(item.ids), item.log_prob, reason, None if stopped else item.ids)
