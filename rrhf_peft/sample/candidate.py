"""What sampling makes, and the settings it is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled response.

    Attributes:
        text: The response as it reads after its prompt, without special tokens and stop string.
        num_tokens: Tokens generated, the EOS or the stop string's included.
        log_prob: Sum over those tokens of the policy's log P(token | past) at temperature 1, in nats; None where
            the backend does not tell.
        finish_reason: ``eos`` ended by itself, ``stop`` at a stop string, ``length`` was cut.
    """

    text: str
    num_tokens: int
    log_prob: float | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a policy is decoded; names and meanings as in the recipe's `sampling.candidates`."""

    strategy: Literal["beam", "diverse_beam", "top_p"]
    k: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Sequences decoded at the same time for one prompt."""
        return self.k if self.strategy == "top_p" else self.num_beams
