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
from rrhf_peft.modeling import attach_adapter, load_base_model, load_tokenizer, read_adapter, refuse_beyond_context
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.scoring import PolicyScorer
from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError
from rrhf_peft.score.batches import TokenBudget
from rrhf_peft.score.candidates import GroupScores


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
        """Let the engine settle its layout on the data's first group that has tokens; every process alike."""
        tokenized = next((tokens for group in groups for tokens in self._tokenized([group])), None)
        if tokenized is not None:
            prove(self.model, self.engine, self._batch([tokenized]))

    def score(self, groups: Sequence[RankedGroup]) -> list[list[float | None]]:
        """p_i of every response, in nats per token for a = 1; None for a response without text."""
        return [
            [None if own is None else own[0] / own[1] ** self.length_penalty for own in group]
            for group in self.log_probs(groups)
        ]

    def log_probs(self, groups: Sequence[RankedGroup]) -> list[list[tuple[float, int] | None]]:
        """(log-prob in nats, tokens) of every response, its end included; None for a response without text."""
        scores: list[list[tuple[float, int] | None]] = [[None] * len(group.responses) for group in groups]
        tokenized = self._tokenized(groups)
        lengths = [len(group.prompt_ids) + sum(map(len, group.response_ids)) for group in tokenized]
        values = self.budget.map(lengths, lambda batch: self._values([tokenized[index] for index in batch]))
        for tokens, group_values in zip(tokenized, values, strict=True):
            for source, value in zip(tokens.sources, group_values, strict=True):
                scores[tokens.index][int(source)] = value
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


def load_policy(section: PolicyScorer, recipe: Recipe) -> PolicyScores:
    """The policy that the scorer names: a model, an adapter on it, or the recipe's own model.

    Raises:
        UserError: neither is named, or they cannot be loaded.
    """
    settings: dict[str, Any] = {}
    adapter = section.adapter
    if section.model is not None:
        name: str | None = section.model
    elif recipe.model is not None:
        name = recipe.model.name
        fields = ("revision", "dtype", "quantization", "double_quant", "attention", "trust_remote_code")
        settings = {field: getattr(recipe.model, field) for field in fields}
        adapter = adapter or recipe.model.init_adapter
    else:
        name = read_adapter(adapter).config.base_model_name_or_path if adapter else None
    if not name:
        raise UserError("scoring.scorer.model: name the policy, or an adapter that says what its base model is.")
    own_tokenizer = recipe.model.tokenizer if section.model is None and recipe.model is not None else None
    tokenizer = load_tokenizer(
        own_tokenizer or name,
        revision=settings.get("revision") if own_tokenizer is None else None,
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    model: Any = load_base_model(name, **settings)
    if adapter is not None:
        model = attach_adapter(model, None, init_adapter=adapter)
    return PolicyScores(
        model.eval().requires_grad_(False),
        tokenizer,
        template=section.template,
        max_prompt_tokens=section.max_prompt_tokens,
        max_tokens=section.max_tokens,
        length_penalty=section.length_penalty,
        batch_tokens=section.batch_tokens,
    )


class PolicyGroups:
    """A policy's own preference over candidates."""

    def __init__(self, section: PolicyScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        self.policy: PolicyScores = load_policy(section, recipe)
        self.policy.prove(groups)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """p_i; a response without text has none."""
        return [
            GroupScores(scores, {index: "no text" for index, score in enumerate(scores) if score is None})
            for scores in self.policy.score(groups)
        ]

    def counts(self) -> dict[str, int]:
        """Responses that lost their end."""
        return {"truncated_responses": self.policy.truncated}
