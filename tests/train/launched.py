"""`python -m train.launched RECIPE ...` is `rrhf_peft.train`; each process also writes what its first step ran in.

Beside the recipe, `seen-0.json`, `seen-1.json`: what wraps the model, whether its weights are sharded, the type of the
summed log-probs, and how the engine was checked.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from rrhf_peft.cli import run_module
from rrhf_peft.train.trainer import RRHFTrainer


def wrapping(model):
    """Before the first forward pass: FSDP leaves the last layers' weights gathered after one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "wrapper": " ".join(base.__name__ for base in type(model).__mro__),
        "parameters": len(parameters),
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
    }


def step(trainer, log_probs, loss):
    return {
        "sums": str(log_probs.sum.dtype),
        "loss": str(loss.dtype),
        "compute": str(trainer.engine.compute_dtype),
        "layout": trainer.proof.layout,
        "difference": trainer.proof.difference,
        "rejected": trainer.proof.rejected,
        "same_chunks_everywhere": trainer.engine.same_chunks_everywhere,
    }


def main():
    folder, rank = Path(sys.argv[1]).parent, os.environ.get("RANK", "0")
    training_step, mean_loss = RRHFTrainer.training_step, RRHFTrainer._mean_loss
    path, before = folder / f"seen-{rank}.json", {}

    def spying_step(self, model, inputs, num_items_in_batch=None):
        if not before:
            before.update(wrapping(model))
        return training_step(self, model, inputs, num_items_in_batch)

    def spying_loss(self, log_probs, *arguments):
        loss = mean_loss(self, log_probs, *arguments)
        if before and not path.exists():
            path.write_text(json.dumps({**before, **step(self, log_probs, loss)}))
        return loss

    RRHFTrainer.training_step, RRHFTrainer._mean_loss = spying_step, spying_loss
    torch.set_num_threads(1)
    run_module("train")


if __name__ == "__main__":
    main()
