"""What a merge does and how faithful it is: progress, record, table and model card."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from rrhf_peft import __version__
from rrhf_peft.console import terminal
from rrhf_peft.merge.fidelity import Fidelity
from rrhf_peft.records import UserError

#: Of a merged model's folder.
REPORT = "merge_report.json"

#: Called with what is being done, bytes done, and bytes in all (0 when that is not known).
OnProgress = Callable[[str, int, int], None]


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


def size_text(size: int) -> str:
    """Bytes for people: 2.6 MB, 13.5 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def render_report(report: MergeReport) -> Table:
    """The report as a rich table."""
    table = Table(title=f"Merged into {report.output}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    held = report.training_quantization if report.training_quantization != "none" else report.training_dtype
    table.add_row("base model", report.base_model)
    table.add_row("merged into", f"{report.base} weights (training held them as {held})")
    table.add_row(
        "written", f"{report.tensors} tensors, {size_text(report.total_bytes)} {report.dtype}, {report.files} file(s)"
    )
    table.add_row("changed", f"{report.changed_tensors} tensors, sum of ‖Δ‖ {report.delta_norm:.4g}")
    if report.untied_embeddings:
        table.add_row("embeddings", "untied: the adapter changed the input and output embedding differently")
    for title, value in fidelity_rows(report):
        table.add_row(title, value)
    table.add_row("time", f"{report.seconds:.1f} s")
    return table


def fidelity_rows(report: MergeReport) -> list[tuple[str, str]]:
    """The comparison in words, for tables and cards."""
    if report.fidelity is None or report.tolerance is None or report.without_adapter is None:
        return [("fidelity", "not verified")]
    found = report.fidelity
    rows = [
        (
            "largest logit difference",
            f"{found.max_abs_difference:.3g}, {found.relative_difference:.2g} of the largest logit "
            f"(tolerance {report.tolerance:g})",
        ),
        (
            "mean KL divergence",
            f"{found.mean_kl:.3g} nats over {found.positions} positions "
            f"(without the adapter: {report.without_adapter.mean_kl:.3g})",
        ),
        ("same most likely token", f"{found.top1_agreement:.1%}"),
    ]
    if report.against_training is not None:
        other = report.against_training
        rows.append(
            (
                "against the quantised model",
                f"largest logit difference {other.max_abs_difference:.3g}, mean KL {other.mean_kl:.3g} nats, "
                f"same most likely token {other.top1_agreement:.1%}",
            )
        )
    return rows


def model_card(report: MergeReport) -> str:
    """Markdown with the hub's metadata block."""
    name = Path(report.output).name
    base_is_folder = Path(report.base_model).is_dir()
    base = Path(report.base_model).name if base_is_folder else report.base_model
    metadata: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not base_is_folder:  # the hub refuses a base model that is a folder on someone's disk
        metadata["base_model"] = report.base_model
    metadata["tags"] = ["rrhf", "rrhf-peft", "merged-adapter"]
    rows = "\n".join(f"| {title} | {value} |" for title, value in fidelity_rows(report))
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {name}

Standalone weights: `{base}` with a LoRA adapter trained on ranked responses
([RRHF](https://arxiv.org/abs/2304.05302)) merged in by rrhf-peft {__version__}. Loading it needs neither PEFT nor
bitsandbytes.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## How it was merged

{_explain_base(report)}

| | |
| --- | --- |
| weights written | {report.tensors} tensors, {size_text(report.total_bytes)}, {report.dtype} |
| changed by the adapter | {report.changed_tensors} tensors, sum of Frobenius norms {report.delta_norm:.4g} |
{rows}

`merge_report.json` holds these numbers for programs.
"""


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


@contextlib.contextmanager
def merge_progress(console: Console | None = None) -> Iterator[OnProgress]:
    """Yield a callback for `merge_adapter(on_progress=...)` that shows how far it is."""
    console = console or terminal(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        task = progress.add_task("merging", total=None)

        def show(stage: str, done: int, total: int) -> None:
            if total:
                progress.update(task, description=stage, completed=done, total=total)
            else:
                progress.update(task, visible=False)
                progress.console.print(stage, highlight=False)

        yield show


def _plain_lines(console: Console) -> OnProgress:
    started = time.monotonic()
    last: tuple[str, int] = ("", -1)

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // total if total else 0
        if (stage, tenth) == last:
            return
        last = (stage, tenth)
        share = f" {10 * tenth}% of {size_text(total)}" if total else ""
        console.print(f"{stage}{share} ({time.monotonic() - started:.0f} s)", highlight=False)

    return show
