"""Answers and their rewards become what is trained on: token ids, the KL penalty, and the record of it all.

answered --without empty, unscored and repeated ones--> Answers --KL--> scores --> TokenizedGroup
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rrhf_peft.data import TEMPLATES
from rrhf_peft.data.cleaning import Counts, Encoded, without_duplicates
from rrhf_peft.records import RankedGroup, TokenizedGroup
from rrhf_peft.sample.candidate import Candidate
from rrhf_peft.train.online_prompts import OnlinePrompt

#: `TokenizedGroup.index` of a group that only stands in for a micro-batch without any, and teaches nothing.
STAND_IN = -1


@dataclass
class Answers:
    """One prompt with its scored, distinct responses; provided ones first, then the policy's own.

    Attributes:
        prompt: what was answered.
        response_ids: of each response, with its EOS unless it was cut.
        texts: of each response.
        sources: who wrote each.
        rewards: what the scorer said of each.
        sampled: whether the policy wrote it now.
        kl: log-ratio to the adapter-off policy in nats, as penalised; None where it was not computed.
        scores: what is trained on: rewards, less the penalty.
        left_out: responses that are not among these, each with its source and why.
    """

    prompt: OnlinePrompt
    response_ids: list[Sequence[int]]
    texts: list[str]
    sources: list[str]
    rewards: list[float]
    sampled: list[bool]
    left_out: list[dict[str, Any]]
    kl: list[float | None] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def penalise(self, log_ratios: Sequence[float], coefficient: float, reduction: Literal["sum", "mean"]) -> None:
        """Set score_i = reward_i - coefficient * KL_i.

        Args:
            log_ratios: sum over each response's tokens of log pi - log pi_off, in nats.
            coefficient: b.
            reduction: KL_i is that sum, or its mean over the tokens.
        """
        lengths = [len(ids) if reduction == "mean" else 1 for ids in self.response_ids]
        penalties = [ratio / length for ratio, length in zip(log_ratios, lengths, strict=True)]
        self.kl = list(penalties)
        self.scores = [reward - coefficient * kl for reward, kl in zip(self.rewards, penalties, strict=True)]

    def group(self) -> TokenizedGroup:
        """As training takes it; the scores must be set."""
        return TokenizedGroup(
            self.prompt.prompt_ids, list(self.response_ids), list(self.scores), self.sources, self.prompt.index
        )

    def row(self, learned: bool) -> dict[str, Any]:
        """The record of it: ranked data as every reader here takes it, with rewards, KL and what was left out."""
        return {
            "prompt": self.prompt.prompt,
            "responses": self.texts,
            "scores": self.scores,
            "sources": self.sources,
            "rewards": self.rewards,
            "kl": self.kl,
            "num_tokens": [len(ids) for ids in self.response_ids],
            "sampled": self.sampled,
            "left_out": self.left_out,
            "meta": {"prompt_index": self.prompt.index, "learned": learned},
        }


def answers_of(
    prompt: OnlinePrompt,
    candidates: Sequence[Candidate],
    own_source: str,
    rewards: Sequence[float | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_tokens: int,
) -> Answers:
    """Keep the responses that have a text and a reward, each once.

    A response of the policy's that was cut at its length gets no EOS: the policy did not end there.

    Args:
        prompt: with the provided responses to keep, which come first.
        candidates: the policy's own responses.
        own_source: what these are called.
        rewards: of the provided responses and the candidates, in this order.
        tokenizer: the policy's.
        template: how responses become text.
        max_tokens: longest prompt with response; a longer response loses its end.
    """
    texts = [*prompt.responses, *(candidate.text for candidate in candidates)]
    sources = [*prompt.sources, *[own_source] * len(candidates)]
    provided, eos = len(prompt.responses), int(tokenizer.eos_token_id)
    form = TEMPLATES[template]
    finished = [form.response(text).removesuffix(str(tokenizer.eos_token)) for text in texts]
    encoded = tokenizer(finished, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    left_out = [
        {"response": text, "source": source, "reason": "empty" if not usable.strip() else "not scored"}
        for text, source, usable, reward in zip(texts, sources, finished, rewards, strict=True)
        if reward is None or not usable.strip()
    ]
    places = [place for place, reward in enumerate(rewards) if reward is not None]
    known = [reward for reward in rewards if reward is not None]
    # The place stands in for the source, so that what stays can be told apart.
    group = RankedGroup("", [texts[i] for i in places], known, [str(i) for i in places])
    room = max_tokens - len(prompt.prompt_ids)
    kept = without_duplicates(group, [Encoded(finished[i], encoded[i]) for i in places], room, eos, Counts())
    stay = [int(item.source) for item in kept]

    def ids(place: int, own: array[int]) -> array[int]:
        was_cut = place >= provided and candidates[place - provided].finish_reason == "length"
        return own[:-1] if was_cut and len(own) > 1 and own[-1] == eos else own

    rewards_kept = [item.score for item in kept]
    return Answers(
        prompt=prompt,
        response_ids=[ids(place, item.ids) for place, item in zip(stay, kept, strict=True)],
        texts=[texts[place] for place in stay],
        sources=[sources[place] for place in stay],
        rewards=rewards_kept,
        sampled=[place >= provided for place in stay],
        left_out=left_out,
        kl=[None] * len(stay),
        scores=list(rewards_kept),
    )


def stand_in(prompt: OnlinePrompt, source: str, eos: int) -> TokenizedGroup:
    """A group for a micro-batch that has none of its own, because every process must run its forward and backward.

    It has an ordered pair, so that every objective gives it a finite loss, which then weighs nothing.
    """
    return TokenizedGroup(prompt.prompt_ids, [[eos], [eos, eos]], [1.0, 0.0], [source, source], STAND_IN)
