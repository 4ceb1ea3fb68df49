"""The `objective:` section: one class per loss, told apart by `name`.

Left to others: the losses (`rrhf_peft.objectives`), whose keyword arguments have these names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_peft.recipe.section import Section


class RRHFObjective(Section):
    """The RRHF loss (arXiv 2304.05302), Eq. 1-5."""

    name: Literal["rrhf"] = "rrhf"
    variant: Literal["balanced", "paper", "released"] = Field(
        "balanced",
        description="balanced: Eq. 1-2 and a mean SFT loss. paper: Eq. 1-5 to the letter. released: the released "
        "code's arithmetic, which divides by the padded length.",
    )
    rank_weight: float = Field(1.0, ge=0, description="Weight of the ranking loss.")
    sft_weight: float = Field(1.0, ge=0, description="Weight of the fine-tuning loss on the best response.")
    length_penalty: float = Field(1.0, ge=0, description="Exponent a of |y| in Eq. 1.")
    margin: float = Field(0.0, description="Added inside the hinge of Eq. 2.")
    min_score_gap: float = Field(0.0, ge=0, description="Only pairs whose scores differ by more than this count.")
    pair_function: Literal["hinge", "logistic"] = Field(
        "hinge", description="hinge: max(0, d). logistic: log(1 + exp(d))."
    )
    pair_reduction: Literal["sum", "mean"] = Field("sum", description="Over the ordered pairs of a group.")
    sft_reduction: Literal["sum", "mean"] | None = Field(
        None, description="Over the best response's tokens. Unset: sum for paper, mean for balanced."
    )
    tied_best: Literal["first", "mean"] = Field(
        "first", description="Fine-tuning target when several responses share the best score."
    )


class SFTObjective(Section):
    """Fine-tuning on the best response only."""

    name: Literal["sft"]
    sft_reduction: Literal["sum", "mean"] = Field("mean", description="Over the best response's tokens.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


ObjectiveSection = Annotated[RRHFObjective | SFTObjective, Field(discriminator="name")]
