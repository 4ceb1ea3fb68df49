"""The `online:` section: new candidates from the policy while it is trained (OP-k of arXiv 2304.05302).

Left to others: what the values do (`rrhf_peft.training.online`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rrhf_peft.recipe.sampling import CandidatesSection
from rrhf_peft.recipe.scoring import ScorerSection
from rrhf_peft.recipe.section import Section


class OnlineSection(Section):
    """Every `every` optimizer steps the current policy answers the prompts of the next ones, and the scorer scores."""

    every: int = Field(ge=1, description="k of OP-k: optimizer steps between two samplings.")
    decoding: CandidatesSection = Field(
        description="How the policy answers, as an entry of `sampling.candidates` without model, adapter and backend."
    )
    scorer: ScorerSection = Field(description="Who scores, as `scoring.scorer`.")
    keep_provided: bool = Field(
        True, description="Rank the responses that `data.train` holds for the prompt together with the new ones."
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="b of reward - b * KL against the policy with its adapter off. 0: no penalty."
    )
    kl_reduction: Literal["sum", "mean"] = Field(
        "sum", description="KL of a response: sum over its tokens of log-ratio, or their mean."
    )
    seed: int = Field(0, ge=0, description="Of top_p; each refresh has draws of its own.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens decoded together; halved when memory is out.")
