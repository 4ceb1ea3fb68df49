"""Align a language model with ranked responses (RRHF, arXiv 2304.05302) through LoRA and QLoRA adapters.

The names below are the door from Python. They load when they are asked for, so that `import rrhf_peft` and the
command's help need no torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rrhf_peft.data import read_groups
    from rrhf_peft.merge.run import merge_adapter
    from rrhf_peft.objectives import rrhf
    from rrhf_peft.records import RankedGroup, UserError
    from rrhf_peft.train.config import RRHFConfig
    from rrhf_peft.train.trainer import RRHFTrainer

_HOME = {
    "RRHFConfig": "rrhf_peft.train.config",
    "RRHFTrainer": "rrhf_peft.train.trainer",
    "RankedGroup": "rrhf_peft.records",
    "UserError": "rrhf_peft.records",
    "merge_adapter": "rrhf_peft.merge.run",
    "read_groups": "rrhf_peft.data",
    "rrhf": "rrhf_peft.objectives",
}

__all__ = ["RRHFConfig", "RRHFTrainer", "RankedGroup", "UserError", "merge_adapter", "read_groups", "rrhf"]


# bitsandbytes says on import that an optional CPU kernel is missing, which this package keeps switched
# off (`keep_quantized_layout`). The filter has to stand before anything imports bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "Failed to load CPU gemm_4bit_forward" not in record.getMessage()
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rrhf_peft' has no attribute {name!r}")
