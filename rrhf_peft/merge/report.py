"""What a merge did and how faithful it is, as a record and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from rrhf_peft.merge.fidelity import Fidelity


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
