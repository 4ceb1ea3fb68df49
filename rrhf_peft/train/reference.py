"""Reference log-probs: of the model with its adapter off, or of the starting policy, computed once and kept.

The reference is always computed in evaluation mode and without a graph, by the same engine as the policy, so that a
new adapter's log-ratios are exactly 0.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rrhf_peft.logprobs import LogProbEngine
from rrhf_peft.objectives import NEEDS_REFERENCE, ONLINE_ONLY, TAKES_REFERENCE
from rrhf_peft.recipe import takes_from_base
from rrhf_peft.records import ResponseLogProbs, TokenizedGroup, UserError

#: In the run folder: per split `<split>.index` int64 [G], `<split>.num_tokens` int64 [N], `<split>.sum` float32 [N].
FILE = "reference_log_probs.safetensors"

#: Seconds between two lines about a long pass.
SECONDS_BETWEEN_LINES = 10.0


def adapter_off_log_probs(engine: LogProbEngine, model: nn.Module, batch: Mapping[str, Any]) -> ResponseLogProbs:
    """Log-probs of every response under the model with its adapter off: no gradient, no dropout.

    Under a launcher all processes must call it together. Modes and `requires_grad` are as before afterwards.

    Args:
        engine: installed on the model.
        model: the model as the training step calls it, wrapped or not, with a PEFT adapter.
        batch: a `GroupBatch` on the model's device.
    """
    adapted = _peft_model(model)
    assert adapted is not None, "there is no adapter to switch off"
    trainable = [(parameter, parameter.requires_grad) for parameter in adapted.parameters()]
    try:
        with evaluating(model), adapted.disable_adapter():
            return engine.log_probs(model, batch)
    finally:
        for parameter, requires_grad in trainable:  # PEFT makes all of an adapter trainable when it is on again
            parameter.requires_grad_(requires_grad)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No graph and no dropout; the mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def resolve_reference(
    objective: str,
    choice: Literal["none", "auto", "adapter_off", "cached"] | None,
    model: nn.Module,
    online: bool = False,
) -> Literal["adapter_off", "cached", "sampling"] | None:
    """Where the reference of a run comes from; None where its objective compares with none.

    Call it before training, while the model is the starting policy. `online` says whether training samples responses.

    Raises:
        UserError: the objective has no reference or needs one, the adapter cannot be switched off, or the objective
            needs online training.
    """
    if objective in ONLINE_ONLY:
        if not online:
            raise UserError(
                f"objective.name: {objective} learns from responses that the policy samples while it is trained. "
                "Train with a section online, or take another objective."
            )
        if choice is not None:
            raise UserError(
                f"objective.reference: {objective} compares with the policy that sampled the responses. Remove the key."
            )
        return "sampling"
    if choice is None:
        choice = "auto" if objective in NEEDS_REFERENCE else "none"
    if choice == "none":
        if objective in NEEDS_REFERENCE:
            raise UserError(f"objective.reference: {objective} compares with a reference. Use auto instead of none.")
        return None
    if objective not in TAKES_REFERENCE:
        raise UserError(f"objective.reference: {objective} compares with no reference policy. Remove the key.")
    adapted = _peft_model(model)
    if choice == "auto":
        return "adapter_off" if adapted is not None and _starts_as_base(adapted) else "cached"
    if choice == "adapter_off":
        obstacle = "there is no adapter" if adapted is None else _adapter_off_obstacle(adapted)
        if obstacle is not None:
            raise UserError(f"objective.reference: adapter_off is not possible, because {obstacle}. Use cached.")
    return choice


class ReferenceCache:
    """The starting policy's log-probs of every response of a run's data, float32 in host memory.

    Args:
        splits: name -> the tokenised groups that batches are made of.

    Raises:
        UserError: two groups of a split have one index, by which batches are looked up.
    """

    def __init__(self, splits: Mapping[str, Sequence[TokenizedGroup]]) -> None:
        self._splits = dict(splits)
        self._starts = {name: _starts(name, groups) for name, groups in splits.items()}
        self._lengths = {name: _description(groups)["num_tokens"] for name, groups in splits.items()}
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def is_filled(self) -> bool:
        """Whether `compute` or `read` was called."""
        return bool(self._sums)

    def look_up(self, split: str, batch: Mapping[str, Any]) -> ResponseLogProbs:
        """The reference of one batch, on its device.

        Raises:
            UserError: the batch holds a group that was not in the data when training began.
        """
        group, lengths = batch["group"], batch["response_lengths"]
        sizes = torch.bincount(group, minlength=len(batch["prompt_lengths"])).tolist()
        parts = []
        for index, counts in zip(batch["index"].tolist(), lengths.cpu().split(sizes), strict=True):
            start, stop = self._starts.get(split, {}).get(index, (0, 0))
            if start == stop or not torch.equal(self._lengths[split][start:stop], counts):
                raise UserError(
                    f"group {index} of the {split} data has no cached reference log-probs. Give all data to the "
                    "trainer when it is made, or use objective.reference: adapter_off."
                )
            parts.append(self._sums[split][start:stop])
        longest = torch.zeros_like(batch["prompt_lengths"]).scatter_reduce(0, group, lengths, "amax")
        padded = (batch["prompt_lengths"] + longest)[group]
        return ResponseLogProbs(torch.cat(parts).to(group.device), lengths, padded, group)

    def compute(
        self,
        log_probs: Callable[[Any], ResponseLogProbs],
        collate: Callable[[list[TokenizedGroup]], Any],
        batch_size: int,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        """One pass over all splits, shared among the processes; all of them must call it.

        Args:
            log_probs: collated batch -> the starting policy's log-probs.
            collate: groups -> batch.
            batch_size: groups in a batch.
            accelerator: joins the processes.
            say: gets a line now and then.
        """
        last_line = time.monotonic()
        for name, groups in self._splits.items():
            sums = torch.zeros(sum(len(group.response_ids) for group in groups))
            batches = [groups[start : start + batch_size] for start in range(0, len(groups), batch_size)]
            count = accelerator.num_processes
            for turn in range(math.ceil(len(batches) / count)):
                # Every process makes as many forward passes: a wrapper's may wait for the others.
                batch = batches[min(turn * count + accelerator.process_index, len(batches) - 1)]
                values = log_probs(collate(list(batch))).sum.float().cpu()
                if turn * count + accelerator.process_index < len(batches):
                    start = self._starts[name][batch[0].index][0]
                    sums[start : start + len(values)] = values
                if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    say(f"reference log-probs ({name}): {min((turn + 1) * count, len(batches))}/{len(batches)} batches")
            self._sums[name] = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()

    def write(self, path: Path) -> None:
        """Put the cache beside the run, whole or not at all.

        Raises:
            UserError: the folder cannot be written to.
        """
        tensors = {f"{name}.sum": sums for name, sums in self._sums.items()}
        for name, groups in self._splits.items():
            tensors |= {f"{name}.{key}": values for key, values in _description(groups).items()}
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}). Choose a writable place.") from None

    def read(self, path: Path) -> None:
        """Take the cache that this run wrote when it began.

        Raises:
            UserError: it is not there, cannot be read, or is of other data.
        """
        remedy = (
            "A resumed run's policy is no longer the one it started from, so it cannot be computed again: put the "
            "file back, or start the run anew."
        )
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path}: the reference log-probs of this run are missing. {remedy}") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: the reference log-probs cannot be read ({error}). {remedy}") from None
        for name, groups in self._splits.items():
            for key, values in _description(groups).items():
                if f"{name}.{key}" not in tensors or not torch.equal(tensors[f"{name}.{key}"], values):
                    raise UserError(f"{path}: these are the reference log-probs of other {name} data. {remedy}")
        self._sums = {name: tensors[f"{name}.sum"] for name in self._splits}


def _starts(split: str, groups: Sequence[TokenizedGroup]) -> dict[int, tuple[int, int]]:
    """Group index -> where its responses start and stop among all of the split."""
    starts, offset = {}, 0
    for group in groups:
        if group.index in starts:
            raise UserError(
                f"two groups of the {split} data have the index {group.index}, so their cached reference log-probs "
                "could not be told apart. Give every TokenizedGroup an index of its own."
            )
        starts[group.index] = (offset, offset + len(group.response_ids))
        offset += len(group.response_ids)
    return starts


def _description(groups: Sequence[TokenizedGroup]) -> dict[str, torch.Tensor]:
    return {
        "index": torch.tensor([group.index for group in groups], dtype=torch.int64),
        "num_tokens": torch.tensor([len(ids) for group in groups for ids in group.response_ids], dtype=torch.int64),
    }


def _peft_model(model: nn.Module) -> PeftModel | None:
    """The PEFT model inside a distributed wrapper, if there is one."""
    while not isinstance(model, PeftModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model if isinstance(model, PeftModel) else None


def _adapter_off_obstacle(model: PeftModel) -> str | None:
    """Why the model with its adapter off is not a fixed reference, or None."""
    for name in model.active_adapters:
        init = getattr(model.peft_config[name], "init_lora_weights", None)
        if takes_from_base(init):
            return f"init_lora_weights {init} moves a part of the base into the adapter"
    parts = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in parts):
            return f"'{name}', a weight of the base, is trained too"
    return None


def _starts_as_base(model: PeftModel) -> bool:
    """Whether the adapter changes nothing yet, so that switching it off gives back the starting policy for good."""
    if _adapter_off_obstacle(model) is not None:
        return False
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")]
    idle = all(_is_idle(layer, name) for layer in layers for name in model.active_adapters)
    return bool(layers) and idle and all(_is_copy(module) for module in model.modules())


def _is_idle(layer: Any, name: str) -> bool:
    """Whether B A = 0, as in a new LoRA layer, and no bias is added."""
    factors = [(layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)]
    for a, b in ((a[name], b[name]) for a, b in factors if name in a):
        bias = getattr(b, "bias", None)
        if not (_is_zero(a) or _is_zero(b)) or (bias is not None and not _is_zero(bias)):
            return False
    return True


def _is_zero(weight: Any) -> bool:
    values = weight if isinstance(weight, torch.Tensor) else weight.weight
    return values.is_meta or not bool(values.detach().any())


def _is_copy(module: Any) -> bool:
    """Whether a module of `modules_to_save` still is what it stands in for; true of all other modules."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return True
    original = dict(module.original_module.named_parameters())
    return all(
        values.is_meta or torch.equal(values, original[name].to(values))
        for copy in copies.values()
        for name, values in copy.named_parameters()
    )
