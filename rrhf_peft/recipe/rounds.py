"""The `rounds:` section: sample, score, train, evaluate, and again from the trained policy (IP-n).

Left to others: what the values do (`rrhf_peft.rounds`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rrhf_peft.recipe.section import Section


class RoundsSection(Section):
    """What `rrhf-peft rounds` reads, beside `model`, `sampling`, `scoring`, `training` and `evaluation`.

    Their paths (sampling.output, scoring.input and output, data.train, training.output_dir, evaluation.output and
    policies) are set by the rounds and may be left out.
    """

    output: str = Field(min_length=1, description="The folder of all rounds; each has a folder of its own in it.")
    count: int = Field(3, ge=1, description="n of IP-n.")
    start_from: Literal["last", "base"] = Field(
        "last", description="last: train the adapter of the round before further. base: a new adapter each round."
    )
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="Each round takes the next this many prompts, from the start again at the end. "
        "Unset: every round takes them all.",
    )
