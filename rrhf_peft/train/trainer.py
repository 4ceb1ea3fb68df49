"""`RRHFTrainer`: transformers.Trainer whose batch is ranked groups and whose loss is an objective.

What differs from the base class: the collator, the loss, its weight in an optimizer step, and the
metrics. Everything else (loop, optimizers, distributed wrappers, checkpoints) is transformers'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from peft import PeftConfig, get_peft_model
from rich.console import Console
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import strtobool

from rrhf_peft.data import GroupCollator, TokenTable, source_names, tokenize_groups
from rrhf_peft.files import replace_text
from rrhf_peft.logprobs import Proof, install, prove
from rrhf_peft.modeling import check_gradients, load_base_model, load_tokenizer, prepare_for_training
from rrhf_peft.objectives import COUPLES_GROUPS, NEEDS_PAIRS, OBJECTIVES
from rrhf_peft.records import GroupBatch, Mean, Metrics, RankedGroup, ResponseLogProbs, TokenizedGroup, UserError
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.reference import (
    FILE,
    ReferenceCache,
    adapter_off_log_probs,
    evaluating,
    resolve_reference,
)
from rrhf_peft.train.run_folder import TOTALS, read_object

logger = logging.getLogger(__name__)

#: The most frequent sources, which are logged one by one; all others together.
MOST_SOURCES = 8


class RRHFTrainer(Trainer):
    """Train a causal LM, or an adapter on one, with ranked responses.

    Args:
        model: hub id or folder, or a loaded model (bare or already a PeftModel).
        args: `RRHFConfig`.
        train_dataset: ranked or tokenised groups, or a `datasets.Dataset` with the columns prompt,
            responses, scores and optionally sources.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; loaded from `model` when that is a name.
        peft_config: a `peft.LoraConfig` for a new adapter; None trains the model as it is given.
        callbacks, optimizers: as in transformers.

    Raises:
        UserError: no usable data, no trainable weights, a non-finite loss, gradients that vanish.
    """

    args: RRHFConfig
    online = False

    def __init__(
        self,
        model: str | nn.Module,
        args: RRHFConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if processing_class is None:
            name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
            processing_class = load_tokenizer(name)
        if isinstance(model, str):
            model = load_base_model(model)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        prepare_for_training(model, gradient_checkpointing=bool(args.gradient_checkpointing))
        self.objective: Callable[..., tuple[torch.Tensor, Metrics]] = OBJECTIVES[args.objective]
        self.objective_options = dict(args.objective_options)
        train = _tokenised(train_dataset, processing_class, args) if train_dataset is not None else None
        held_out = _tokenised(eval_dataset, processing_class, args) if eval_dataset is not None else None
        self.reference = resolve_reference(args.objective, args.reference, model, self.online)
        splits = {"train": train, "eval": held_out}
        self.reference_cache = ReferenceCache(
            {name: groups for name, groups in splits.items() if groups is not None and self.reference == "cached"}
        )
        self.source_names = source_names(train or (), held_out or ())
        self.engine = install(model, layout=args.layout, chunk_tokens=args.chunk_tokens)
        self.proof: Proof | None = None
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._loss_so_far = torch.zeros(())
        self._last_log = (time.perf_counter(), 0, 0)
        self._groups = 0
        self._resumed_from: Path | None = None
        self._began, self._seconds_before = time.monotonic(), 0.0
        self.write_card: Callable[[], None] | None = None  # set on the main process, where there is a run folder
        self.after_checkpoint: Callable[[], None] | None = None
        self.console: Console | None = None  # of the progress display, where there is one
        super().__init__(
            model=model,
            args=args,
            data_collator=GroupCollator(self.source_names),  # type: ignore[arg-type]
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing_class,
            callbacks=[
                GradientCheck(self._lost_anything, self._overflowed),
                AtBegin(self._restore_totals),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = True  # compute_loss weighs by groups in the step
        self.remove_callback(PrinterCallback)
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.engine.same_chunks_everywhere = sharded

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, and what accelerate does to FSDP that a ranking loss must not have done to it."""
        state = PartialState._shared_state
        if state.get("distributed_type") == DistributedType.MULTI_CPU and strtobool(
            os.environ.get("ACCELERATE_USE_FSDP", "false")
        ):
            # accelerate reads FSDP's settings only where it has found GPUs, and otherwise trains with DDP without a
            # word. torch shards on CPUs as well; this type is replaced by FSDP's before anything else reads it.
            state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # It would cast what leaves the model, the summed log-probs, to 8 bits: -73.307 would become -73.5.
            # Layers compute in `param_dtype` and so return it without being told to.
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    # ---- Loss ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Transformers' step for every chunk of a micro-batch, whose gradients add up; returns the loss of all.

        A loss is a mean over all groups of the optimizer step, however these are split. DDP and FSDP average gradients
        over processes, hence the factor num_processes.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        per_group = self.accelerator.num_processes / (num_items_in_batch or len(batch["index"]))
        losses: list[tuple[torch.Tensor, ResponseLogProbs, torch.Tensor]] = []
        with self.compute_loss_context_manager():
            if self.proof is None:
                self._prove_engine(model, batch)
            reference = self.reference_log_probs(model, batch)

            def loss_of(log_probs: ResponseLogProbs, responses: torch.Tensor) -> torch.Tensor:
                groups = batch["group"][responses].unique()
                part = {name: batch[name][responses] for name in ("scores", "source")}
                part["index"] = batch["index"][groups]
                loss = self._mean_loss(log_probs, part, _choose(reference, responses), "train")
                loss = loss * (_groups_in(part) * per_group)
                losses.append((loss.detach(), log_probs, part["index"]))
                return loss

            couples = self.args.objective in COUPLES_GROUPS
            turns = self.engine.turns(model, batch, loss_of, couples_groups=couples)
        for turn in turns:
            with contextlib.nullcontext() if turn is turns[-1] else self._more_chunks_to_come(model):
                super().training_step(model, {"turn": turn}, num_items_in_batch)
        return self._sum_of(losses).to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's mean over a batch's groups; or, in a training step, what one chunk adds to the loss."""
        if "turn" in inputs:
            return inputs["turn"]()
        if self.proof is None:
            self._prove_engine(model, inputs)
        reference = self.reference_log_probs(model, inputs)
        log_probs = self.engine.log_probs(model, inputs)
        loss = self._mean_loss(log_probs, inputs, reference, "train" if model.training else "eval")
        loss = self._sum_of([(loss, log_probs, inputs["index"])]).to(self.args.device)
        return (loss, log_probs) if return_outputs else loss

    def _mean_loss(
        self, log_probs: ResponseLogProbs, batch: Any, reference: ResponseLogProbs | None, split: str
    ) -> torch.Tensor:
        """The objective's mean over whole groups; their metrics go into the sums of the split."""
        loss, metrics = self.objective(log_probs, batch["scores"], reference=reference, **self.objective_options)
        metrics = {**metrics, **source_metrics(log_probs, batch["source"], self.source_names)}
        if _groups_in(batch) == 0:  # a stand-in, whose names every process still needs to add
            metrics = {name: Mean(0 * mean.weight, 0 * mean.weight) for name, mean in metrics.items()}
            loss = 0 * loss
        self._sums[split].add(metrics)
        return loss

    def _sum_of(self, losses: Sequence[tuple[torch.Tensor, ResponseLogProbs, torch.Tensor]]) -> torch.Tensor:
        """The sum of (loss, log-probs of its groups, their index); one that is not finite ends the run.

        Raises:
            UserError: with the groups whose log-probs are not finite.
        """
        for loss, log_probs, index in losses:
            if not torch.isfinite(loss):
                bad = index[log_probs.group[~torch.isfinite(log_probs.sum)]].unique().tolist()
                raise self._not_finite(loss.item(), bad)
        total = torch.stack([loss for loss, _, _ in losses]).sum()
        self._loss_so_far += total.detach().abs()
        return total

    @contextlib.contextmanager
    def _more_chunks_to_come(self, model: nn.Module) -> Iterator[None]:
        """Within it a backward pass adds to this process's gradients alone: the micro-batch's last one shares them.

        Sharded gradients (FSDP) are shared every time, because whole ones would fill the memory in between.
        """
        kind, state = self.accelerator.distributed_type, self.accelerator.gradient_state
        if kind == DistributedType.DEEPSPEED:  # takes the optimizer step itself, after a backward pass that says so
            is_last, _ = state.sync_gradients, state._set_sync_gradients(False)
            try:
                yield
            finally:
                state._set_sync_gradients(is_last)
        else:
            with contextlib.nullcontext() if kind == DistributedType.FSDP else self.accelerator.no_sync(model):
                yield

    def _prove_engine(self, model: nn.Module, inputs: Any) -> None:
        """On the first batch of the run: settle the layout that gives this model's own log-probs."""
        self.proof = prove(model, self.engine, inputs, fall_back=self.args.layout != "shared")
        if self.proof.rejected and self.is_world_process_zero():
            logger.warning(
                "engine: %s; this run uses the %s layout%s",
                "; ".join(self.proof.rejected),
                self.proof.layout,
                " with the model's own logits" if self.proof.own_logits else "",
            )

    def reference_log_probs(self, model: nn.Module, inputs: Any) -> ResponseLogProbs | None:
        """The reference policy's log-probs of a batch, or None for an objective without one; collective."""
        if self.reference is None:
            return None
        if self.reference == "adapter_off":
            return adapter_off_log_probs(self.engine, model, inputs)
        if not self.reference_cache.is_filled:
            self._fill_reference_cache(model)
        return self.reference_cache.look_up("train" if model.training else "eval", inputs)

    def _fill_reference_cache(self, model: nn.Module) -> None:
        """Once, before the first step: from the starting policy, or from the run folder when it is resumed."""
        path = Path(str(self.args.output_dir)) / FILE
        if self.state.global_step > 0:
            self.reference_cache.read(path)
            return

        def log_probs(batch: Any) -> ResponseLogProbs:
            with evaluating(model):
                return self.engine.log_probs(model, self._prepare_inputs(batch))

        collate = GroupCollator(self.source_names)
        self.reference_cache.compute(log_probs, collate, self.args.eval_batch_size, self.accelerator, self._say)
        if self.args.should_save:
            self.reference_cache.write(path)
        self.accelerator.wait_for_everyone()
        self._last_log = (time.perf_counter(), self.engine.tokens.seen, self._groups)  # no part of a step's rate

    def _say(self, line: str) -> None:
        """Tell the user, above the progress bar where there is one."""
        if self.is_world_process_zero():
            logger.info(line) if self.console is None else self.console.print(line, highlight=False)

    def _lost_anything(self) -> bool:
        """Whether any process has seen a loss other than 0, which has no gradient; collective."""
        return bool(self.accelerator.reduce(self._loss_so_far.to(self.args.device), reduction="sum") > 0)

    def _overflowed(self) -> bool:
        """Whether fp16's gradients overflowed and the scaler will skip the step, and try a smaller scale; collective.

        It begins with 65536, at which the first steps usually overflow. At a scale of 1 it is the gradients' fault.
        """
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() <= 1:
            return False
        overflows = torch.zeros((), device=self.args.device)
        for parameter in self.model.parameters():  # type: ignore[union-attr]
            if parameter.grad is not None:
                gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                overflows += (~torch.isfinite(gradient)).any()
        return bool(self.accelerator.reduce(overflows, reduction="sum") > 0)

    def _get_num_items_in_batch(self, batch_samples: list[GroupBatch], device: torch.device) -> int:
        """Groups in this optimizer step, over all micro-batches and processes."""
        groups = self._total(sum(map(_groups_in, batch_samples)))
        self._groups += groups
        return max(groups, 1)

    def _total(self, count: int) -> int:
        """A count summed over the processes; collective."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.args.device), reduction="sum"))

    def _get_dataloader(self, *args: Any, **rest: Any) -> Any:
        """Batches stay on the host, where their lengths and scores are read: see `_prepare_input`."""
        placing, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super()._get_dataloader(*args, **rest)
        finally:
            self.accelerator.device_placement = placing

    def _prepare_input(self, data: Any) -> Any:
        """Token ids go to the device and nothing else: whoever reads the rest there waits for it to come to rest.

        Nor does DeepSpeed cast scores to bf16, which would tie close ones.
        """
        if isinstance(data, dict) and "input_ids" in data:
            return {**data, "input_ids": data["input_ids"].to(self.args.device, non_blocking=True)}
        return data

    def _not_finite(self, loss: float, bad: list[int]) -> UserError:
        where = f"in group{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}" if bad else "in the objective"
        if self.state.global_step == 0 and bad:
            reason = (
                "Nothing has been trained yet, so the weights that training began with are damaged, or too large for "
                "their type: try model.dtype: float32, and look at those groups with `rrhf-peft inspect`."
            )
        else:
            reason = (
                "Training stopped before the weights took harm; lower training.learning_rate or set "
                "training.max_grad_norm, look at that group with `rrhf-peft inspect`, and resume from the last "
                "checkpoint."
            )
        return UserError(
            f"step {self.state.global_step + 1}: the loss is not finite ({loss}), {where} of the training data. "
            f"{reason}"
        )

    # ---- Evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of one held-out batch; its metrics go to the log."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    # ---- Log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last log: means over all groups and pairs, not over batches."""
        for split, prefix in (("train", ""), ("eval", "eval_")):
            if f"{prefix}loss" in logs:
                means = self._sums[split].pop(self.accelerator)
                logs |= {f"{prefix}{name}": value for name, value in means.items()}
        if "loss" in logs:
            logs |= self._rates()
        if "train_loss" in logs:
            logs |= self._whole_run()
        super().log(logs, start_time)

    def _rates(self) -> dict[str, float]:
        """Groups and tokens per second over all processes, what sharing prompts saved, the highest memory use.

        Tokens are those that went through the model, of which the shared layout has fewer; groups compare layouts.
        """
        then, tokens_then, groups_then = self._last_log
        now, tokens, groups = time.perf_counter(), self.engine.tokens, self._groups
        self._last_log = (now, tokens.seen, groups)
        counts = torch.tensor([tokens.seen - tokens_then, tokens.seen, tokens.unshared], device=self.args.device)
        new, seen, unshared = self.accelerator.reduce(counts, reduction="sum").tolist()
        return {
            "groups_per_second": (groups - groups_then) / (now - then),
            "tokens_per_second": new / (now - then),
            "tokens_saved": 1 - seen / unshared if unshared else 0.0,
            "peak_memory_gib": _peak_memory() / 2**30,
        }

    # ---- Sums that a resumed run goes on with ----

    def _totals(self) -> dict[str, Any]:
        """What the metrics of a resumed run need of the steps before it; collective."""
        tokens = self.engine.tokens
        counts = torch.tensor([tokens.responses, tokens.seen, tokens.unshared], device=self.args.device)
        responses, seen, unshared = self.accelerator.reduce(counts, reduction="sum").tolist()
        return {
            "logged_loss": self._total_loss_scalar,
            "unlogged_loss": self.accelerator.reduce(self._tr_loss, reduction="mean").item(),
            "last_logged_step": self._globalstep_last_logged,
            "tokens": {"responses": responses, "seen": seen, "unshared": unshared},
            "groups": self._groups,
            "seconds": self._seconds_before + time.monotonic() - self._began,
            "sums": self._sums["train"].read(self.accelerator),
        }

    def _restore_totals(self) -> None:
        """Go on with the sums of the checkpoint, so that the log reads as if nothing had happened."""
        self._began, self._seconds_before = time.monotonic(), 0.0
        self._groups = 0
        self._last_log = (time.perf_counter(), self.engine.tokens.seen, 0)
        path = None if self._resumed_from is None else self._resumed_from / TOTALS
        if path is None or not path.is_file():  # a new run, or a checkpoint of an older version
            return
        totals = read_object(path)
        self._total_loss_scalar = totals["logged_loss"]
        self._tr_loss = torch.tensor(totals["unlogged_loss"], device=self.args.device)
        self._globalstep_last_logged = totals["last_logged_step"]
        self._seconds_before = totals["seconds"]
        self._groups = totals["groups"]
        share = int(self.is_world_process_zero())  # they are sums over all processes
        for name, count in totals["tokens"].items():
            setattr(self.engine.tokens, name, count * share)
        self._sums["train"].restore(totals["sums"], share)
        self._last_log = (time.perf_counter(), self.engine.tokens.seen, totals["groups"])

    def _whole_run(self) -> dict[str, float]:
        """The closing numbers of all steps, those before a resumption too; transformers counts its last call alone."""
        unlogged = self.accelerator.reduce(self._tr_loss, reduction="mean").item()
        loss = self._total_loss_scalar - self._tr_loss.item() + unlogged
        seconds = self._seconds_before + time.monotonic() - self._began
        return {
            "train_loss": loss / max(self.state.global_step, 1),
            "train_runtime": seconds,
            "train_samples_per_second": self._groups / seconds,
            "train_steps_per_second": self.state.global_step / seconds,
        }

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As in transformers; remembers where the run goes on."""
        self._resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, *args: Any, **rest: Any) -> None:
        """One pass over the data; none after the run's last step, where transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **rest)

    # ---- Save ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as transformers does, then look: sharded training can write tensors without elements."""
        super()._save(output_dir, state_dict)
        folder = Path(str(output_dir or self.args.output_dir))
        for file in sorted(folder.glob("*.safetensors")) if self.args.should_save else ():
            with safe_open(file, framework="pt") as tensors:
                empty = [name for name in tensors.keys() if 0 in tensors.get_slice(name).get_shape()]  # noqa: SIM118
            if empty:
                raise UserError(
                    f"{file}: {len(empty)} tensors were saved without elements, {empty[0]} first. They are still "
                    "sharded; set fsdp_state_dict_type: FULL_STATE_DICT (FSDP) or zero3_save_16bit_model: true "
                    "(ZeRO-3) in the accelerate config."
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in transformers; then tells who waits for the first one."""
        super()._save_checkpoint(model, trial)
        if self.after_checkpoint is not None:
            self.after_checkpoint()

    def _save_rng_state(self, output_dir: str) -> None:
        """All processes' states are on disk before the trainer state that declares a checkpoint whole."""
        super()._save_rng_state(output_dir)
        totals = self._totals()
        if self.is_world_process_zero():
            replace_text(Path(output_dir) / TOTALS, json.dumps(totals) + "\n")
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """What `push_to_hub` calls before it uploads: this run's own card where there is one."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in transformers, with the card as it is after these steps."""
        if self.write_card is not None and self.is_world_process_zero():
            self.write_card()
        super()._push_from_checkpoint(checkpoint_folder)


# ---- What happens beside the loop ----


class GradientCheck(TrainerCallback):
    """Stops a run that would train nothing, at its first optimizer step that had a loss.

    Args:
        lost_anything: whether any process has seen a loss other than 0 yet; collective.
        overflowed: whether this step will be skipped because fp16's loss was scaled too far; collective.
    """

    def __init__(self, lost_anything: Callable[[], bool], overflowed: Callable[[], bool]) -> None:
        self._lost_anything, self._overflowed = lost_anything, overflowed
        self._checked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients once; DeepSpeed keeps them to itself."""
        if not self._checked and args.deepspeed is None and self._lost_anything() and not self._overflowed():
            check_gradients(kwargs["model"])
            self._checked = True


class AtBegin(TrainerCallback):
    """Calls a function when the model, the optimizer and the state of a run are there, before its first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call it."""
        self._function()


# ---- Metrics ----


class MetricSums:
    """Running totals of named means. All processes must add the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the means of some groups."""
        for name, mean in metrics.items():
            pair = torch.stack([mean.total.double(), mean.weight.double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over everything added on any process since the last call; collective."""
        sums = self.read(accelerator)
        self._sums = {}
        return {name: total / weight for name, (total, weight) in sums.items() if weight > 0}

    def read(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Name -> total and weight over all processes; collective."""
        if not self._sums:
            return {}
        stacked = accelerator.reduce(torch.stack(list(self._sums.values())).to(accelerator.device), reduction="sum")
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def restore(self, sums: dict[str, list[float]], share: int) -> None:
        """Go on from what `read` gave, of which this process takes the share 1 or 0."""
        self._sums = {name: share * torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}


def source_metrics(log_probs: ResponseLogProbs, source: torch.Tensor, names: Sequence[str]) -> Metrics:
    """Mean log-prob per token of each source's responses, as `logps/<source>`.

    Args:
        log_probs: per response, [N].
        source: int64 [N], index into `names`.
        names: all sources of the data set, the most frequent first; those beyond `MOST_SOURCES` are logged together, as
            `logps/other sources`.
    """
    p = log_probs.sum.detach() / log_probs.num_tokens
    total = p.new_zeros(len(names)).index_add(0, source, p)
    count = p.new_zeros(len(names)).index_add(0, source, torch.ones_like(p))
    means = {f"logps/{name}": Mean(total[i], count[i]) for i, name in enumerate(names[:MOST_SOURCES])}
    if len(names) > MOST_SOURCES:
        means["logps/other sources"] = Mean(total[MOST_SOURCES:].sum(), count[MOST_SOURCES:].sum())
    return means


def _choose(reference: ResponseLogProbs | None, responses: torch.Tensor) -> ResponseLogProbs | None:
    """The reference of some responses. Objectives take its sums and lengths; the groups are the policy's to number."""
    return None if reference is None else ResponseLogProbs(*(values[responses] for values in reference))


def _groups_in(batch: Any) -> int:
    """Groups that count: one with an index below 0 stands in where a micro-batch has none (`training.online`)."""
    return int((batch["index"] >= 0).sum())


def _tokenised(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: RRHFConfig) -> Sequence[TokenizedGroup]:
    if isinstance(dataset, TokenTable):
        return dataset
    groups = [item if isinstance(item, RankedGroup | TokenizedGroup) else _group_of(item) for item in dataset]
    if all(isinstance(group, TokenizedGroup) for group in groups):
        for group in groups:
            assert isinstance(group, TokenizedGroup)
            if not len(group.response_ids) == len(group.scores) == len(group.sources) > 0:
                raise UserError(
                    f"train_dataset: group {group.index} has {len(group.response_ids)} responses, "
                    f"{len(group.scores)} scores and {len(group.sources)} sources. Give one of each per response."
                )
        return groups  # type: ignore[return-value]
    tokenised, _ = tokenize_groups(
        groups,  # type: ignore[arg-type]
        tokenizer,
        template=args.template,
        max_prompt_tokens=args.max_prompt_tokens,
        max_tokens=args.max_tokens,
        overlong_prompt=args.overlong_prompt,
        needs_pairs=args.objective in NEEDS_PAIRS,
        min_score_gap=args.objective_options.get("min_score_gap", 0.0),
    )
    return tokenised


def _group_of(row: Any) -> RankedGroup:
    """A row of a `datasets.Dataset`; read files of other formats with `rrhf_peft.data.read_groups`."""
    missing = {"prompt", "responses", "scores"} - set(row)
    if missing:
        raise UserError(
            f"train_dataset: a row has no column {', '.join(sorted(missing))} (it has {', '.join(row)}). "
            "Give prompt, responses and scores, or read the data with rrhf_peft.data.read_groups."
        )
    sources = row.get("sources") or [f"response-{number}" for number in range(len(row["responses"]))]
    return RankedGroup(row["prompt"], list(row["responses"]), [float(s) for s in row["scores"]], list(sources))


def _peak_memory() -> int:
    """Most bytes held: by tensors on the GPU, or by the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where training without a GPU is not supported

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
