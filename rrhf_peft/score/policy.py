"""RRHF as a reward model: responses scored by their length-normalised log-prob under a policy.

    p_i = (1/|y_i|^a) sum_t log P(y_i,t | x, y_i,<t)      Eq. 1 of https://arxiv.org/abs/2304.05302

Prompt and response are tokenised exactly as training does it, the end included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rrhf_peft.data import GroupCollator, tokenize_every_response
from rrhf_peft.logprobs import install, prove
from rrhf_peft.modeling import TokenBudget, load_policy, read_adapter, refuse_beyond_context
from rrhf_peft.recipe import ModelSection, Recipe
from rrhf_peft.recipe.stages import PolicyScorer
from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError
from rrhf_peft.score.combine import GroupScores


class PolicyScores:
    """p_i of responses under a policy.

    Args:
        model: causal LM or PEFT model, in evaluation mode on its device.
        tokenizer: its tokenizer.
        template: how prompt and response become text.
        max_prompt_tokens: as in `data`.
        max_tokens: as in `data`.
        length_penalty: exponent a.
        batch_tokens: tokens per batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str = "raw",
        max_prompt_tokens: int | None = None,
        max_tokens: int = 512,
        length_penalty: float = 1.0,
        batch_tokens: int = 16384,
    ) -> None:
        self.model, self.tokenizer, self.length_penalty = model, tokenizer, length_penalty
        self.limits: dict[str, Any] = {
            "template": template,
            "max_prompt_tokens": max_prompt_tokens,
            "max_tokens": max_tokens,
        }
        self.budget = TokenBudget(batch_tokens)
        self.engine = install(model)
        self.truncated = 0
        refuse_beyond_context(model.config, max_tokens, "scoring.scorer.max_tokens", "the policy")

    def prove(self, groups: Sequence[RankedGroup]) -> None:
        """Let the engine settle its layout on the longest group that has tokens; every process alike.

        What a model reads further back than a layout lets it shows in long groups only.
        """
        longest = sorted(groups, key=lambda group: -len(str(group.prompt)) - sum(map(len, group.responses)))
        tokenized = next((tokens for group in longest for tokens in self._tokenized([group])), None)
        if tokenized is not None:
            prove(self.model, self.engine, self._batch([tokenized]))

    def score(self, groups: Sequence[RankedGroup]) -> list[list[float | None]]:
        """p_i of every response, in nats per token for a = 1; None for a response without text."""
        return [
            [None if value is None else value[0] / value[1] ** self.length_penalty for value in group]
            for group in self.log_probs(groups)
        ]

    def log_probs(self, groups: Sequence[RankedGroup]) -> list[list[tuple[float, int] | None]]:
        """(log-prob in nats, tokens) of every response, its end included; None for a response without text."""
        scores: list[list[tuple[float, int] | None]] = [[None] * len(group.responses) for group in groups]
        tokenized = self._tokenized(groups)
        lengths = [len(group.prompt_ids) + sum(map(len, group.response_ids)) for group in tokenized]
        values = self.budget.map(lengths, lambda batch: self._values([tokenized[index] for index in batch]))
        for tokens, group_values in zip(tokenized, values, strict=True):
            known: dict[tuple[int, ...], tuple[float, int]] = {}  # the same tokens tie, whatever rounding says
            for source, ids, value in zip(tokens.sources, tokens.response_ids, group_values, strict=True):
                scores[tokens.index][int(source)] = known.setdefault(tuple(ids), value)
        return scores

    def _tokenized(self, groups: Sequence[RankedGroup]) -> list[TokenizedGroup]:
        """`sources` tell each response's position in its group, `index` the group's position in `groups`."""
        tokenized, truncated = tokenize_every_response(groups, self.tokenizer, **self.limits)
        self.truncated += truncated
        return tokenized

    @torch.no_grad()
    def _values(self, groups: list[TokenizedGroup]) -> list[list[tuple[float, int]]]:
        log_probs = self.engine.log_probs(self.model, self._batch(groups))
        values = iter(zip(log_probs.sum.double().tolist(), log_probs.num_tokens.tolist(), strict=True))
        return [[next(values) for _ in group.response_ids] for group in groups]

    def _batch(self, groups: list[TokenizedGroup]) -> Any:
        names = sorted({source for group in groups for source in group.sources})
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in GroupCollator(names)(groups).items()}  # type: ignore[attr-defined]


def policy_of(section: PolicyScorer, recipe: Recipe) -> tuple[ModelSection, str | None]:
    """The `model:` section and the adapter that the scorer names: a model, an adapter on it, or the recipe's own.

    Raises:
        UserError: neither is named, or there is no such adapter.
    """
    if section.model is not None:
        return ModelSection(name=section.model), section.adapter
    if recipe.model is not None:
        return recipe.model, section.adapter or recipe.model.init_adapter
    name = read_adapter(section.adapter).config.base_model_name_or_path if section.adapter else None
    if not name:
        raise UserError("scoring.scorer.model: name the policy, or an adapter that says what its base model is.")
    return ModelSection(name=name), section.adapter


class PolicyGroups:
    """A policy's own preference over candidates."""

    def __init__(self, section: PolicyScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        described, adapter = policy_of(section, recipe)
        model, tokenizer = load_policy(described, adapter=adapter)
        self.policy = PolicyScores(
            model,
            tokenizer,
            template=section.template,
            max_prompt_tokens=section.max_prompt_tokens,
            max_tokens=section.max_tokens,
            length_penalty=section.length_penalty,
            batch_tokens=section.batch_tokens,
        )
        self.policy.prove([group for group in groups if group.responses])

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """p_i; a response without text has none. Responses that lost their end are counted."""
        before = self.policy.truncated
        scored = [
            GroupScores(scores, {index: "no text" for index, score in enumerate(scores) if score is None})
            for scores in self.policy.score(groups)
        ]
        scored[0].counts["truncated_responses"] = self.policy.truncated - before
        return scored
