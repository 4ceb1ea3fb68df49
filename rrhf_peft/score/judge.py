"""A judge behind an OpenAI-compatible endpoint: scores per aspect for each response, or ranks for a group.

A response whose judgement fails gets no score, never a made-up one: the failure is kept with its
reason. Every request, retry and token is counted.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rrhf_peft.records import UserError
from rrhf_peft.score.combining import share_beaten
from rrhf_peft.score.judge_client import JudgeClient, RequestFailedError
from rrhf_peft.score.judge_prompts import ranking_messages, scoring_messages
from rrhf_peft.score.judge_replies import BadReplyError, parse_aspects, parse_ranks
from rrhf_peft.score.labels import letter_label


@dataclass
class Judgement:
    """What became of one group.

    Attributes:
        scores: one per response, None where judging failed.
        aspects: aspect -> one score per response, None where judging failed; empty when ranking.
        failures: response index -> the reason.
    """

    scores: list[float | None]
    aspects: dict[str, list[float | None]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


class Judge:
    """Judges groups with up to `concurrency` requests at a time.

    Args:
        client: the endpoint.
        mode: score (a request per response) or rank (a request per group, responses shuffled).
        aspects: name -> what the judge is told about it.
        weights: name -> weight in the score; the score is the weighted mean.
        low: worst score of an aspect.
        high: best score of an aspect.
        instructions: further words to the judge.
        reply_attempts: how often a reply that breaks the form is asked for.
        concurrency: requests at a time.
        seed: of the shuffling; a group's order depends on it and the group's prompt alone.
    """

    def __init__(
        self,
        client: JudgeClient,
        *,
        mode: str,
        aspects: Mapping[str, str],
        weights: Mapping[str, float],
        low: float,
        high: float,
        instructions: str | None,
        reply_attempts: int,
        concurrency: int,
        seed: int,
    ) -> None:
        self.client, self.mode, self.seed = client, mode, seed
        self.aspects, self.weights, self.low, self.high = dict(aspects), dict(weights), low, high
        self.instructions, self.reply_attempts, self.concurrency = instructions, reply_attempts, concurrency
        self.bad_replies: dict[str, int] = {}
        self._lock = threading.Lock()

    def judge(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[Judgement]:
        """Judge (prompt, responses) groups.

        Raises:
            UserError: the endpoint refuses every request, or nothing reached it, or the budget is spent.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                if self.mode == "rank":
                    judged = list(pool.map(lambda group: self._rank(*group), groups))
                else:
                    places = [(prompt, text) for prompt, texts in groups for text in texts]
                    replies = iter(list(pool.map(lambda place: self._aspects(*place), places)))
                    judged = [self._judgement([next(replies) for _ in texts]) for _, texts in groups]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        reasons = [reason for judgement in judged for reason in judgement.failures.values()]
        responses = sum(len(texts) for _, texts in groups)
        if (
            responses
            and len(reasons) == responses
            and all(reason.startswith(RequestFailedError.PREFIX) for reason in reasons)
        ):
            raise UserError(
                f"{self.client.base_url}: not one of {responses} requests in a row was answered ({reasons[0]}). What "
                "was finished before is kept: see to the endpoint and run the same command again."
            )
        return judged

    def _aspects(self, prompt: str, response: str) -> dict[str, float] | str:
        """The aspects of one response, or why there are none."""
        messages = scoring_messages(prompt, response, self.aspects, self.low, self.high, self.instructions)
        reason = ""
        for _ in range(self.reply_attempts):
            try:
                return parse_aspects(self.client.ask(messages), list(self.aspects), self.low, self.high)
            except RequestFailedError as error:
                return str(error)
            except BadReplyError as error:
                reason = self._bad(error)
        return reason

    def _judgement(self, replies: Sequence[dict[str, float] | str]) -> Judgement:
        total = math.fsum(self.weights.values())
        good = [reply if isinstance(reply, dict) else None for reply in replies]
        return Judgement(
            scores=[
                None if own is None else math.fsum(self.weights[name] * own[name] for name in self.aspects) / total
                for own in good
            ],
            aspects={name: [None if own is None else own[name] for own in good] for name in self.aspects},
            failures={place: reply for place, reply in enumerate(replies) if isinstance(reply, str)},
        )

    def _rank(self, prompt: str, responses: Sequence[str]) -> Judgement:
        """Rank one group; its scores are the share of the others that a response beats."""
        order = list(range(len(responses)))
        random.Random(f"{self.seed} {prompt}").shuffle(order)
        labels = [letter_label(place) for place in range(len(order))]
        shuffled = [responses[index] for index in order]
        messages = ranking_messages(prompt, shuffled, labels, self.aspects, self.instructions)
        reason = ""
        for _ in range(self.reply_attempts):
            try:
                ranks = parse_ranks(self.client.ask(messages), labels)
            except RequestFailedError as error:
                reason = str(error)
                break
            except BadReplyError as error:
                reason = self._bad(error)
            else:
                worth: list[float | None] = [0.0] * len(order)
                for index, rank in zip(order, ranks, strict=True):
                    worth[index] = -float(rank)
                return Judgement(share_beaten(worth))
        return Judgement([None] * len(responses), failures=dict.fromkeys(range(len(responses)), reason))

    def _bad(self, error: BadReplyError) -> str:
        with self._lock:
            self.bad_replies[str(error)] = self.bad_replies.get(str(error), 0) + 1
        return f"bad reply: {error}"
