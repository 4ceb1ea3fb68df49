"""The engine: a causal LM and a `GroupBatch` in, `ResponseLogProbs` out, inside the model's own forward.

`install` replaces the forward of the innermost causal LM, so that whatever wraps it (PEFT, autocast,
DDP, FSDP2, DeepSpeed) sees a forward and a backward pass for every chunk of a batch, and everything that
is not a chunk (`generate`, evaluation, saving) goes to the model's own forward untouched.

Training takes a micro-batch in `turns`: a chunk's backward pass follows its forward pass, so that peak memory
is that of one chunk however many responses there are. A chunk holds whole groups, and the loss of a group needs no
other; so nothing is computed twice. Only a group larger than a chunk takes two passes: its log-probs without a graph
tell dL/dsum of each response, and then its chunks follow, each with that as the weight of its sums.
"""

from __future__ import annotations

import ctypes
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from rrhf_peft.logprobs.head import Head, count_slices, token_log_probs
from rrhf_peft.logprobs.layout import Rows, plan_chunks, shared_layout_obstacle, shared_mask
from rrhf_peft.records import ResponseLogProbs, UserError

#: The part of a GroupBatch that the engine reads; scores and sources stay outside.
ENGINE_KEYS = ("input_ids", "prompt_lengths", "response_lengths", "group")

#: (log-probs of whole groups, their responses int64 [m]) -> what they add to a micro-batch's loss.
LossOf = Callable[[ResponseLogProbs, torch.Tensor], torch.Tensor]

#: The least that `attention_tokens` gives.
_SHORTEST = 1024.0

#: What one chunk may take for activations under `chunk_tokens: auto`, in bytes.
_CHUNK_BYTES = 4 * 2**30


@dataclass
class LogProbEngine:
    """How the log-probs of one model are computed; `self_check.prove` may change the layout, nothing else does.

    Attributes:
        layout: shared (each prompt once) or plain (one row per response).
        chunk_tokens: padded tokens per chunk.
        attention_tokens: how long a row is whose attention takes as much time as all else (`layout.plan_chunks`).
        own_logits: take logits from the model's own forward instead of the chunked head: for models
            whose logits are not what `Head` knows.
        compute_dtype: the coarsest type the last forward computed in, autocast and sharding wrappers included.
        same_chunks_everywhere: every process runs as many chunks, and slices of the head, as the one that has
            most. Sharded parameters (FSDP, ZeRO-3) need it: each of them gathers weights from all processes.
        tokens: what the layouts saw and saved since the engine was installed.
    """

    layout: Literal["shared", "plain"]
    chunk_tokens: int
    attention_tokens: float = math.inf
    own_logits: bool = False
    compute_dtype: torch.dtype = torch.float32
    same_chunks_everywhere: bool = False
    tokens: TokenCount = field(default_factory=lambda: TokenCount())

    def log_probs(self, model: nn.Module, batch: Mapping[str, Any]) -> ResponseLogProbs:
        """Log-probs of every response of a batch, through whatever wraps the model.

        Without a graph peak memory is that of one chunk; a graph keeps all of them.

        Args:
            model: the model this engine is installed on, wrapped or not.
            batch: a `GroupBatch`, its `input_ids` on the model's device. The result lies where its lengths lie: on the
                host they are read without waiting for the device.
        """
        chunks = self._chunks(batch)
        count, slices = self._most_everywhere(model, batch, len(chunks), self._slices_of_head(model, batch, chunks))
        run = functools.partial(self._sums, model, batch, slices=slices, is_one_of_many=count > 1)
        sums = [run(rows) for rows in chunks]
        surplus = [run(chunks[-1]) for _ in range(count - len(chunks))]
        log_probs, _ = _gathered(batch, chunks, sums)
        for more in surplus:  # in the graph, so that every process also runs as many backwards
            log_probs = log_probs._replace(sum=log_probs.sum + 0.0 * more.sum().to(log_probs.sum.device))
        return log_probs

    def turns(
        self, model: nn.Module, batch: Mapping[str, Any], loss_of: LossOf, *, couples_groups: bool = False
    ) -> list[Callable[[], torch.Tensor]]:
        """The forward passes of a micro-batch: what each returns goes backward before the next is called.

        Together they leave the gradient of the loss. Every process has at least one turn, and the same number
        where `same_chunks_everywhere` is set. Those of a group that is larger than a chunk are preceded, here, by
        passes without a graph; a chunk none of whose responses has a gradient is then left out. Dropout masks are the
        same in both passes.

        Args:
            model: as for `log_probs`; collective where weights are sharded.
            batch: as for `log_probs`.
            loss_of: called once for every group, in one of the turns or here.
            couples_groups: a group's loss depends on other groups, so that all of them take two passes if they do not
                fit one chunk.
        """
        chunks = self._chunks(batch)
        _count_tokens(self.tokens, chunks, batch)
        split = [rows for rows in chunks if rows.is_part or (couples_groups and len(chunks) > 1)]
        whole = [rows for rows in chunks if not any(rows is part for part in split)]
        most_split, most, slices = self._most_everywhere(
            model, batch, len(split), len(whole), self._slices_of_head(model, batch, chunks)
        )
        several = most_split > 0 or most > 1
        run = functools.partial(self._sums, model, batch, slices=slices, is_one_of_many=several)

        def share(rows: Rows) -> torch.Tensor:
            sums = run(rows)
            return loss_of(*_gathered(batch, [rows], [sums])).to(sums.device)

        def weighted(rows: Rows, weights: torch.Tensor, state: list[torch.Tensor]) -> torch.Tensor:
            with _random_state_of(model, batch, state):
                sums = run(rows)
            return (sums * weights.to(sums.device)).sum()

        turns: list[Callable[[], torch.Tensor]] = [functools.partial(share, rows) for rows in whole]
        if most_split:
            passes, states = [], []
            with torch.no_grad():
                for rows in split + chunks[-1:] * (most_split - len(split)):
                    states.append(_random_state(model, batch))
                    passes.append(run(rows))
            for rows, weights, state in zip(split, _slopes(batch, split, passes, loss_of), states, strict=False):
                if bool(weights.any()):
                    turns.append(functools.partial(weighted, rows, weights, state))
            (most,) = self._most_everywhere(model, batch, len(turns))
        smallest = min(chunks, key=lambda rows: rows.token.numel())
        idle = functools.partial(weighted, smallest, torch.zeros(len(smallest.response)), [])
        return turns + [idle] * (max(1, most) - len(turns))

    def _chunks(self, batch: Mapping[str, Any]) -> list[Rows]:
        lengths = (batch[name].tolist() for name in ("prompt_lengths", "response_lengths", "group"))
        return plan_chunks(
            *lengths, layout=self.layout, chunk_tokens=self.chunk_tokens, attention_tokens=self.attention_tokens
        )

    def _sums(
        self, model: nn.Module, batch: Mapping[str, Any], rows: Rows, *, slices: int, is_one_of_many: bool
    ) -> torch.Tensor:
        """Sum of log-probs of a chunk's responses, float32 [m], through whatever wraps the model."""
        if is_one_of_many and batch["input_ids"].device.type == "cpu":
            _return_freed_memory()
        sums: torch.Tensor = model(input_ids=batch["input_ids"], rows=rows, slices=slices)
        # Sums of a hundred nats have steps of half a nat in bfloat16, larger than what objectives compare.
        assert sums.dtype == torch.float32, (
            f"what wraps the model casts the log-probs to {sums.dtype}. Give fully_shard a MixedPrecisionPolicy "
            "without output_dtype"
        )
        return sums

    def _slices_of_head(self, model: nn.Module, batch: Mapping[str, Any], chunks: list[Rows]) -> int:
        if not self.same_chunks_everywhere:
            return 1
        head = causal_lm_of(model).get_output_embeddings()  # type: ignore[operator]
        return max(count_slices(len(rows.target), batch["input_ids"].device, head) for rows in chunks)

    def _most_everywhere(self, model: nn.Module, batch: Mapping[str, Any], *counts: int) -> Sequence[int]:
        """Each number as it is on the process where it is largest, where processes must keep step."""
        if not self.same_chunks_everywhere or not (dist.is_available() and dist.is_initialized()):
            return counts
        most = torch.tensor(counts, device=batch["input_ids"].device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()


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
        attention_tokens=attention_tokens(inner.config.get_text_config()),
        same_chunks_everywhere=same_chunks_everywhere,
    )
    original = inner.forward

    # `generate`, sampling and `Trainer` read the signature; of a bound method it would lose its first parameter twice.
    @functools.wraps(getattr(original, "__func__", original))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "rows" not in kwargs:
            return original(*args, **kwargs)
        return _forward_rows(self, engine, original, **{name: kwargs[name] for name in ("input_ids", "rows", "slices")})

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


def attention_tokens(config: Any) -> float:
    """How long a row is whose attention takes as much time as the rest of its layer, from the model's shape.

    With a frozen base a layer's matrices take 4 operations per weight and token, forward and backward, and attention
    12 per token, column and hidden value. In small models neither takes most of the time, and short rows gain nothing.
    """
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    if not heads:
        return math.inf
    size = getattr(config, "head_dim", None) or hidden // heads
    key_values = (getattr(config, "num_key_value_heads", None) or heads) * size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    matrices = 2 * hidden * (heads * size + key_values) + 3 * hidden * intermediate
    return max(_SHORTEST, matrices / (3 * heads * size))


def _is_checkpointing(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _forward_rows(
    model: Any, engine: LogProbEngine, original: Any, input_ids: torch.Tensor, rows: Rows, slices: int
) -> torch.Tensor:
    """Sum of log-probs per response of one chunk, float32 [m]; the model's forward from here on."""
    is_padded = rows.num_padded > 0
    rows = rows.to(input_ids.device)
    arguments: dict[str, Any] = {"input_ids": input_ids[rows.token], "use_cache": False}
    dtype = _compute_dtype(model, input_ids.device)
    if engine.layout == "shared":
        config = model.config.get_text_config()
        arguments["position_ids"] = rows.position
        arguments["attention_mask"] = shared_mask(rows, config, dtype)
    elif is_padded:  # on the right
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


def _gathered(
    batch: Mapping[str, Any], chunks: Sequence[Rows], sums: Sequence[torch.Tensor]
) -> tuple[ResponseLogProbs, torch.Tensor]:
    """The log-probs of these chunks' responses in the order of the batch, their groups numbered from 0; and which."""
    host = batch["response_lengths"].device
    responses, order = torch.cat([rows.response for rows in chunks]).sort()
    ordered = torch.cat([values.to(host) for values in sums])[order.to(host)]
    responses = responses.to(host)
    lengths, groups = batch["response_lengths"][responses], batch["group"][responses]
    longest = torch.zeros_like(batch["prompt_lengths"]).scatter_reduce(0, groups, lengths, "amax")
    padded = (batch["prompt_lengths"] + longest)[groups]
    numbers = torch.cat([groups.new_zeros(1), groups.diff().clamp(max=1)]).cumsum(0)
    return ResponseLogProbs(ordered, lengths, padded, numbers), responses


def _slopes(
    batch: Mapping[str, Any], chunks: list[Rows], sums: list[torch.Tensor], loss_of: LossOf
) -> list[torch.Tensor]:
    """dL/dsum of every chunk's responses."""
    if not chunks:
        return []
    leaves = [values.detach().requires_grad_() for values in sums[: len(chunks)]]
    with torch.enable_grad():
        loss = loss_of(*_gathered(batch, chunks, leaves))
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [slope.cpu() for slope in slopes]


def _random_state(model: nn.Module, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Where the random streams stand that dropout draws from; nothing where nothing is drawn."""
    if not model.training:
        return []
    device = batch["input_ids"].device
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


@contextmanager
def _random_state_of(model: nn.Module, batch: Mapping[str, Any], state: list[torch.Tensor]) -> Iterator[None]:
    """Within it dropout draws what it drew after `state` was noted; the streams go on as before afterwards."""
    if not state:
        yield
        return
    before = _random_state(model, batch)
    _set_random_state(batch, state)
    try:
        yield
    finally:
        _set_random_state(batch, before)


def _set_random_state(batch: Mapping[str, Any], state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        device = batch["input_ids"].device
        torch.get_device_module(device).set_rng_state(state[1], device)


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


def _count_tokens(tokens: TokenCount, chunks: list[Rows], batch: Mapping[str, Any]) -> None:
    responses = int(batch["response_lengths"].sum())
    tokens.responses += responses
    tokens.seen += sum(rows.token.numel() - rows.num_padded for rows in chunks)
    tokens.unshared += responses + int(batch["prompt_lengths"][batch["group"]].sum())
