"""The engine proves itself: on the first batch of a run, its log-probs against the model's own logits.

A mask that an attention implementation ignores, a position bias tied to the place in the row, logits
scaled in a way `Head` does not know: all of these are silent. So the shared layout is compared with
plain padded rows and the model's own logits, and the run falls back to what agrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rrhf_peft.logprobs.engine import MODEL_KEYS, LogProbEngine, causal_lm_of

#: Largest mean difference per response token, in nats, that rounding explains, by compute type.
#: A wrong mask shows up as tenths.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 4e-2}

#: 8-bit layers quantise activations by batch, so the same token differs from batch to batch.
TOLERANCE_INT8 = 1e-1

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
    """Check the engine on a few responses of `batch` and settle its layout; every process must call this.

    Args:
        model: as the training step calls it, wrapped or not.
        engine: installed on it; `layout` and `own_logits` are changed where they must be.
        batch: a `GroupBatch` on the model's device.
        fall_back: when false, a layout that does not hold is an error instead.

    Raises:
        ValueError: `fall_back` is false and the engine's layout does not hold.
    """
    sample = _few_responses(batch)
    mode = model.training
    model.eval()  # dropout would hide the comparison
    wanted = (engine.layout, engine.own_logits)
    try:
        with torch.no_grad():
            engine.layout, engine.own_logits = "plain", True
            reference = engine.log_probs(model, sample)
            tolerance = _tolerance(model, engine)
            rejected: list[str] = []
            for layout, own_logits in dict.fromkeys([wanted, ("plain", False)]):
                engine.layout, engine.own_logits = layout, own_logits
                difference, reason = _compare(model, engine, sample, reference, tolerance)
                if reason is None:
                    return Proof(layout, own_logits, difference, tolerance, tuple(rejected))
                rejected.append(f"{layout}: {reason}")
                if not fall_back:
                    raise ValueError(
                        f"engine.layout: {layout} does not give this model's own log-probs ({reason}). "
                        "Use engine.layout: auto, which falls back to what does."
                    )
            engine.layout, engine.own_logits = "plain", True
            return Proof("plain", True, 0.0, tolerance, tuple(rejected))
    finally:
        model.train(mode)


def _compare(
    model: nn.Module, engine: LogProbEngine, sample: dict[str, torch.Tensor], reference: Any, tolerance: float
) -> tuple[float, str | None]:
    """(difference, None) when the engine agrees, (difference, why not) otherwise, the same on all processes."""
    try:
        got = engine.log_probs(model, sample)
        difference = float(((got.sum - reference.sum).abs() / reference.num_tokens).max())
        reason = None if difference <= tolerance else f"log-probs differ by {difference:.2g} nats per token"
    except _REFUSALS as error:
        difference, reason = float("inf"), f"the model refuses it: {str(error).splitlines()[0][:200]}"
    if dist.is_available() and dist.is_initialized():
        failed = torch.tensor(float(reason is not None), device=sample["input_ids"].device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed and reason is None:
            reason = "it does not hold on another process"
    return difference, reason


def _few_responses(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Two groups of the batch, three responses each: enough to see a wrong mask, small enough for whole logits."""
    prompts, lengths = batch["prompt_lengths"].tolist(), batch["response_lengths"].tolist()
    members: list[list[int]] = [[] for _ in prompts]
    for response, owner in enumerate(batch["group"].tolist()):
        members[owner].append(response)

    def cost(g: int) -> tuple[bool, int]:  # later responses of several tokens are what a wrong mask spoils
        telling = any(lengths[response] > 1 for response in members[g][1:3])
        return not telling, prompts[g] + sum(lengths[response] for response in members[g][:3])

    ids, offset = batch["input_ids"], 0
    starts, response_starts = [], []
    for g, prompt in enumerate(prompts):
        starts.append(offset)
        offset += prompt
        for response in members[g]:
            response_starts.append(offset)
            offset += lengths[response]
    chosen = sorted(range(len(prompts)), key=cost)[:2]
    parts, owners, kept = [], [], []
    for number, g in enumerate(chosen):
        parts.append(ids[starts[g] : starts[g] + prompts[g]])
        for response in members[g][:3]:
            parts.append(ids[response_starts[response] : response_starts[response] + lengths[response]])
            owners.append(number)
            kept.append(lengths[response])
    device = ids.device
    values = (
        torch.cat(parts),
        torch.tensor([prompts[g] for g in chosen], device=device),
        torch.tensor(kept, device=device),
        torch.tensor(owners, device=device),
    )
    return dict(zip(MODEL_KEYS, values, strict=True))


def _tolerance(model: nn.Module, engine: LogProbEngine) -> float:
    inner: Any = causal_lm_of(model)
    if getattr(inner, "is_loaded_in_8bit", False):
        return TOLERANCE_INT8
    return TOLERANCE[engine.compute_dtype]
