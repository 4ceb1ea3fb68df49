"""Merge an adapter into its base model: standalone weights, streamed shard by shard, proved before they appear.

    base files --BaseWeights--> tensor --AdapterEdits--> merged tensor --shards--> staged folder
    staged folder --fidelity--> report --rename--> output

The output has the base checkpoint's own tensor names and order, so that it loads wherever the base
does. It appears whole or not at all.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rrhf_peft.files import staged_folder
from rrhf_peft.merge.companions import copy_companions, write_config
from rrhf_peft.merge.fidelity import (
    DEFAULT_PROMPTS,
    Fidelity,
    adapter_logits,
    compare,
    held_prompts,
    standalone_logits,
)
from rrhf_peft.merge.merged_weights import DTYPES, MergedWeights, dtype_name
from rrhf_peft.merge.model_card import model_card
from rrhf_peft.merge.progress import OnProgress
from rrhf_peft.merge.report import MergeReport
from rrhf_peft.merge.shards import parse_size, plan_shards
from rrhf_peft.merge.training_base import TrainingBase, find_training_base, run_folders
from rrhf_peft.modeling import AdapterFiles, load_tokenizer, read_adapter
from rrhf_peft.records import UserError

#: Largest difference of logits that rounding explains, as a share of the largest logit, by what was written.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: int8 layers round their inputs too (LLM.int8), which no merged weight can repeat.
INT8_TOLERANCE = 0.1


def merge_adapter(
    adapter: Path | str,
    output: Path | str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    shard_size: str | int = "5GB",
    overwrite: bool = False,
    base_model: str | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
    verify: bool = True,
    verify_prompts: Sequence[str] | None = None,
    tolerance: float | None = None,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Write the base model with the adapter merged in, as a folder that needs no PEFT and no bitsandbytes.

    The host memory is about one shard and three of the largest tensors in float32; verification after
    that holds one whole model in float32 at a time. No GPU is used.

    Args:
        adapter: A run folder, a `checkpoint-N` in it, or any PEFT LoRA folder.
        output: The folder to make.
        base: `dequantized` adds the adapter to the weights as training quantised them: what was
            trained. `original` adds it to the unquantised ones. By default the former where training
            was quantised; without quantisation both are the same.
        dtype: auto keeps each tensor's type on disk; or float32, bfloat16, float16.
        shard_size: Largest weight file.
        overwrite: Replace an existing output, at the very end.
        base_model: Folder or hub id of the base, when it is not where the adapter says.
        quantization: How training held the base, where no recipe.yaml says so.
        double_quant: Likewise.
        verify: Compare logits before the output appears. False saves the memory of a whole model.
        verify_prompts: Prompts to compare on, instead of a few built-in ones.
        tolerance: Largest allowed difference of logits as a share of the largest logit.
        on_progress: Called with stage, bytes done and bytes in all.

    Raises:
        UserError: anything missing, damaged or contradictory; an adapter that changes nothing; or a
            merged model that computes something else. There is no output then.
    """
    started = time.monotonic()
    adapter, output = Path(adapter), Path(output)
    if base not in (None, "dequantized", "original"):
        raise UserError(f"--base: {base!r} is not one of dequantized, original.")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}.")
    limit = parse_size(shard_size)
    files = read_adapter(adapter)
    trained = find_training_base(files, base_model=base_model, quantization=quantization, double_quant=double_quant)
    original = base == "original" or trained.quantization == "none"
    reads = (files.folder, trained.folder)
    with staged_folder(output, verb="merge", reads=reads, overwrite=overwrite) as folder, warnings.catch_warnings():
        # PEFT warns of what merging may go wrong with: here it is handled, or refused, or shows in the comparison.
        warnings.filterwarnings("ignore", module=r"peft\.")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        merge = MergedWeights(files, trained, as_trained=not original or trained.quantization == "none", dtype=dtype)
        write_config(trained.folder, folder, dtype=merge.main_dtype, untie=merge.untied)
        has_tokenizer = copy_companions(run_folders(files.folder), trained.folder, folder)
        tokenizer = _fitting_tokenizer(folder, files, trained, merge.vocab_size) if has_tokenizer else None
        shards = plan_shards(merge.plan, limit)
        merge.write(folder, shards, on_progress)
        allowed = tolerance if tolerance is not None else _tolerance(merge.main_dtype, trained, original)
        proof = _Proof(None, None, None)
        if verify:
            prompts = held_prompts(tokenizer, merge.vocab_size, verify_prompts or DEFAULT_PROMPTS)
            proof = _verify(folder, files, trained, original, prompts, on_progress)
            _refuse_unfaithful(proof, allowed, files.folder)
        report = MergeReport(
            adapter=str(adapter),
            base_model=trained.name,
            output=str(output),
            base="original" if original else "dequantized",
            training_quantization=trained.quantization,
            training_dtype=dtype_name(trained.dtype),
            dtype=dtype_name(merge.main_dtype),
            files=len(shards),
            total_bytes=sum(tensor.size for tensor in merge.plan),
            tensors=len(merge.plan),
            changed_tensors=merge.changed,
            delta_norm=merge.delta_norm,
            untied_embeddings=merge.untied,
            fidelity=proof.fidelity,
            tolerance=allowed if verify else None,
            without_adapter=proof.without_adapter,
            against_training=proof.against_training,
            seconds=time.monotonic() - started,
        )
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        (folder / "merge_report.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    return report


def _fitting_tokenizer(
    folder: Path, files: AdapterFiles, trained: TrainingBase, vocab_size: int
) -> PreTrainedTokenizerBase:
    """The output's tokenizer, which must not know tokens that the model has no embedding for."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trained.trust_remote_code)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{files.folder}: its tokenizer knows token ids up to {highest}, and {trained.name} has {vocab_size} "
            "embeddings: the vocabulary was resized. Save the base with the vocabulary resized and pass that folder as "
            "--base-model."
        )
    return tokenizer


class _Proof(NamedTuple):
    """What was compared; see `MergeReport`."""

    fidelity: Fidelity | None
    without_adapter: Fidelity | None
    against_training: Fidelity | None


def _verify(
    folder: Path,
    files: AdapterFiles,
    trained: TrainingBase,
    original: bool,
    prompts: list[torch.Tensor],
    on_progress: OnProgress | None,
) -> _Proof:
    """The merged model against the adapter on the same base, and against training where that differs."""

    def logits(dtype: torch.dtype, quantization: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return adapter_logits(
            files,
            trained.folder,
            prompts,
            dtype=dtype,
            quantization=quantization,
            double_quant=trained.double_quant,
            trust_remote_code=trained.trust_remote_code,
        )

    show = on_progress or (lambda stage, done, total: None)
    show("verifying: merged model", 0, 0)
    merged = standalone_logits(folder, prompts, trust_remote_code=trained.trust_remote_code)
    show("verifying: adapter model", 0, 0)
    with_adapter, without = logits(trained.dtype, trained.quantization)
    against_training = None
    if original and trained.quantization != "none":
        against_training = compare(with_adapter, merged)
        with_adapter, without = logits(torch.float32, "none")
    return _Proof(compare(with_adapter, merged), compare(with_adapter, without), against_training)


def _tolerance(dtype: torch.dtype, trained: TrainingBase, original: bool) -> float:
    rounding = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    return max(rounding, INT8_TOLERANCE) if trained.quantization == "int8" and not original else rounding


def _refuse_unfaithful(proof: _Proof, allowed: float, adapter: Path) -> None:
    found, without = proof.fidelity, proof.without_adapter
    assert found is not None
    assert without is not None
    if not found.relative_difference <= allowed:
        raise UserError(
            f"{adapter}: the merged model computes something else than the adapter model: logits differ by up to "
            f"{found.max_abs_difference:.3g}, {found.relative_difference:.2g} of the largest one, where {allowed:g} is "
            f"allowed (mean KL {found.mean_kl:.3g} nats, same most likely token {found.top1_agreement:.1%}). Nothing "
            "was written. Check that base model and quantisation are those of training; or pass --tolerance."
        )
    if found.mean_kl >= without.mean_kl:
        raise UserError(
            f"{adapter}: the merged model is no closer to the adapter model (mean KL {found.mean_kl:.3g} nats) than "
            f"the base is without the adapter ({without.mean_kl:.3g}): rounding swallows what was trained. Nothing was "
            "written. Pass --dtype float32, or train for longer."
        )
