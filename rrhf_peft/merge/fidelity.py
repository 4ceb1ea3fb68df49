"""Does the merged model compute what the adapter model computes? Logits of both on the same prompts.

Both compute in float32, so that what differs is their weights and not the order of roundings. They
are loaded one after the other: the memory is that of the larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rrhf_peft.modeling import (
    AdapterFiles,
    attach_adapter_files,
    compute_in_float32,
    dequantized_weight,
    load_base_model,
)

#: Held prompts for when the caller has none: plain, a question, a dialogue, a list, code, another language.
DEFAULT_PROMPTS = (
    "The old lighthouse keeper climbed the stairs one last time, because the storm had",
    "Question: Why does the moon look larger near the horizon?\nAnswer:",
    "\n\nHuman: I have two eggs, some flour and no milk. What can I bake?\n\nAssistant: With those you could",
    "Three things to check before a long journey:\n1. The tyres.\n2.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n",
    "Als der Zug endlich im Bahnhof hielt, war auf dem Bahnsteig niemand mehr",
)
_LONGEST_PROMPT = 128


@dataclass(frozen=True)
class Fidelity:
    """How far the merged model's logits lie from the adapter model's.

    Attributes:
        max_abs_difference: Largest difference of two logits, after taking out each position's mean
            (softmax ignores a constant).
        logit_scale: Largest logit of the adapter model, likewise, in absolute value.
        mean_kl: Mean over positions of KL(adapter model || merged model), in nats.
        top1_agreement: Share of positions where both have the same most likely token.
        positions: Token positions compared.
    """

    max_abs_difference: float
    logit_scale: float
    mean_kl: float
    top1_agreement: float
    positions: int

    @property
    def relative_difference(self) -> float:
        """Largest difference as a share of the logit scale: what a tolerance is stated in."""
        return self.max_abs_difference / max(self.logit_scale, 1e-30)


def held_prompts(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, prompts: Sequence[str]
) -> list[torch.Tensor]:
    """Token ids [1, T] of each prompt; fixed ids when the model comes without a tokenizer."""
    if tokenizer is not None:
        ids = [tokenizer(prompt, truncation=True, max_length=_LONGEST_PROMPT).input_ids for prompt in prompts]
        return [torch.tensor([prompt]) for prompt in ids if prompt]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (1, 32), generator=generator) for _ in range(len(DEFAULT_PROMPTS))]


def adapter_logits(
    files: AdapterFiles,
    base: Path,
    prompts: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype,
    quantization: str,
    double_quant: bool,
    trust_remote_code: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits [T, V] of the unmerged model for each prompt, float32: with the adapter, and without it.

    int8 layers multiply with the weights that they hold, unrounded: that they round their inputs too (LLM.int8) is no
    weight's doing, no merge can repeat it, and it may be as large as all that the adapter changes.
    """
    model = load_base_model(
        base,
        dtype=dtype,
        quantization=quantization,
        double_quant=double_quant,
        attention="eager",  # what every architecture has
        trust_remote_code=trust_remote_code,
        device="cpu",
    )
    _multiply_exactly(model)
    policy = attach_adapter_files(model, files)
    with_adapter = _logits(policy, prompts)
    with policy.disable_adapter():
        return with_adapter, _logits(policy, prompts)


def standalone_logits(folder: Path, prompts: Sequence[torch.Tensor], *, trust_remote_code: bool) -> list[torch.Tensor]:
    """Logits [T, V] of a merged model folder for each prompt, float32."""
    model = load_base_model(
        folder, dtype=torch.float32, attention="eager", trust_remote_code=trust_remote_code, device="cpu"
    )
    return _logits(model, prompts)


def _multiply_exactly(model: nn.Module) -> None:
    """Put linear layers with the multiplied-out weights in place of int8 ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear8bitLt):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(dequantized_weight(module), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)


@torch.no_grad()
def _logits(model: nn.Module, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    compute_in_float32(model.eval())
    return [model(input_ids=prompt, use_cache=False).logits[0].float() for prompt in prompts]


def compare(adapter: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> Fidelity:
    """Compare logits [T, V] prompt by prompt."""
    difference = scale = divergence = agreement = 0.0
    positions = 0
    for expected, found in zip(adapter, merged, strict=True):
        expected = (expected - expected.mean(-1, keepdim=True)).double()
        found = (found - found.mean(-1, keepdim=True)).double()
        difference = max(difference, _largest(found - expected))
        scale = max(scale, _largest(expected))
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        agreement += (expected.argmax(-1) == found.argmax(-1)).sum().item()
        positions += expected.shape[0]
    return Fidelity(difference, scale, divergence / positions, agreement / positions, positions)


def _largest(values: torch.Tensor) -> float:
    """Largest absolute value; not-a-number counts as infinite, so that it exceeds every tolerance."""
    largest = values.abs().max().item()
    return largest if largest == largest else float("inf")
