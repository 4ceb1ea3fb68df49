"""What a forward and backward pass needs on top of the weights: the pass is run on shapes without data.

Every tensor that would be allocated is counted while it lives, gradient checkpointing included, so
the number holds for any architecture. What is not run but taken as known: attention, as a kernel that
keeps its inputs, its output and one number per row (flash and memory-efficient attention do), and the
head, which `logprobs.head` computes in slices.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from rrhf_peft.logprobs.engine import causal_lm_of
from rrhf_peft.logprobs.layout import Rows, shared_mask

#: The stand-in's name among transformers' attention implementations.
_ATTENTION = "rrhf_peft_attention_without_data"


@dataclass(frozen=True)
class PassBytes:
    """Bytes of one forward and backward pass beside weights and their gradients.

    Attributes:
        kept: what the forward pass leaves for the backward pass.
        peak: the most at any moment of both.
    """

    kept: int
    peak: int


def pass_bytes(model: Any, *, rows: int, width: int, shared: bool, casts: bool = False) -> PassBytes:
    """Run one pass of `model`'s layers on shapes.

    Args:
        model: causal LM or PeftModel on the meta device, in the type that it computes in, prepared for
            training.
        rows: rows of the chunk.
        width: tokens per row.
        shared: with the shared layout's mask rather than plain causal rows.
        casts: an adapter in float32 on 16-bit layers; quantised layers leave their inputs alone.
    """
    language_model: Any = causal_lm_of(model)
    own_attention = language_model.config._attn_implementation
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.empty_like(weight)  # counted elsewhere: here they are accumulated into
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    first_layers = [layer for name, layer in model.named_modules() if casts and ".lora_A." in name]
    hooks = [layer.register_forward_pre_hook(_through_float32) for layer in first_layers]
    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    with _LiveBytes([*model.parameters(), *model.buffers(), *gradients, ids]) as live:
        mask = _mask(ids, language_model) if shared else None
        if own_attention != "eager":
            AttentionInterface.register(_ATTENTION, _attention)
            language_model.set_attn_implementation(_ATTENTION)
        hidden = language_model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)[0]
        kept = live.now
        hidden.backward(torch.empty_like(hidden))
    for hook in hooks:
        hook.remove()
    language_model.set_attn_implementation(own_attention)
    model.zero_grad(set_to_none=True)
    return PassBytes(kept, live.peak)


def _mask(ids: torch.Tensor, model: Any) -> Any:
    """The engine's own mask for rows of this shape; flex_attention's is made of blocks and takes next to nothing."""
    config = model.config.get_text_config()
    if config._attn_implementation == "flex_attention":
        return None
    nothing = ids.new_empty(0)
    return shared_mask(Rows(ids, ids, ids, ids, nothing, nothing, nothing, nothing), config, model.dtype)


def head_bytes(tokens: int, vocabulary: int, hidden: int, *, size: int, on_cpu: bool, trained: bool) -> int:
    """Bytes that `logprobs.head` needs for a chunk: one slice of float32 logits and its copies.

    Args:
        tokens: predicting positions.
        vocabulary: V.
        hidden: H.
        size: bytes of a hidden value.
        on_cpu: slices are smaller there.
        trained: the head is trained, so a slice's softmax and its gradient both exist.
    """
    slice_elements = min(tokens * vocabulary, max(2**24 if on_cpu else 2**27, vocabulary))
    return 4 * slice_elements * (3 if trained else 2) + 2 * tokens * hidden * size


def _through_float32(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """PEFT casts a LoRA layer's input to the adapter's float32, and autocast casts it back: a copy each."""
    return tuple(value.float().to(value.dtype) for value in inputs)


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors made inside that are still referenced; `known` ones do not count."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


class _Attention(torch.autograd.Function):
    """Shapes of a fused attention kernel: it keeps q, k, v, mask, output and a normaliser per row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        if mask is not None:
            mask = mask.to(query.dtype)  # the kernels add it: of a boolean mask every layer makes its own copy
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Any, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    groups = getattr(module, "num_key_value_groups", 1)
    if attention_mask is not None:  # transformers' sdpa repeats the heads when there is a mask
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _Attention.apply(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
