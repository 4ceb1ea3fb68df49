"""Merge an adapter into its base model: standalone weights, streamed shard by shard, proved before they appear.

    base files --BaseWeights--> tensor --AdapterEdits--> merged tensor --shards--> staged folder
    staged folder --fidelity--> report --rename--> output

The output has the base checkpoint's own tensor names and order, so that it loads wherever the base
does. It appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rrhf_peft.console import terminal
from rrhf_peft.files import is_finished_folder, staged_folder
from rrhf_peft.jobs import fingerprint_of
from rrhf_peft.merge.fidelity import (
    DEFAULT_PROMPTS,
    REPORT,
    Fidelity,
    MergeReport,
    adapter_logits,
    compare,
    held_prompts,
    read_report,
    standalone_logits,
)
from rrhf_peft.merge.weights import (
    DTYPES,
    MergedWeights,
    OnProgress,
    TrainingBase,
    dtype_name,
    find_training_base,
    parse_size,
    plan_shards,
    run_folders,
)
from rrhf_peft.modeling import (
    AdapterFiles,
    load_tokenizer,
    read_adapter,
    refuse_unknown_tokens,
    weights_fingerprint,
)
from rrhf_peft.progress import progress
from rrhf_peft.records import UserError

#: Largest difference of logits that rounding explains, as a share of the largest logit, by what was written.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: Largest mean KL that rounding may add, as a share of what the adapter itself changes: half of its effect on logits.
SHARE_OF_EFFECT = 0.25

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)


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
    trust_remote_code: bool = False,
    verify: bool = True,
    verify_prompts: Sequence[str] | None = None,
    tolerance: float | None = None,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Write the base model with the adapter merged in, as a folder that needs no PEFT and no bitsandbytes.

    The host memory is about one shard and three of the largest tensors in float32; verification after
    that holds one whole model in float32 at a time. No GPU is used. The same merge, once finished, is read back.

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
        trust_remote_code: Run model code that comes with the base. No recipe.yaml can ask for it.
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
    trained = find_training_base(
        files,
        base_model=base_model,
        quantization=quantization,
        double_quant=double_quant,
        trust_remote_code=trust_remote_code,
    )
    original = base == "original" or trained.quantization == "none"
    reads = (files.folder, trained.folder)
    held = (trained.quantization, trained.double_quant, dtype_name(trained.dtype), original)
    fingerprint = fingerprint_of(
        [weights_fingerprint(path) for path in reads], held, dtype, limit, verify, verify_prompts, tolerance
    )
    if not overwrite and is_finished_folder(output, fingerprint):
        if on_progress is not None:
            on_progress(f"finished before: {output}", 0, 0)
        return read_report(output)
    with (
        staged_folder(
            output, verb="merge", key="--output", reads=reads, overwrite=overwrite, fingerprint=fingerprint
        ) as folder,
        warnings.catch_warnings(),
    ):
        # PEFT warns of what merging may go wrong with: here it is handled, or refused, or shows in the comparison.
        warnings.filterwarnings("ignore", module=r"peft\.")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        merge = MergedWeights(files, trained, as_trained=not original or trained.quantization == "none", dtype=dtype)
        tokenizer = _write_companions(folder, files, trained, merge)
        shards = plan_shards(merge.plan, limit)
        merge.write(folder, shards, on_progress)
        allowed = tolerance if tolerance is not None else TOLERANCES.get(merge.main_dtype, TOLERANCES[torch.float32])
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
            tolerance=allowed if verify else None,
            **proof._asdict(),
            seconds=time.monotonic() - started,
        )
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(report.card(), encoding="utf-8")
    return report


@contextlib.contextmanager
def merge_progress(console: Console | None = None) -> Iterator[OnProgress]:
    """Yield a callback for `merge_adapter(on_progress=...)` that shows how far it is."""
    with progress(console or terminal(stderr=True), "merging", None, unit="bytes") as advance:

        def show(stage: str, done: int, total: int) -> None:
            if not total:
                advance.begin(stage)
                return
            advance.total = total
            advance(done - advance.done)

        yield show


def _write_companions(
    folder: Path, files: AdapterFiles, trained: TrainingBase, merge: MergedWeights
) -> PreTrainedTokenizerBase | None:
    """Write all but the weights, and give the tokenizer, where there is one.

    Raises:
        UserError: it knows tokens that the model has no embedding for.
    """
    _write_config(trained.folder, folder, dtype=merge.main_dtype, untie=merge.untied)
    if not _copy_companions(run_folders(files.folder), trained.folder, folder):
        return None
    tokenizer = load_tokenizer(folder, trust_remote_code=trained.trust_remote_code)
    try:
        refuse_unknown_tokens(tokenizer, merge.vocab_size, str(files.folder))
    except UserError as error:
        raise UserError(
            f"{error} If the vocabulary was resized for training, pass the resized base as --base-model."
        ) from None
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


def _refuse_unfaithful(proof: _Proof, allowed: float, adapter: Path) -> None:
    here, without = proof.fidelity, proof.without_adapter
    assert here is not None
    assert without is not None
    if not here.relative_difference <= allowed:
        raise UserError(
            f"{adapter}: the merged model computes something else than the adapter model: logits differ by up to "
            f"{here.max_abs_difference:.3g}, {here.relative_difference:.2g} of the largest one, where {allowed:g} is "
            f"allowed (mean KL {here.mean_kl:.3g} nats, same most likely token {here.top1_agreement:.1%}). Nothing "
            "was written. Check that base model and quantisation are those of training; or pass --tolerance."
        )
    if here.mean_kl >= SHARE_OF_EFFECT * without.mean_kl:
        raise UserError(
            f"{adapter}: the merged model differs from the adapter model by a mean KL of {here.mean_kl:.3g} nats, and "
            f"the base without the adapter by {without.mean_kl:.3g}: rounding swallows what was trained. Nothing was "
            "written. Pass --dtype float32, or train for longer."
        )


def _write_config(base: Path, target: Path, *, dtype: torch.dtype, untie: bool) -> None:
    """Copy config.json with the new dtype, and untied where the tensors differ.

    There is no quantisation to take out: a base checkpoint that is quantised on disk is refused.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "torch_dtype" in section or "dtype" in section or section is config:
            section.pop("torch_dtype", None)
            section["dtype"] = str(dtype).removeprefix("torch.")
        if untie and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_companions(adapter: Sequence[Path], base: Path, target: Path) -> bool:
    """Copy everything else that a model folder needs.

    The tokenizer comes whole from the first folder that has one, the generation settings likewise: the
    adapter's folders first, then the base. Python files come with models that bring their own code.

    Returns:
        Whether there was a tokenizer.
    """
    folders = [*adapter, base]
    tokenizer = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    tokenizer = tokenizer or next((folder for folder in folders if _has_tokenizer(folder)), None)
    if tokenizer:
        for name in _TOKENIZER_FILES:
            _copy(tokenizer / name, target)
        for path in tokenizer.glob("*.tiktoken"):
            _copy(path, target)
        if (tokenizer / "additional_chat_templates").is_dir():
            shutil.copytree(tokenizer / "additional_chat_templates", target / "additional_chat_templates")
    generation = next((folder for folder in folders if (folder / "generation_config.json").is_file()), None)
    if generation:
        _copy(generation / "generation_config.json", target)
    if "auto_map" in json.loads((base / "config.json").read_text(encoding="utf-8")):
        for path in base.glob("*.py"):
            _copy(path, target)
    return tokenizer is not None


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def _copy(path: Path, target: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, target / path.name)
