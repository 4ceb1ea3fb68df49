"""The reward of online training: a scorer section becomes a function of candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.scoring import CompositeScorer
from rrhf_peft.score.finish import combined
from rrhf_peft.score.input import Candidates
from rrhf_peft.score.scorers import SCORERS
from rrhf_peft.train.online_prompts import OnlinePrompt

#: Groups in, for each a score per response out: higher is better, None where there is none.
Reward = Callable[[Sequence[Candidates]], list[list[float | None]]]


def make_reward(section: Any, recipe: Recipe, seed: int, prompts: Sequence[OnlinePrompt], own_source: str) -> Reward:
    """The function that a scorer section describes; whatever it needs is loaded here, before training begins.

    A composite that normalises over the data does so over the groups of one call.

    Args:
        section: any scorer but `human`.
        recipe: for scorers that read more of it.
        seed: of a judge's shuffling.
        prompts: the prompts of the run.
        own_source: what the policy's own responses are called.

    Raises:
        UserError: a scorer cannot be made.
    """
    # Scorers look at the data when they are made: at its sources, and at some tokens to prove an engine with.
    names = list(dict.fromkeys([own_source, *(name for item in prompts for name in item.sources)]))
    texts = [f"This is answer {number}." for number in range(max(2, len(names)))]
    sources = (names * 2)[: len(texts)]
    example = Candidates(0, prompts[0].prompt, texts, sources, {}, {})

    parts = {section.name: section}
    if isinstance(section, CompositeScorer):
        parts = {label: part.scorer for label, part in section.parts.items()}
    scorers = {label: SCORERS[own.name](own, recipe, seed, [example]) for label, own in parts.items()}

    def reward(groups: Sequence[Candidates]) -> list[list[float | None]]:
        by_label = {label: scorer.score(groups) for label, scorer in scorers.items()}
        return combined(
            [{label: own[place] for label, own in by_label.items()} for place in range(len(groups))], section
        )

    return reward
