"""The memory plan as a table that reads at 80 columns, with or without colour."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rrhf_peft.plan.run import MemoryPlan


def plan_table(plan: MemoryPlan) -> RenderableType:
    """What takes how much, the sum, and what the sum leaves out."""
    where = "one GPU" if plan.device == "cuda" else "CPU"
    if plan.processes > 1:
        where = f"each of {plan.processes} processes"
    recomputed = "layers recomputed" if plan.gradient_checkpointing else "layers kept"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_footer=True, footer_style="bold")
    table.add_column("", "predicted peak")
    table.add_column("GiB", f"{plan.peak_bytes / 2**30:.2f}", justify="right")
    table.add_column("counted as", f"{recomputed} in the backward pass")
    for item in plan.items:
        table.add_row(item.name, f"{item.bytes / 2**30:.2f}", Text(item.note))
    parts: list[RenderableType] = [
        Text(f"Memory plan for {plan.model} on {where}", style="bold underline"),
        Text(f"{plan.parameters:,} parameters, {plan.trainable:,} values trained"),
        Text(
            f"{plan.responses} responses per prompt, "
            + ("as the longest group of the data" if plan.from_data else "assumed: all as long as data.max_tokens")
        ),
        table,
    ]
    if plan.host_bytes:
        parts.append(Text(f"and {plan.host_bytes / 2**30:.2f} GiB of paged optimizer state in host memory"))
    parts.append(Text("Not in it:"))
    parts += [Padding(Text(f"- {note}"), (0, 0, 0, 2)) for note in plan.unknown]
    return Group(*parts)
