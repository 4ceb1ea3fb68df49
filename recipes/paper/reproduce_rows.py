"""What `make reproduce` runs: one row for each recipe in `small/`, and which rows it reads from.

Left to others: what the recipes say (they do, as YAML), running them (`reproduce_work`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parent / "small"


@dataclass(frozen=True)
class Row:
    """One recipe of `small/`.

    Attributes:
        name: Of the recipe, of its folder in a seed's folder, and of its policy in tables.
        title: What tables call it.
        needs: Rows whose files it reads.
        effort: About how long it takes, as a multiple of training and evaluating one policy on DP's data.
    """

    name: str
    title: str
    needs: tuple[str, ...] = ()
    effort: float = 1.0

    @property
    def recipe(self) -> Path:
        """The YAML file."""
        return RECIPES / f"{self.name}.yaml"


_SWEEP = ("0.03", "0.3", "1", "3")

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("provided", "the data set's two responses, scored", effort=0.3),
        Row("pairs", "held-out pairs, scored", effort=0.3),
        Row("base", "base model", needs=("pairs",), effort=0.3),
        Row("best_of_4", "base model, best of 4", needs=("pairs",), effort=0.3),
        Row("sft", "SFT on the better provided response", needs=("provided", "pairs")),
        Row("bp", "RRHF, BP", needs=("provided", "pairs"), effort=1.2),
        Row("sp", "RRHF, SP", needs=("provided", "pairs"), effort=1.2),
        Row("dp", "RRHF, DP", needs=("provided", "pairs"), effort=1.2),
        Row("d", "RRHF, D", needs=("pairs",), effort=1.2),
        Row("p", "RRHF, P", needs=("provided", "pairs")),
        Row("without_rank", "RRHF, DP, without L_rank", needs=("dp", "pairs")),
        Row("without_ft", "RRHF, DP, without L_ft", needs=("dp", "pairs")),
        Row("variant_paper", "RRHF, DP, variant paper", needs=("dp", "pairs")),
        Row("variant_released", "RRHF, DP, variant released", needs=("dp", "pairs")),
        *(Row(f"rank_weight_{weight}", f"RRHF, DP, rank_weight {weight}", needs=("dp", "pairs")) for weight in _SWEEP),
        Row("ip", "RRHF, IP-1 to IP-3", needs=("provided", "pairs"), effort=4),
        Row("op_8", "RRHF, OP-8", needs=("provided", "pairs"), effort=3),
        Row("op_8_kl", "RRHF, OP-8 with KL", needs=("provided", "pairs"), effort=3),
    )
}

#: Row -> how many rows read from it.
READERS = {name: sum(name in row.needs for row in ROWS.values()) for name in ROWS}
