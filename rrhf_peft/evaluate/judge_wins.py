"""Which of two responses a judge prefers, asked in both orders, because judges favour a position."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rrhf_peft.recipe.scoring import JudgeScorer
from rrhf_peft.records import UserError
from rrhf_peft.score.judge_client import JudgeClient, RequestFailedError
from rrhf_peft.score.judge_prompts import ASPECTS, ranking_messages
from rrhf_peft.score.judge_replies import BadReplyError, parse_ranks

_LABELS = ("A", "B")


class PairJudge:
    """Compares pairs of responses with up to `concurrency` requests at a time.

    Args:
        section: the judge; its aspects are what it is told to consider, its scale is not used.
    """

    def __init__(self, section: JudgeScorer) -> None:
        self.client = JudgeClient(
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
        self.aspects = {name: section.aspect_meanings.get(name) or ASPECTS[name] for name in section.aspects}
        self.instructions, self.reply_attempts = section.instructions, section.reply_attempts
        self.concurrency = section.concurrency

    def compare(self, groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> list[dict[str, Any]]:
        """Compare (prompt, pairs of responses) groups.

        Returns:
            For each group `verdicts`: 1 where the first response of a pair wins in both orders, -1 where the
            second does, 0 for a tie, which is also a verdict that changes with the order; None where judging
            failed. `failures`: place of the pair, as text -> the reason.

        Raises:
            UserError: the endpoint refuses every request, or nothing reached it, or the budget is spent.
        """
        places = [(prompt, pair) for prompt, pairs in groups for pair in pairs]
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                orders = [(prompt, order) for prompt, (one, two) in places for order in ((one, two), (two, one))]
                answers = list(pool.map(lambda order: self._preferred(order[0], order[1]), orders))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        reasons = [own for own in answers if isinstance(own, str)]
        if (
            reasons
            and len(reasons) == sum(one != two for _, (one, two) in orders)
            and all(own.startswith(RequestFailedError.PREFIX) for own in reasons)
        ):
            raise UserError(
                f"{self.client.base_url}: not one of {len(reasons)} requests in a row was answered ({reasons[0]}). "
                "What was finished before is kept: see to the endpoint and run the same command again."
            )
        verdicts = iter(map(_verdict, answers[::2], answers[1::2]))
        rows = []
        for _, pairs in groups:
            own = [next(verdicts) for _ in pairs]
            failures = {str(place): verdict for place, verdict in enumerate(own) if isinstance(verdict, str)}
            kept = [None if isinstance(verdict, str) else verdict for verdict in own]
            rows.append({"verdicts": kept, "failures": failures})
        return rows

    def _preferred(self, prompt: str, pair: tuple[str, str]) -> int | str:
        """1 where the first is ranked better, -1 where the second is, 0 for equal ranks; or why there is no answer."""
        if pair[0] == pair[1]:
            return 0  # nothing to ask
        messages = ranking_messages(prompt, pair, _LABELS, self.aspects, self.instructions)
        reason = ""
        for _ in range(self.reply_attempts):
            try:
                first, second = parse_ranks(self.client.ask(messages), _LABELS)
            except RequestFailedError as error:
                return str(error)
            except BadReplyError as error:
                reason = f"bad reply: {error}"
            else:
                return (first < second) - (first > second)
        return reason


def _verdict(given: int | str, swapped: int | str) -> int | str:
    """Both orders together: a side wins where both say so."""
    for answer in (given, swapped):
        if isinstance(answer, str):
            return answer
    return given if given == -int(swapped) else 0
