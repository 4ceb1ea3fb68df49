"""Before and after: the same measures of a policy's own texts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rrhf_peft.evaluate.likelihood import mean_log_probs, perplexity
from rrhf_peft.evaluate.statistics import Interval, distinct_n, mean_reward, mean_words, pair_accuracy
from rrhf_peft.records import TokenizedGroup
from rrhf_peft.score.rule import Rule


@dataclass(frozen=True)
class Measured:
    """What was measured of one policy on the held-out prompts.

    Attributes:
        reward: Mean reward of its own responses, with a 95 % interval over prompts.
        perplexity: Of its own responses under the untouched base: how far it has moved.
        pair_accuracy: How often it orders two scored responses of the base as their scores do.
        distinct_2: Different word pairs over all word pairs.
        words: Mean words per response.
        responses: Its responses to each prompt.
        rewards: Their rewards.
    """

    reward: Interval
    perplexity: float
    pair_accuracy: float
    distinct_2: float
    words: float
    responses: list[list[str]]
    rewards: list[list[float]]


def measure(
    policy: Any,
    responses: list[list[str]],
    *,
    prompts: Sequence[str],
    rule: Rule,
    judge: Any,
    tokenizer: PreTrainedTokenizerBase,
    ranked: Sequence[TokenizedGroup],
) -> Measured:
    """Measure a policy by its own `responses`, and by how it orders the `ranked` groups of the base.

    Args:
        policy: The model before or after training.
        responses: Its responses to each prompt.
        prompts: The held-out prompts.
        rule: The reward.
        judge: The untouched base model.
        tokenizer: Of both models.
        ranked: Held-out groups with scores, for the pair accuracy.
    """
    rewards = [rule(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
    flat = [(prompt, text) for prompt, own in zip(prompts, responses, strict=True) for text in own]
    texts = [text for _, text in flat]
    return Measured(
        reward=mean_reward(rewards),
        perplexity=perplexity(judge, tokenizer, [prompt for prompt, _ in flat], texts),
        pair_accuracy=pair_accuracy(mean_log_probs(policy, ranked), [group.scores for group in ranked]),
        distinct_2=distinct_n(texts, 2),
        words=mean_words(texts),
        responses=responses,
        rewards=rewards,
    )
