"""Candidates from a causal LM through transformers: on any device, quantised or not, adapter or not.

Prompts of similar length share a batch within a budget of tokens; when the accelerator's memory is out,
the budget is halved and the batch done again in smaller ones.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rrhf_peft.data import encode_prompts
from rrhf_peft.modeling import TokenBudget
from rrhf_peft.records import UserError
from rrhf_peft.sample.policies import Candidate, Decoding, FinishReason


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

    progress = progress or (lambda prompts, tokens: None)
    _refuse_beams_beyond_vocabulary(model, decoding)
    stop, all_ends = StopStrings(tokenizer, decoding.stop), sorted({*end_ids(model, tokenizer), *ends})
    fitting = _within_context(model, prompts, decoding, too_long)
    if len(fitting) < len(prompts):
        progress(len(prompts) - len(fitting), 0)

    def decode(batch: list[int]) -> list[list[Candidate]]:
        indices = [fitting[number] for number in batch]
        generated = _decode(
            [prompts[index] for index in indices],
            [keys[index] for index in indices],
            model,
            decoding,
            ends=all_ends,
            pad=int(tokenizer.pad_token_id),
            stop=stop,
        )
        progress(len(batch), sum(len(item.ids) for group in generated for item in group))
        return [
            [_candidate(tokenizer, prompts[index], item, all_ends, stop) for item in group]
            for index, group in zip(indices, generated, strict=True)
        ]

    def too_large(number: int) -> list[Candidate]:
        too_long(
            fitting[number],
            f"a prompt of {len(prompts[fitting[number]])} tokens with {decoding.rows} responses of up to "
            f"{decoding.max_new_tokens} does not fit into the accelerator's memory on its own. Lower k, num_beams, "
            "max_new_tokens or sampling.max_prompt_tokens, or set model.quantization: nf4",
        )
        progress(1, 0)
        return []

    lengths = [(len(prompts[index]) + decoding.max_new_tokens) * decoding.rows for index in fitting]
    candidates: list[list[Candidate]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for index, group in zip(fitting, budget.map(lengths, decode, too_large), strict=True):
            candidates[index] = group
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
    """The prompts that leave room for a response.

    Beyond their context, models with learnt positions fail in the middle of a batch, and others write nonsense.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fitting = []
    for index, prompt in enumerate(prompts):
        if context is None or len(prompt) + decoding.max_new_tokens <= context:
            fitting.append(index)
            continue
        too_long(
            index,
            f"a prompt of {len(prompt)} tokens and a response of up to {decoding.max_new_tokens} go beyond the model's "
            f"context of {context}. Set sampling.max_prompt_tokens to {max(context - decoding.max_new_tokens, 1)} or "
            "less, or lower max_new_tokens",
        )
    return fitting


def _decode(
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    model: Any,
    decoding: Decoding,
    *,
    ends: Sequence[int],
    pad: int,
    stop: StopStrings,
) -> list[list[Generated]]:
    """The responses of one batch."""
    limits: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "ends": ends, "pad": pad, "stop": stop}
    if decoding.strategy == "top_p":
        streams = [[f"{key}/{number}" for number in range(decoding.k)] for key in keys]
        return sample_rows(model, prompts, streams, temperature=decoding.temperature, top_p=decoding.top_p, **limits)
    from rrhf_peft.sample.diverse_beam import diverse_beam_search

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


def _candidate(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], item: Generated, ends: Sequence[int], stop: StopStrings
) -> Candidate:
    ended = bool(item.ids) and item.ids[-1] in ends
    # A model may end turns with a token that its tokenizer does not call special.
    text, stopped = stop.cut(response_text(tokenizer, prompt, item.ids[:-1] if ended else item.ids))
    reason: FinishReason = "stop" if stopped else "eos" if ended else "length"
    return Candidate(text, len(item.ids), item.log_prob, reason, None if stopped else item.ids)


# ---- Rows that grow by one token a step ----


class Generated(NamedTuple):
    """Token ids of one response, its end token included, and the sum of their log-probs."""

    ids: list[int]
    log_prob: float


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both int64 [rows, longest row]."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
    }


class CachedSteps:
    """Prompts read once, then R rows that grow by one token a step.

    Row ``prompt * copies + copy`` continues that prompt. The prompts pass the model once, and the cache is
    repeated afterwards.

    Args:
        model: Causal LM, or a PEFT model around one, in evaluation mode.
        prompts: Token ids of each prompt; never empty.
        pad: Any token id; padded positions are masked.
        copies: Rows for each prompt.

    Attributes:
        logits: float32 [R, V], of the next token of every row.

    Raises:
        UserError: the logits are not numbers, or the model keeps no cache whose rows can be copied.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int, copies: int) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = set(inspect.signature(base.forward).parameters)
        # Models whose every layer keeps a state (Mamba) call their cache by another name.
        self._cache_name = "past_key_values" if "past_key_values" in self._accepts else "cache_params"
        rows = left_padded(prompts, pad, model.device)
        self._mask = rows["attention_mask"]
        self._cache: Any = None  # the model makes the kind it needs
        logits = self._forward(rows["input_ids"])
        if not hasattr(self._cache, "reorder_cache"):
            raise UserError(
                f"{type(base).__name__}: keeps its state where rows cannot be copied, so it cannot be sampled here. "
                "Serve it, for example with vLLM, and set backend: endpoint."
            )
        self.logits = logits
        if copies > 1:
            # Not `batch_repeat_interleave`, which layers with a recurrent state do not have.
            self._select(torch.arange(len(prompts), device=logits.device).repeat_interleave(copies))

    def advance(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Append `tokens` (int64 [R']) to the rows `parents` (int64 [R'], by default all in order)."""
        if parents is not None:
            self._select(parents)
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), 1)
        self.logits = self._forward(tokens[:, None])

    def _select(self, rows: torch.Tensor) -> None:
        self._cache.reorder_cache(rows)
        self._mask, self.logits = self._mask[rows], self.logits[rows]

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            # A state has passed over the padding already, and such a model takes the mask for that of the new tokens.
            "attention_mask": None if self._cache is not None and self._cache_name == "cache_params" else self._mask,
            "position_ids": (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            self._cache_name: self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(**{name: value for name, value in arguments.items() if name in self._accepts})
        self._cache = getattr(output, self._cache_name, None)
        logits: torch.Tensor = output.logits[:, -1].float()
        # The largest logit is NaN where any is. A draw from it would be a token all the same.
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise UserError(
                f"the model {self.model.config.name_or_path or type(self.model).__name__} gives logits that are not "
                "numbers. Its weights are damaged, or their dtype is too narrow: check the files, or set model.dtype: "
                "float32."
            )
        return logits


class StopStrings:
    """Says whether generated tokens spell one of the stop strings.

    Only the last tokens are looked at, as many as the longest stop string has bytes and a few more: a
    token that writes anything writes at least one byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self.reach = max((len(text.encode()) for text in strings), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self.strings)

    def hit(self, response: Sequence[int]) -> bool:
        """Whether the end of a response's token ids spells a stop string."""
        tail = self.tokenizer.decode(list(response[-self.reach :]), skip_special_tokens=True)
        return any(text in tail for text in self.strings)

    def cut(self, text: str) -> tuple[str, bool]:
        """The text before the first stop string, and whether there was one."""
        ends = [end for end in (text.find(stop) for stop in self.strings) if end >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


# ---- Nucleus sampling ----


def uniform_stream(key: str, length: int) -> list[float]:
    """`length` numbers in [0, 1) that depend on `key` alone, on every machine."""
    stream = random.Random(key)
    return [stream.random() for _ in range(length)]


#: Tokens that are sorted first: most nuclei end among them, and a vocabulary is long to sort.
_HEAD = 256


def draw(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """One token for each row, by inverting the cumulative distribution over the nucleus.

    Args:
        logits: [R, V].
        uniforms: float64 [R], in [0, 1).
        temperature: Divides the logits; above 0.
        top_p: The nucleus is the fewest tokens whose probabilities sum to at least this.

    Returns:
        int64 [R].
    """
    probs = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        probs = _nucleus(probs, top_p)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    aim = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, aim[:, None], right=True)[:, 0]


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """`probs` [R, V] with 0 for all but the fewest tokens that sum to `top_p`; of equal ones the first are kept."""

    def border(ordered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many tokens the nucleus has, and the probability of its last, both [R, 1]."""
        size = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)  # what comes before holds less
        return size, ordered.gather(-1, size - 1)

    head = probs.topk(min(_HEAD, probs.shape[1])).values
    size, last = border(head)
    if (beyond := (size == head.shape[1])[:, 0]).any():
        size[beyond], last[beyond] = border(probs[beyond].sort(dim=-1, descending=True).values)
    kept = probs.masked_fill(probs < last, 0)
    if (tied := (kept > 0).sum(-1) > size[:, 0]).any():
        equal = kept[tied] == last[tied]
        surplus = equal.cumsum(-1) > size[tied] - (kept[tied] > last[tied]).sum(-1, keepdim=True)
        kept[tied] = kept[tied].masked_fill(equal & surplus, 0)
    return kept


@torch.no_grad()
def sample_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[str]],
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    stop: StopStrings,
) -> list[list[Generated]]:
    """Draw responses to each prompt, as many as it has keys (the same number for all).

    Args:
        prompts: Token ids.
        keys: For each prompt, the names of its responses' random streams.
        ends: Token ids that end a response.
        pad: Any token id.
        stop: Strings that end a response.
    """
    copies = len(keys[0])
    flat = [key for row in keys for key in row]
    uniforms = torch.tensor([uniform_stream(key, max_new_tokens) for key in flat], dtype=torch.float64)
    steps = CachedSteps(model, prompts, pad, copies)
    device = steps.logits.device
    uniforms, end_tokens = uniforms.to(device), torch.tensor(list(ends), device=device)
    ids = torch.zeros(len(flat), max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.zeros(len(flat), dtype=torch.long, device=device)
    log_probs = torch.zeros(len(flat), dtype=torch.float64, device=device)
    rows = torch.arange(len(flat), device=device)  # which response each row of the cache is
    alive = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens = draw(steps.logits, uniforms[rows, step], temperature=temperature, top_p=top_p)
        chosen = steps.logits.gather(-1, tokens[:, None])[:, 0] - steps.logits.logsumexp(-1)
        ids[rows, step] = tokens
        lengths[rows] += alive
        log_probs[rows] += chosen.double() * alive
        ended = torch.isin(tokens, end_tokens)
        if stop:
            tails = ids[rows, max(0, step + 1 - stop.reach) : step + 1].tolist()
            ended |= torch.tensor([stop.hit(tail) for tail in tails], device=device)
        alive &= ~ended
        left = int(alive.sum())
        if left == 0 or step == max_new_tokens - 1:
            break
        parents = None
        if 2 * left <= len(rows):  # copying the cache pays when half of its rows are done
            parents = alive.nonzero()[:, 0]
            rows, tokens, alive = rows[parents], tokens[parents], alive[parents]
        steps.advance(tokens, parents)
    generated = [
        Generated(row[:length], total)
        for row, length, total in zip(ids.tolist(), lengths.tolist(), log_probs.tolist(), strict=True)
    ]
    return [generated[start : start + copies] for start in range(0, len(flat), copies)]
