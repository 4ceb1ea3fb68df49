"""The engine: a causal LM and a `GroupBatch` in, `ResponseLogProbs` out, inside the model's own forward.

`install` replaces the forward of the innermost causal LM, so that whatever wraps it (PEFT, autocast,
DDP, FSDP2, DeepSpeed) sees one forward and one backward per batch, and everything that is not a
batch of groups (`generate`, evaluation, saving) goes to the model's own forward untouched.

The batch is laid out in chunks; with more than one, every chunk but the last is recomputed in the
backward pass, so peak memory is that of one chunk however many responses there are.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from rrhf_peft.logprobs.head import Head, count_slices, scores_only, token_log_probs
from rrhf_peft.logprobs.layout import Rows, plan_chunks, shared_layout_obstacle, shared_mask
from rrhf_peft.records import ResponseLogProbs, UserError

logger = logging.getLogger(__name__)

#: The part of a GroupBatch that the model sees; scores and sources stay outside.
MODEL_KEYS = ("input_ids", "prompt_lengths", "response_lengths", "group")

#: What one chunk may take for activations under `chunk_tokens: auto`, in bytes.
_CHUNK_BYTES = 4 * 2**30


@dataclass
class LogProbEngine:
    """How the log-probs of one model are computed; `self_check.prove` may change the layout, nothing else does.

    Attributes:
        layout: shared (each prompt once) or plain (one row per response).
        chunk_tokens: padded tokens per chunk.
        own_logits: take logits from the model's own forward instead of the chunked head: for models
            whose logits are not what `Head` knows.
        compute_dtype: the coarsest type the last forward computed in, autocast and sharding wrappers included.
        same_chunks_everywhere: every process runs as many chunks, and slices of the head, as the one that has
            most. Sharded parameters (FSDP, ZeRO-3) need it: each of them gathers weights from all processes.
        tokens: what the layouts saw and saved since the engine was installed.
        told: whether the user knows what several chunks cost under sharding.
    """

    layout: Literal["shared", "plain"]
    chunk_tokens: int
    own_logits: bool = False
    compute_dtype: torch.dtype = torch.float32
    same_chunks_everywhere: bool = False
    tokens: TokenCount = field(default_factory=lambda: TokenCount())
    told: bool = field(default=False, repr=False)

    def log_probs(self, model: nn.Module, batch: Mapping[str, Any]) -> ResponseLogProbs:
        """Log-probs of every response of a batch, through whatever wraps the model.

        Args:
            model: the model this engine is installed on, wrapped or not.
            batch: a `GroupBatch` on the model's device.
        """
        log_probs: ResponseLogProbs = model(**{name: batch[name] for name in MODEL_KEYS})
        # Sums of a hundred nats have steps of half a nat in bfloat16, larger than what objectives compare.
        assert log_probs.sum.dtype == torch.float32, (
            f"what wraps the model casts the log-probs to {log_probs.sum.dtype}. Give fully_shard a "
            "MixedPrecisionPolicy without output_dtype"
        )
        return log_probs


@dataclass
class TokenCount:
    """Tokens of the training batches so far, for rates and savings.

    Attributes:
        responses: tokens that were scored.
        seen: prompt and response tokens that went through the model.
        unshared: what the same batches hold with every prompt once per response.
    """

    responses: int = 0
    seen: int = 0
    unshared: int = 0


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The transformers causal LM inside PEFT or a distributed wrapper."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def install(
    model: nn.Module,
    *,
    layout: Literal["auto", "shared", "plain"] = "auto",
    chunk_tokens: int | Literal["auto"] = "auto",
    same_chunks_everywhere: bool = False,
) -> LogProbEngine:
    """Teach a causal LM (or a PEFT model around one) to take a batch of groups; returns the engine.

    Installing again replaces the engine.

    Args:
        model: transformers causal LM or PEFT model.
        layout: auto takes the shared layout unless the model's config already rules it out.
        chunk_tokens: padded tokens per chunk; auto from the model's size.
        same_chunks_everywhere: see `LogProbEngine`.

    Raises:
        UserError: the shared layout is asked for and the model's config rules it out.
    """
    inner: Any = causal_lm_of(model)
    uninstall(model)
    obstacle = shared_layout_obstacle(inner.config.get_text_config())
    if layout == "shared" and obstacle:
        raise UserError(
            f"engine.layout: this model ({inner.config.model_type}) cannot share a prompt's computation among its "
            f"responses: {obstacle}. Use auto, which computes one row per response for it."
        )
    engine = LogProbEngine(
        layout="plain" if layout == "plain" or obstacle else "shared",
        chunk_tokens=default_chunk_tokens(inner) if chunk_tokens == "auto" else chunk_tokens,
        same_chunks_everywhere=same_chunks_everywhere,
    )
    original = inner.forward

    # `generate`, sampling and `Trainer` read the signature; of a bound method it would lose its first parameter twice.
    @functools.wraps(getattr(original, "__func__", original))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "response_lengths" not in kwargs:
            return original(*args, **kwargs)
        return _batch_log_probs(self, engine, original, **{name: kwargs[name] for name in MODEL_KEYS})

    forward.rrhf_engine = engine  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)
    return engine


def uninstall(model: nn.Module) -> None:
    """Give the causal LM its own forward back."""
    inner = causal_lm_of(model)
    if hasattr(inner.__dict__.get("forward"), "rrhf_engine"):
        del inner.forward


def default_chunk_tokens(model: Any) -> int:
    """A chunk whose activations fit in about 4 GiB, from the model's shape.

    A layer keeps about 16 hidden and 6 intermediate vectors per token for its backward pass; with
    gradient checkpointing only its input stays, and one layer at a time is recomputed.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    width = 4 if model.dtype == torch.float32 else 2
    one_layer = (16 * hidden + 6 * intermediate) * width
    per_token = layers * hidden * width + one_layer if _is_checkpointing(model) else layers * one_layer
    return int(min(max(_CHUNK_BYTES // per_token, 512), 16384))


def _is_checkpointing(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _batch_log_probs(
    model: Any,
    engine: LogProbEngine,
    original: Any,
    input_ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    response_lengths: torch.Tensor,
    group: torch.Tensor,
) -> ResponseLogProbs:
    prompts, responses, owners = prompt_lengths.tolist(), response_lengths.tolist(), group.tolist()
    chunks = plan_chunks(prompts, responses, owners, layout=engine.layout, chunk_tokens=engine.chunk_tokens)
    _count_tokens(engine.tokens, chunks, prompts, responses, owners)

    count, slices = _as_everywhere(model, engine, chunks, input_ids.device)
    _warn_of_gathered_weights(engine, count, chunks)
    forward = functools.partial(_forward_rows, model, engine, original, input_ids, slices, count > 1)
    sums = [
        _chunk_sums(forward, rows.to(input_ids.device), recompute=number < count - 1)
        for number, rows in enumerate(chunks + [chunks[-1]] * (count - len(chunks)))
    ]
    order = torch.cat([rows.response for rows in chunks]).argsort().to(input_ids.device)
    ordered = torch.cat(sums[: len(chunks)])[order]
    for surplus in sums[len(chunks) :]:  # in the graph, so that every process also runs as many backwards
        ordered = ordered + 0.0 * surplus.sum()

    longest = [0] * len(prompts)
    for owner, length in zip(owners, responses, strict=True):
        longest[owner] = max(longest[owner], prompts[owner] + length)
    padded_length = torch.tensor(longest, device=group.device)[group]
    return ResponseLogProbs(ordered, response_lengths, padded_length, group)


def _chunk_sums(forward: Callable[[Rows], torch.Tensor], rows: Rows, recompute: bool) -> torch.Tensor:
    """Sum of log-probs per response of one chunk, float32 [m]; recomputed in backward when asked."""
    if not (recompute and torch.is_grad_enabled()):
        return forward(rows)
    sums: torch.Tensor = checkpoint(
        forward, rows, use_reentrant=False, context_fn=lambda: (scores_only(), nullcontext())
    )
    return sums


def _forward_rows(
    model: Any, engine: LogProbEngine, original: Any, input_ids: torch.Tensor, slices: int, several: bool, rows: Rows
) -> torch.Tensor:
    if several and input_ids.device.type == "cpu":
        _return_freed_memory()
    arguments: dict[str, Any] = {"input_ids": input_ids[rows.token], "use_cache": False}
    dtype = _compute_dtype(model, input_ids.device)
    if engine.layout == "shared":
        config = model.config.get_text_config()
        arguments["position_ids"] = rows.position
        arguments["attention_mask"] = shared_mask(rows, config, dtype)
    elif bool((rows.piece < 0).any()):  # rows are padded on the right
        arguments["attention_mask"] = (rows.piece >= 0).long()
    targets = input_ids[rows.target]
    if engine.own_logits:
        computed = original(**arguments).logits.flatten(0, 1)[rows.predictor]
        values = torch.log_softmax(computed.float(), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    else:
        computed = model.base_model(**arguments)[0].flatten(0, 1)[rows.predictor]
        values = token_log_probs(computed, targets, Head.of(model), slices)
    # FSDP2 computes in its own type, of which the sharded weights and autocast need not know.
    engine.compute_dtype = max(dtype, computed.dtype, key=lambda kind: torch.finfo(kind).eps)
    return torch.segment_reduce(values, "sum", lengths=rows.length, unsafe=True)


def _return_freed_memory() -> None:
    """Between chunks on a CPU: what earlier ones have freed goes back to the system (glibc; elsewhere nothing happens).

    glibc keeps freed blocks below 32 MiB, in pieces that the next chunk's tensors do not always fit, so that peak
    memory grows with the number of chunks although no chunk needs more. The alternative, a fixed M_MMAP_THRESHOLD,
    saves another third but maps and clears every tensor anew, at four times the cost (tests/bench/README.md).
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library to be had by this way
        return None


def _compute_dtype(model: Any, device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype


def _as_everywhere(model: Any, engine: LogProbEngine, chunks: list[Rows], device: torch.device) -> tuple[int, int]:
    """Chunks of this batch and slices of each chunk's head, the same on all processes where that is needed."""
    if not engine.same_chunks_everywhere or not (dist.is_available() and dist.is_initialized()):
        return len(chunks), 1
    slices = max(count_slices(len(rows.target), device, model.get_output_embeddings()) for rows in chunks)
    most = torch.tensor([len(chunks), slices], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    count, slices = most.tolist()
    return count, slices


def _warn_of_gathered_weights(engine: LogProbEngine, count: int, chunks: list[Rows]) -> None:
    """Once: a chunk that is recomputed in the backward pass gathers sharded layers and leaves them gathered."""
    if count == 1 or engine.told or not (engine.same_chunks_everywhere and torch.is_grad_enabled()):
        return
    engine.told = True
    if dist.get_rank() == 0:
        logger.warning(
            "engine.chunk_tokens: this step's micro-batch runs in %d chunks of %d tokens, and with sharded weights "
            "(FSDP, ZeRO-3) every layer's whole weights then stay in memory during the backward pass. The gradients "
            "are right; only the memory that sharding saves is lost. A micro-batch in one chunk avoids it: lower "
            "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps), or raise "
            "engine.chunk_tokens to %d or more.",
            count,
            engine.chunk_tokens,
            max(count * engine.chunk_tokens, sum(rows.token.numel() for rows in chunks)),
        )


def _count_tokens(
    tokens: TokenCount, chunks: list[Rows], prompts: list[int], responses: list[int], owners: list[int]
) -> None:
    if not torch.is_grad_enabled():
        return
    tokens.responses += sum(responses)
    tokens.seen += sum(int((rows.piece >= 0).sum()) for rows in chunks)
    tokens.unshared += sum(responses) + sum(prompts[owner] for owner in owners)
