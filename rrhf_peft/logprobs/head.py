"""Hidden states to token log-probs, without the [n, V] logits ever existing.

Logits are formed for a slice of tokens at a time, in float32, and reduced at once to the target's
log-prob. Three ways, by what the head is:

    frozen plain linear    the gradient with respect to the hidden state, (onehot - softmax) W, is formed
                           in the forward pass and scaled by row in the backward pass
    trained plain linear   each slice is recomputed in the backward pass
    anything else          the same, through the head module itself (LoRA on the head, quantised or
                           sharded weights)

Shape legend: n response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

#: Elements of one slice's float32 logits: 64 MiB on the host, where smaller is faster, 512 MiB on a GPU.
_SLICE_ELEMENTS = {"cpu": 2**24}
_SLICE_ELEMENTS_GPU = 2**27


@dataclass(frozen=True)
class Head:
    """A language-model head and what the model's own forward does to its logits.

    Attributes:
        module: the output embedding.
        scale: logits are multiplied by it (Cohere's logit_scale, one over Granite's logits_scaling).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2 and later), after scaling.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal LM. What it does not know, the engine's self-check finds."""
        config = model.config.get_text_config()
        scale = 1.0
        if (multiplier := getattr(config, "logit_scale", None)) is not None:
            scale = float(multiplier)
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            scale = 1.0 / float(divisor)
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    def shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 logits as the model's own forward returns them."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_log_probs(hidden: torch.Tensor, targets: torch.Tensor, head: Head, at_least: int = 1) -> torch.Tensor:
    """log P(target) for every hidden state.

    Args:
        hidden: [n, H], any float type.
        targets: int64 [n].
        head: the head.
        at_least: how often to call a head whose weights are sharded, where other processes have more tokens: every
            call gathers the weights from all of them, in the forward and in the backward pass.

    Returns:
        float32 [n].
    """
    plain = _plain_weight(head.module)
    with torch.autocast(hidden.device.type, enabled=False):
        if plain is not None and not plain[0].requires_grad and (plain[1] is None or not plain[1].requires_grad):
            weight, bias = plain
            return _FrozenHead.apply(hidden, weight, bias, targets, head)
        parts = list(_slices(hidden, targets, _vocabulary(head.module)))
        surplus = 0 if plain is not None else max(0, at_least - len(parts))
        values = []
        for part, wanted in parts + [(hidden[:1], targets[:1])] * surplus:
            if torch.is_grad_enabled():
                values.append(checkpoint(_slice_log_probs, part, wanted, head, use_reentrant=False))
            else:
                values.append(_slice_log_probs(part, wanted, head))
        got = torch.cat(values[: len(parts)])
        for extra in values[len(parts) :]:  # in the graph, for the backward pass to go through them as well
            got = got + 0.0 * extra
        return got


def count_slices(tokens: int, device: torch.device, module: nn.Module) -> int:
    """In how many slices this many tokens pass the head."""
    return -(-tokens // _slice_size(device, _vocabulary(module)))


def _slice_log_probs(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    plain = _plain_weight(head.module)
    logits = _product(hidden, *plain) if plain is not None else head.module(_as_head(hidden, head.module)).float()
    logits = head.shaped(logits)
    return -F.cross_entropy(logits, targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Value and gradient in one pass: d log P / d h = (onehot - softmax) W, scaled by row in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
    ) -> torch.Tensor:
        values = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_fp32 = weight.float() if hidden.device.type == "cpu" else weight
        start = 0
        for part, wanted in _slices(hidden, targets, len(weight)):
            stop = start + len(part)
            logits = head.shaped(_product(part, weight_fp32, bias))
            if gradient is not None and head.softcap is not None:  # d softcap(z) / dz, from the capped value
                slope = 1 - (logits / head.softcap) ** 2
            logits -= logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
            exponentials = logits.exp_()  # the only pass of exp, which takes longer than its memory
            total = exponentials.sum(dim=-1)
            values[start:stop] = chosen - total.log()
            if gradient is not None:
                residual = exponentials.div_(-total.unsqueeze(-1))
                residual.scatter_add_(-1, wanted.unsqueeze(-1), torch.ones_like(residual[:, :1]))
                if head.softcap is not None:
                    residual.mul_(slope)
                if head.scale != 1.0:
                    residual.mul_(head.scale)
                gradient[start:stop] = residual.to(weight_fp32.dtype) @ weight_fp32
            start = stop
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (outputs[0].unsqueeze(-1) * gradient).to(gradient.dtype), None, None, None, None


class _Float32Product(torch.autograd.Function):
    """h W^T with 16-bit operands, accumulated and returned in float32 (CUDA)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        residual = outputs[0].to(hidden.dtype)
        return (
            residual @ weight if ctx.needs_input_grad[0] else None,
            residual.t() @ hidden if ctx.needs_input_grad[1] else None,
        )


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits [n, V] in float32: bf16 logits shift a 60-token score by about 2e-3, enough to flip near ties."""
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        logits = _Float32Product.apply(hidden.to(weight.dtype), weight)
    else:
        logits = F.linear(hidden.float(), weight.float())
    return logits if bias is None else logits + bias.float()


def _plain_weight(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight [V, H] and bias of an ordinary linear layer whose whole weight is here, else None.

    A gathered FSDP weight is a plain tensor within the root's forward; a sharded one is a DTensor,
    and a ZeRO-3 one is empty: both need the module's own call to gather them.
    """
    if type(module) is not nn.Linear:
        return None
    weight = module.weight
    whole = weight.shape == (module.out_features, module.in_features) and not hasattr(weight, "ds_id")
    return (weight, module.bias) if whole and type(weight) in (torch.Tensor, nn.Parameter) else None


def _as_head(hidden: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The hidden state in the type the head computes in; without autocast a mismatch would be an error."""
    floating = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return hidden.to(next(floating, hidden.dtype))


def _vocabulary(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 0) or module.weight.shape[0])  # type: ignore[index]


def _slices(
    hidden: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = _slice_size(hidden.device, vocabulary)
    return zip(hidden.split(size), targets.split(size), strict=True)


def _slice_size(device: torch.device, vocabulary: int) -> int:
    return max(1, _SLICE_ELEMENTS.get(device.type, _SLICE_ELEMENTS_GPU) // vocabulary)
