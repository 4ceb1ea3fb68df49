"""The engine proves itself: on the first batch of a run, its log-probs against the model's own logits.

A mask that an attention implementation ignores, a position bias tied to the column in the row, a window
that other responses fill, logits scaled in a way `Head` does not know: all of these are silent, and some
show only in long rows. So the shared layout of the batch's longest groups is compared with plain rows, one
at a time, and the model's own logits, and the run falls back to what agrees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rrhf_peft.logprobs.engine import ENGINE_KEYS, LogProbEngine, causal_lm_of
from rrhf_peft.records import ResponseLogProbs, UserError

#: Largest mean difference per response token, in nats, that rounding explains, by compute type.
#: A wrong mask shows up as tenths.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 4e-2}

#: 8-bit layers quantise activations by batch, so the same token differs from batch to batch.
TOLERANCE_INT8 = 1e-1

#: Groups that are laid out, the longest ones, and responses of each that are compared with the model's own logits.
_GROUPS, _RESPONSES = 2, 8

#: Elements of the whole logits that the model's own forward makes at a time.
_LOGITS = {"cpu": 2**26}
_LOGITS_GPU = 2**28

_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Proof:
    """What the self-check found.

    Attributes:
        layout: the layout the run will use.
        own_logits: whether logits come from the model's own forward.
        difference: of that layout, mean absolute log-prob difference per token, in nats.
        tolerance: what rounding in the compute type may explain.
        rejected: what was tried first and why it was not used, empty when the first choice held.
    """

    layout: str
    own_logits: bool
    difference: float
    tolerance: float
    rejected: tuple[str, ...] = ()


def prove(model: nn.Module, engine: LogProbEngine, batch: Mapping[str, Any], *, fall_back: bool = True) -> Proof:
    """Check the engine on the longest groups of `batch` and settle its layout; every process must call this.

    Where memory runs out, half of the responses are compared, and so on: that is no property of the model.

    Args:
        model: as the training step calls it, wrapped or not.
        engine: installed on it; `layout` and `own_logits` are changed where they must be.
        batch: a `GroupBatch` on the model's device.
        fall_back: when false, a layout that does not hold is an error instead.

    Raises:
        UserError: `fall_back` is false and the engine's layout does not hold, or memory is out at one response.
    """
    responses = _longest(batch, engine.chunk_tokens)
    while True:
        proof = _prove_on(model, engine, _part(batch, responses), fall_back)
        if proof is not None:
            return proof
        if _everywhere(len(responses) <= 2, batch["input_ids"].device):
            raise UserError(
                "engine: the memory does not hold two responses of the longest group of the first batch, even without "
                "a backward pass. Lower data.max_tokens, quantise the model (model.quantization: nf4), or use a "
                "device with more memory."
            )
        responses = _longest(batch, engine.chunk_tokens, most=max(2, len(responses) // 2))


def _prove_on(model: nn.Module, engine: LogProbEngine, sample: dict[str, Any], fall_back: bool) -> Proof | None:
    """The proof on these groups, or None where one of the processes has too little memory for it."""
    mode, wanted, chunk_tokens = model.training, (engine.layout, engine.own_logits), engine.chunk_tokens
    inner: Any = causal_lm_of(model)
    device, vocabulary = sample["input_ids"].device, inner.config.get_text_config().vocab_size
    compared = _spread(sample["group"].tolist())
    settled = wanted
    model.eval()  # dropout would hide the comparison
    try:
        with torch.no_grad():
            engine.layout, engine.own_logits = "plain", True
            whole_logits = max(1, _LOGITS.get(device.type, _LOGITS_GPU) // vocabulary)
            engine.chunk_tokens = min(chunk_tokens, whole_logits, len(sample["input_ids"]))
            reference, _ = _attempt(model, engine, _part(sample, compared), ())
            if reference is None:
                return None
            tolerance = _tolerance(model, engine)
            engine.chunk_tokens = chunk_tokens
            rejected: list[str] = []
            for layout, own_logits in dict.fromkeys([wanted, ("plain", False)]):
                engine.layout, engine.own_logits = layout, own_logits
                got, reason = _attempt(model, engine, sample, _REFUSALS)
                if got is None and reason is None:
                    return None
                difference = float("inf")
                if got is not None:
                    difference = float(((got.sum[compared] - reference.sum).abs() / reference.num_tokens).max())
                    if not difference <= tolerance:
                        reason = f"log-probs differ by {difference:.2g} nats per token"
                if not _worst(reason is not None, device):
                    settled = (layout, own_logits)
                    return Proof(layout, own_logits, difference, tolerance, tuple(rejected))
                rejected.append(f"{layout}: {reason or 'it does not hold on another process'}")
                if not fall_back:
                    raise UserError(
                        f"engine.layout: {layout} does not give this model's own log-probs ({rejected[-1]}). "
                        "Use engine.layout: auto, which falls back to what does."
                    )
            settled = ("plain", True)
            return Proof("plain", True, 0.0, tolerance, tuple(rejected))
    finally:
        (engine.layout, engine.own_logits), engine.chunk_tokens = settled, chunk_tokens
        model.train(mode)


def _attempt(
    model: nn.Module, engine: LogProbEngine, sample: dict[str, Any], refusals: tuple[type[Exception], ...]
) -> tuple[ResponseLogProbs | None, str | None]:
    """(log-probs, None), (None, why the model refuses), or (None, None) if any process is out of memory; collective."""
    got, reason = None, None
    try:
        got = engine.log_probs(model, sample)
    except Exception as error:
        if not _is_out_of_memory(error):
            if not isinstance(error, refusals):
                raise
            reason = f"the model refuses it: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
    if _worst(got is None and reason is None, sample["input_ids"].device):
        return None, None
    return got, reason


def _is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator has no type of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _worst(bad: bool, device: torch.device) -> bool:
    """Whether something is bad on any process; collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return bad
    flag = torch.tensor(float(bad), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _everywhere(true: bool, device: torch.device) -> bool:
    """Whether something holds on all processes; collective."""
    return not _worst(not true, device)


def _members(groups: Sequence[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for response, owner in enumerate(groups):
        members.setdefault(owner, []).append(response)
    return members


def _longest(batch: Mapping[str, Any], chunk_tokens: int, most: int | None = None) -> list[int]:
    """The responses of the longest groups: of each as many as fit a chunk, two at least, and about `most` of all."""
    prompts, lengths = batch["prompt_lengths"].tolist(), batch["response_lengths"].tolist()
    members = _members(batch["group"].tolist())

    def weight(g: int) -> tuple[bool, int]:  # later responses of several tokens are what a wrong mask spoils
        telling = any(lengths[response] > 1 for response in members[g][1:])
        return telling, prompts[g] + sum(lengths[response] for response in members[g])

    chosen: list[int] = []
    groups = _GROUPS if most is None or most >= 2 * _GROUPS else 1
    for g in sorted(members, key=weight, reverse=True)[:groups]:
        ends = itertools.accumulate((lengths[response] for response in members[g]), initial=prompts[g])
        fitting = max(2, sum(end <= chunk_tokens for end in ends) - 1)
        chosen += members[g][: fitting if most is None else min(fitting, most // groups)]
    return sorted(chosen)


def _spread(groups: Sequence[int]) -> list[int]:
    """Some responses of every group from its first to its last, which stands farthest from the prompt."""
    chosen: list[int] = []
    for responses in _members(groups).values():
        step = max(1, math.ceil((len(responses) - 1) / (_RESPONSES - 1)))
        chosen += sorted({*responses[::step], responses[-1]})
    return chosen


def _part(batch: Mapping[str, Any], responses: Sequence[int]) -> dict[str, Any]:
    """The batch with these responses only, and their prompts."""
    prompts, lengths, owners = (batch[name].tolist() for name in ("prompt_lengths", "response_lengths", "group"))
    kept, chosen = set(responses), dict.fromkeys(owners[response] for response in responses)
    pieces, offset, response = [], 0, 0
    for g, prompt in enumerate(prompts):
        if g in chosen:
            pieces.append(range(offset, offset + prompt))
        offset += prompt
        while response < len(owners) and owners[response] == g:
            if response in kept:
                pieces.append(range(offset, offset + lengths[response]))
            offset += lengths[response]
            response += 1
    renumbered = {g: number for number, g in enumerate(chosen)}
    values = (
        batch["input_ids"][torch.tensor([*itertools.chain(*pieces)], device=batch["input_ids"].device)],
        torch.tensor([prompts[g] for g in chosen]),
        torch.tensor([lengths[response] for response in responses]),
        torch.tensor([renumbered[owners[response]] for response in responses]),
    )
    return dict(zip(ENGINE_KEYS, values, strict=True))


def _tolerance(model: nn.Module, engine: LogProbEngine) -> float:
    inner: Any = causal_lm_of(model)
    if getattr(inner, "is_loaded_in_8bit", False):
        return TOLERANCE_INT8
    return TOLERANCE[engine.compute_dtype]
