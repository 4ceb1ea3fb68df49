"""How large a demo is: one for people, one that only proves that everything works."""

from __future__ import annotations

from dataclasses import dataclass, field

from rrhf_peft.demo.base import BaseSize


@dataclass(frozen=True)
class DemoSize:
    """Sizes of every step of the demo.

    Attributes:
        base: The base model.
        train_prompts: Prompts whose samples are trained on.
        heldout_prompts: Prompts that only measure.
        k: Responses per training prompt.
        heldout_k: Responses per held-out prompt, before and after.
        max_new_tokens: Longest response in tokens.
        sampling_batch: Responses generated at the same time.
        rank: Of the LoRA matrices; lora_alpha is twice that.
        epochs: Passes over the ranked groups.
        groups_per_step: Prompts per optimizer step.
        learning_rate: At the peak of the cosine.
    """

    base: BaseSize = field(default_factory=BaseSize)
    train_prompts: int = 320
    heldout_prompts: int = 100
    k: int = 6
    heldout_k: int = 4
    max_new_tokens: int = 96
    sampling_batch: int = 240
    rank: int = 16
    epochs: int = 4
    groups_per_step: int = 8
    learning_rate: float = 2e-3


#: What `rrhf-peft demo` does.
FULL = DemoSize()

#: The same base model and less of everything else: for the walkthrough.
BRIEF = DemoSize(train_prompts=160, heldout_prompts=60, heldout_k=2)

#: Seconds instead of minutes: a base model that has hardly learned to write.
TINY = DemoSize(
    base=BaseSize(stories=800, epochs=2, hidden_size=64, heads=4, vocab_size=512),
    train_prompts=24,
    heldout_prompts=12,
    k=4,
    heldout_k=2,
    max_new_tokens=64,
    epochs=1,
)
