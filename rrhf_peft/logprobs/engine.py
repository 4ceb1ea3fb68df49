"""The engine: a causal LM and a `GroupBatch` in, `ResponseLogProbs` out, inside the model's own forward.

`install` replaces the forward of the innermost causal LM, so that whatever wraps it (PEFT, autocast,
DDP, FSDP2, DeepSpeed) sees one forward and one backward per batch, and everything that is not a
batch of groups (`generate`, evaluation, saving) goes to the model's own forward untouched.

The batch is laid out in chunks; with more than one, every chunk but the last is recomputed in the
backward pass, so peak memory is that of one chunk however many responses there are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from rrhf_peft.logprobs.head import Head, scores_only, token_log_probs
from rrhf_peft.logprobs.layout import Rows, plan_chunks
from rrhf_peft.logprobs.mask import shared_layout_obstacle, shared_mask
from rrhf_peft.records import ResponseLogProbs

#: The part of a GroupBatch that the model sees; scores and sources stay outside.
MODEL_KEYS = ("input_ids", "prompt_lengths", "response_lengths", "group")

#: What one chunk may take for activations under `chunk_tokens: auto`, in bytes.
_CHUNK_BYTES = 4 * 2**30


@dataclass
class LogProbEngine:
    """How the log-probs of one model are computed; `verify.prove` may change the layout, nothing else does.

    Attributes:
        layout: shared (each prompt once) or plain (one row per response).
        chunk_tokens: padded tokens per chunk.
        own_logits: take logits from the model's own forward instead of the chunked head: for models
            whose logits are not what `Head` knows.
        compute_dtype: type the last forward computed in, autocast included.
        same_chunks_everywhere: every process runs as many chunks as the one that has most. Sharded
            parameters (FSDP, ZeRO-3) need it: each chunk gathers weights from all processes.
        tokens: what the layouts saw and saved since the engine was installed.
    """

    layout: Literal["shared", "plain"]
    chunk_tokens: int
    own_logits: bool = False
    compute_dtype: torch.dtype = torch.float32
    same_chunks_everywhere: bool = False
    tokens: TokenCount = field(default_factory=lambda: TokenCount())

    def log_probs(self, model: nn.Module, batch: Mapping[str, Any]) -> ResponseLogProbs:
        """Log-probs of every response of a batch, through whatever wraps the model.

        Args:
            model: the model this engine is installed on, wrapped or not.
            batch: a `GroupBatch` on the model's device.
        """
        return model(**{name: batch[name] for name in MODEL_KEYS})


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
    """
    inner: Any = causal_lm_of(model)
    uninstall(model)
    obstacle = shared_layout_obstacle(inner.config.get_text_config())
    engine = LogProbEngine(
        layout="plain" if layout == "plain" or (layout == "auto" and obstacle) else "shared",
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

    padding = _missing_chunks(engine, len(chunks), input_ids.device)
    sums = [
        _chunk_sums(model, engine, original, input_ids, rows, recompute=number < len(chunks) + padding - 1)
        for number, rows in enumerate(chunks + [chunks[-1]] * padding)
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


def _chunk_sums(
    model: Any, engine: LogProbEngine, original: Any, input_ids: torch.Tensor, rows: Rows, recompute: bool
) -> torch.Tensor:
    """Sum of log-probs per response of one chunk, float32 [m]; recomputed in backward when asked."""
    rows = rows.to(input_ids.device)
    if not (recompute and torch.is_grad_enabled()):
        return _forward_rows(model, engine, original, input_ids, rows)
    sums: torch.Tensor = checkpoint(
        _forward_rows,
        model,
        engine,
        original,
        input_ids,
        rows,
        use_reentrant=False,
        context_fn=lambda: (scores_only(), nullcontext()),
    )
    return sums


def _forward_rows(
    model: Any, engine: LogProbEngine, original: Any, input_ids: torch.Tensor, rows: Rows
) -> torch.Tensor:
    arguments: dict[str, Any] = {"input_ids": input_ids[rows.token], "use_cache": False}
    engine.compute_dtype = _compute_dtype(model, input_ids.device)
    if engine.layout == "shared":
        config = model.config.get_text_config()
        arguments["position_ids"] = rows.position
        arguments["attention_mask"] = shared_mask(rows, config, engine.compute_dtype)
    elif bool((rows.piece < 0).any()):  # rows are padded on the right
        arguments["attention_mask"] = (rows.piece >= 0).long()
    targets = input_ids[rows.target]
    if engine.own_logits:
        logits = original(**arguments).logits.flatten(0, 1)[rows.predictor].float()
        values = torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    else:
        hidden = model.base_model(**arguments)[0].flatten(0, 1)[rows.predictor]
        values = token_log_probs(hidden, targets, Head.of(model))
    return torch.segment_reduce(values, "sum", lengths=rows.length, unsafe=True)


def _compute_dtype(model: Any, device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype


def _missing_chunks(engine: LogProbEngine, count: int, device: torch.device) -> int:
    if not engine.same_chunks_everywhere or not (dist.is_available() and dist.is_initialized()):
        return 0
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most) - count


def _count_tokens(
    tokens: TokenCount, chunks: list[Rows], prompts: list[int], responses: list[int], owners: list[int]
) -> None:
    if not torch.is_grad_enabled():
        return
    tokens.responses += sum(responses)
    tokens.seen += sum(int((rows.piece >= 0).sum()) for rows in chunks)
    tokens.unshared += sum(responses) + sum(prompts[owner] for owner in owners)
