"""How many bytes an optimizer keeps per trained tensor, by the name that `training.optim` gives it.

Only optimizers whose arithmetic has been compared with the real ones stand here; others are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Values that share a scale in bitsandbytes' 8-bit states, and the tensor size below which they stay 32-bit.
BLOCK, SMALLEST_8BIT = 256, 4096


@dataclass(frozen=True)
class _Kind:
    """moments: tensors of the parameter's size. bits: 8, 32, or None for the parameter's own type."""

    moments: int
    bits: int | None = None
    paged: bool = False


OPTIMIZERS = {
    "adamw_torch": _Kind(2),
    "adamw_torch_fused": _Kind(2),
    "sgd": _Kind(0),
    "adagrad": _Kind(1),
    "rmsprop": _Kind(1),
    "adamw_bnb_8bit": _Kind(2, 8),
    "adamw_8bit": _Kind(2, 8),
    "lion_8bit": _Kind(1, 8),
    "lion_32bit": _Kind(1, 32),
    "ademamix": _Kind(3, 32),
    "ademamix_8bit": _Kind(3, 8),
    "rmsprop_bnb": _Kind(1, 32),
    "rmsprop_bnb_32bit": _Kind(1, 32),
    "rmsprop_bnb_8bit": _Kind(1, 8),
    "paged_adamw_32bit": _Kind(2, 32, paged=True),
    "paged_adamw_8bit": _Kind(2, 8, paged=True),
    "paged_lion_32bit": _Kind(1, 32, paged=True),
    "paged_lion_8bit": _Kind(1, 8, paged=True),
    "paged_ademamix_32bit": _Kind(3, 32, paged=True),
    "paged_ademamix_8bit": _Kind(3, 8, paged=True),
}


def optimizer_bytes(name: str, trainable: Sequence[tuple[int, int, tuple[int, ...]]]) -> int | None:
    """Bytes of the optimizer's state after its first step, or None for an optimizer that is not known here.

    Args:
        name: as in `training.optim`.
        trainable: (values, bytes each, shape) of every trained tensor.
    """
    if name == "adafactor":
        return sum(_adafactor(shape) for _, _, shape in trainable)
    kind = OPTIMIZERS.get(name)
    if kind is None:
        return None
    return sum(kind.moments * _moment(kind.bits, values, size) for values, size, _ in trainable)


def is_paged(name: str) -> bool:
    """Whether the state lives in host memory and visits the GPU page by page."""
    return name in OPTIMIZERS and OPTIMIZERS[name].paged


def step_bytes(name: str, trainable: Sequence[tuple[int, int, tuple[int, ...]]]) -> int:
    """Temporary bytes of the update itself: torch's unfused AdamW works on all tensors at once."""
    return sum(values * size for values, size, _ in trainable) if name == "adamw_torch" else 0


def _moment(bits: int | None, values: int, size: int) -> int:
    if bits is None:
        return values * size
    if bits == 32 or values < SMALLEST_8BIT:
        return 4 * values
    return values + 4 * math.ceil(values / BLOCK)


def _adafactor(shape: tuple[int, ...]) -> int:
    """A row and a column of squares for a matrix, all of them for a vector; and one running size."""
    if len(shape) < 2:
        return 4 * math.prod(shape) + 4
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]) + 4
