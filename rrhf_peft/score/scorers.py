"""Every scorer by its name in a recipe: a section in, something that scores groups of candidates out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rrhf_peft.modeling import default_device, resolve_dtype, resolve_source
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.scoring import HumanScorer, JudgeScorer, PolicyScorer, RewardModelScorer, RuleScorer, SourceScorer
from rrhf_peft.records import RankedGroup
from rrhf_peft.score.annotations import Agreement, agreement, merged_scores
from rrhf_peft.score.judge import Judge
from rrhf_peft.score.judge_client import JudgeClient
from rrhf_peft.score.judge_prompts import ASPECTS
from rrhf_peft.score.policy import PolicyScores, load_policy
from rrhf_peft.score.ranking_sheet import read_ranks
from rrhf_peft.score.reward_model import RewardModel, label_index, load_sequence_classifier
from rrhf_peft.score.rule import load_rule
from rrhf_peft.score.source import source_score
from rrhf_peft.score.texts import RewardTexts, load_reward_tokenizer, longest_row
from rrhf_peft.score.transcript import transcript
from rrhf_peft.score.value_head import load_value_head_model


@dataclass
class GroupScores:
    """What one scorer says of one group.

    Attributes:
        scores: one per response, higher is better; None where there is none.
        failures: response index -> why there is none.
        aspects: further scores to keep with the raw ones, by name.
    """

    scores: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    aspects: dict[str, list[float | None]] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores groups; `counts` are running totals for the report (requests, truncated texts ...)."""

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """One `GroupScores` for each group, in order."""

    def counts(self) -> dict[str, int]:
        """Running totals since the scorer was made."""


class RewardModelGroups:
    """A reward model over candidates."""

    def __init__(self, section: RewardModelScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        value_head = section.layout == "value_head"
        device = default_device()
        options: dict[str, Any] = {
            "revision": section.revision,
            "dtype": resolve_dtype(section.dtype, device),
            "device": device,
            "trust_remote_code": section.trust_remote_code,
        }
        if value_head:
            model: Any = load_value_head_model(section.model, base=section.base, **options)
        else:
            model = load_sequence_classifier(resolve_source(section.model, revision=section.revision), **options)
        own = section.tokenizer or (section.base if value_head and section.base else section.model)
        tokenizer = load_reward_tokenizer(
            own,
            revision=section.revision if own == section.model else None,
            trust_remote_code=section.trust_remote_code,
        )
        append_eos = section.append_eos if section.append_eos is not None else value_head
        longest = longest_row(section.max_tokens, tokenizer, model.config)
        label = None if value_head else label_index(model, section.label, section.values, section.model)
        self.texts = RewardTexts(tokenizer, template=section.template, append_eos=append_eos, max_tokens=longest)
        self.model = RewardModel(model, label=label, values=section.values, batch_tokens=section.batch_tokens)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """Rewards; every response gets one."""
        rows = [self.texts.row(group.prompt, response) for group in groups for response in group.responses]
        scores = iter(self.model.score(rows))
        return [GroupScores([next(scores) for _ in group.responses]) for group in groups]

    def counts(self) -> dict[str, int]:
        """Texts that lost their beginning."""
        return {"truncated_texts": self.texts.truncated}


class JudgeGroups:
    """A judge over candidates."""

    def __init__(self, section: JudgeScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        client = JudgeClient(
            section.base_url,
            section.model,
            api_key_env=section.api_key_env,
            attempts=section.attempts,
            first_wait=section.first_wait,
            timeout=section.timeout,
            temperature=section.temperature,
            reply_tokens=section.reply_tokens,
            max_requests=section.max_requests,
            max_total_tokens=section.max_total_tokens,
            json_mode=section.json_mode,
        )
        self.judge = Judge(
            client,
            mode=section.mode,
            aspects={name: section.aspect_meanings.get(name) or ASPECTS[name] for name in section.aspects},
            weights=section.aspects,
            low=section.low,
            high=section.high,
            instructions=section.instructions,
            reply_attempts=section.reply_attempts,
            concurrency=section.concurrency,
            seed=seed,
        )

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """Judgements; what failed has its reason."""
        judged = self.judge.judge([(transcript(group.prompt), group.responses) for group in groups])
        return [GroupScores(own.scores, own.failures, own.aspects) for own in judged]

    def counts(self) -> dict[str, int]:
        """Requests, retries, tokens, faults and bad replies by kind."""
        bad = {f"bad reply: {reason}": count for reason, count in self.judge.bad_replies.items()}
        return {**self.judge.client.counts, **bad}


class RuleGroups:
    """A rule over candidates."""

    def __init__(self, section: RuleScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        self.rule = load_rule(section.function)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """What the rule says; every response gets a score."""
        return [GroupScores([*self.rule(transcript(group.prompt), group.responses)]) for group in groups]

    def counts(self) -> dict[str, int]:
        """Nothing to count."""
        return {}


class PolicyGroups:
    """A policy's own preference over candidates."""

    def __init__(self, section: PolicyScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        self.policy: PolicyScores = load_policy(section, recipe)
        self.policy.prove(groups)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """p_i; a response without text has none."""
        return [
            GroupScores(own, {place: "no text" for place, score in enumerate(own) if score is None})
            for own in self.policy.score(groups)
        ]

    def counts(self) -> dict[str, int]:
        """Responses that lost their end."""
        return {"truncated_responses": self.policy.truncated}


class SourceGroups:
    """Who wrote a candidate; a source without a score is told before anything is written."""

    def __init__(self, section: SourceScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        sources = dict.fromkeys(source for group in groups for source in group.sources)
        self.scores = {source: source_score(source, section.scores) for source in sources}

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """What the patterns say; every response gets a score."""
        return [GroupScores([self.scores[source] for source in group.sources]) for group in groups]

    def counts(self) -> dict[str, int]:
        """Nothing to count."""
        return {}


class HumanGroups:
    """People's merged ranks over candidates; the sheets are read when it is made."""

    def __init__(self, section: HumanScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        texts = [(transcript(group.prompt), group.responses) for group in groups]
        sizes = [len(group.responses) for group in groups]
        annotators = [read_ranks(Path(file), Path(section.sheet), texts) for file in section.annotations]
        self.merged = dict(zip((group.index for group in groups), merged_scores(annotators, sizes), strict=True))
        self.agreement: Agreement = agreement(annotators, sizes)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """Merged ranks; a response that nobody ranked has none."""
        found = []
        for group in groups:
            own = self.merged[group.index]
            found.append(GroupScores(own, {place: "not ranked" for place, score in enumerate(own) if score is None}))
        return found

    def counts(self) -> dict[str, int]:
        """Nothing to count; `agreement` goes to the report."""
        return {}


#: Name in a recipe -> what makes the scorer from (section, recipe, seed, all groups).
SCORERS: dict[str, Callable[[Any, Recipe, int, Sequence[RankedGroup]], Scorer]] = {
    "reward_model": RewardModelGroups,
    "judge": JudgeGroups,
    "rule": RuleGroups,
    "policy": PolicyGroups,
    "source": SourceGroups,
    "human": HumanGroups,
}
