"""Does the merged model compute what the adapter model computes? Logits of both on the same prompts, and the report.

Both compute in float32, so that what differs is their weights and not the order of roundings. They
are loaded one after the other: the memory is that of the larger one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from rrhf_peft import __version__
from rrhf_peft.modeling import (
    AdapterFiles,
    attach_adapter_files,
    compute_in_float32,
    dequantized_weight,
    load_base_model,
)
from rrhf_peft.modeling.model_card import markdown_table, model_card
from rrhf_peft.progress import size_text
from rrhf_peft.records import UserError

#: Of a merged model's folder.
REPORT = "merge_report.json"

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
    for expected, actual in zip(adapter, merged, strict=True):
        expected = (expected - expected.mean(-1, keepdim=True)).double()
        actual = (actual - actual.mean(-1, keepdim=True)).double()
        difference = max(difference, _largest(actual - expected))
        scale = max(scale, _largest(expected))
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        agreement += (expected.argmax(-1) == actual.argmax(-1)).sum().item()
        positions += expected.shape[0]
    return Fidelity(difference, scale, divergence / positions, agreement / positions, positions)


def _largest(values: torch.Tensor) -> float:
    """Largest absolute value; not-a-number counts as infinite, so that it exceeds every tolerance."""
    largest = values.abs().max().item()
    return largest if largest == largest else float("inf")


# ---- The report ----


@dataclass(frozen=True)
class MergeReport:
    """The result of one merge.

    Attributes:
        adapter: The adapter's folder.
        base_model: Hub id or folder of the base model.
        output: The folder written.
        base: `dequantized` or `original`: the weights that the adapter was added to.
        training_quantization: How training held the base: none, int8, nf4 or fp4.
        training_dtype: What training held unquantised weights in.
        dtype: What was written; `auto` is resolved to the checkpoint's own.
        files: Weight files written.
        total_bytes: Bytes of all tensors.
        tensors: Tensors written.
        changed_tensors: Tensors that the adapter changed, as written.
        delta_norm: Sum over the changed tensors of the Frobenius norm of the change.
        untied_embeddings: Whether a head that shared the embedding's weights was given its own.
        fidelity: Merged model against the adapter on the weights it was merged into; None when not verified.
        tolerance: Largest `relative_difference` allowed for it.
        without_adapter: The same comparison for the base model alone: what a merge that lost the
            adapter would show. None when not verified.
        against_training: Merged model against the adapter on the weights as trained, where that is
            something else (`original` after quantised training). For information, not checked.
        seconds: Wall time.
    """

    adapter: str
    base_model: str
    output: str
    base: str
    training_quantization: str
    training_dtype: str
    dtype: str
    files: int
    total_bytes: int
    tensors: int
    changed_tensors: int
    delta_norm: float
    untied_embeddings: bool
    fidelity: Fidelity | None
    tolerance: float | None
    without_adapter: Fidelity | None
    against_training: Fidelity | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to merge_report.json."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """What was written and how it compares, in words, for the table and the card."""
        rows = [
            (
                "weights written",
                f"{self.tensors} tensors, {size_text(self.total_bytes)}, {self.dtype}, {self.files} file(s)",
            ),
            ("changed by the adapter", f"{self.changed_tensors} tensors, sum of ‖Δ‖ {self.delta_norm:.4g}"),
        ]
        if self.untied_embeddings:
            rows.append(("embeddings", "untied: the adapter changed the input and output embedding differently"))
        if self.fidelity is None or self.tolerance is None or self.without_adapter is None:
            return [*rows, ("fidelity", "not verified")]
        fidelity, other = self.fidelity, self.against_training
        rows += [
            (
                "largest logit difference",
                f"{fidelity.max_abs_difference:.3g}, {fidelity.relative_difference:.2g} of the largest logit "
                f"(tolerance {self.tolerance:g})",
            ),
            (
                "mean KL divergence",
                f"{fidelity.mean_kl:.3g} nats over {fidelity.positions} positions "
                f"(without the adapter: {self.without_adapter.mean_kl:.3g})",
            ),
            ("same most likely token", f"{fidelity.top1_agreement:.1%}"),
        ]
        if other is not None:
            compared = f"largest logit difference {other.max_abs_difference:.3g}, mean KL {other.mean_kl:.3g} nats"
            agreement = f"same most likely token {other.top1_agreement:.1%}"
            rows.append(("against the quantised model", f"{compared}, {agreement}"))
        return rows

    def __rich__(self) -> Table:
        table = Table(title=f"Merged into {self.output}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        held = self.training_quantization if self.training_quantization != "none" else self.training_dtype
        table.add_row("base model", self.base_model)
        table.add_row("merged into", f"{self.base} weights (training held them as {held})")
        for title, value in self.rows():
            table.add_row(title, value)
        table.add_row("time", f"{self.seconds:.1f} s")
        return table

    def card(self) -> str:
        """The folder's README."""
        name = Path(self.output).name
        base = Path(self.base_model).name if Path(self.base_model).is_dir() else self.base_model
        intro = (
            f"Standalone weights: `{base}` with a LoRA adapter trained on ranked responses\n"
            f"([RRHF](https://arxiv.org/abs/2304.05302)) merged in by rrhf-peft {__version__}. "
            "Loading it needs neither PEFT nor\nbitsandbytes.\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
        )
        table = markdown_table(("", ""), self.rows())
        numbers = f"{_explain_base(self)}\n\n{table}\n\n`merge_report.json` holds these numbers for programs."
        tags = ["rrhf", "rrhf-peft", "merged-adapter"]
        sections = {"How it was merged": numbers}
        return model_card(name, intro, sections, base=self.base_model, library="transformers", tags=tags)


def read_report(folder: Path) -> MergeReport:
    """The report of a finished merge.

    Raises:
        UserError: it is damaged.
    """
    path = folder / REPORT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        compared = ("fidelity", "without_adapter", "against_training")
        read = {name: None if values[name] is None else Fidelity(**values[name]) for name in compared}
        return MergeReport(**{**values, **read})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: is damaged. Pass --overwrite to merge again.") from None


def _explain_base(report: MergeReport) -> str:
    is_int8 = report.training_quantization == "int8"
    if report.training_quantization == "none":
        return f"The adapter was trained on the unquantised base in {report.training_dtype} and added to those weights."
    if report.base == "dequantized":
        return (
            f"The adapter was trained on the base in {report.training_quantization}. The base weights were quantised "
            "the same way and multiplied out again before the adapter was added: these are the weights it was "
            "trained with." + (" In training, int8 layers rounded their inputs too." if is_int8 else "")
        )
    return (
        f"The adapter was trained on the base in {report.training_quantization} but added to the original, unquantised "
        "weights. It never saw those, so the model computes something slightly different from what was trained."
    )
