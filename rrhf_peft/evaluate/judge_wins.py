"""Which of two responses a judge prefers, asked in both orders, because judges favour a position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrhf_peft.recipe.scoring import JudgeScorer
from rrhf_peft.score.judge import Judge, parse_ranks, ranking_messages

_LABELS = ("A", "B")


class PairJudge:
    """Compares pairs of responses with up to `concurrency` requests at a time.

    Args:
        section: the judge; its aspects are what it is told to consider, its scale is not used.
    """

    def __init__(self, section: JudgeScorer) -> None:
        self.judge = Judge(section, at="evaluation.wins.by")

    def compare(self, groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> list[dict[str, Any]]:
        """Compare (prompt, pairs of responses) groups.

        Returns:
            For each group `verdicts`: 1 where the first response of a pair wins in both orders, -1 where the
            second does, 0 for a tie, which is also a verdict that changes with the order; None where judging
            failed. `failures`: place of the pair, as text -> the reason.

        Raises:
            UserError: nothing is answered, or the budget is spent.
        """
        pairs = [(prompt, pair) for prompt, pairs in groups for pair in pairs]
        orders = [(prompt, order) for prompt, (one, two) in pairs for order in ((one, two), (two, one))]
        answers = self.judge.client.gather(lambda order: self._preferred(*order), orders)
        verdicts = iter(map(_verdict, answers[::2], answers[1::2]))
        rows = []
        for _, compared in groups:
            own = [next(verdicts) for _ in compared]
            failures = {str(place): verdict for place, verdict in enumerate(own) if isinstance(verdict, str)}
            kept = [None if isinstance(verdict, str) else verdict for verdict in own]
            rows.append({"verdicts": kept, "failures": failures})
        return rows

    def _preferred(self, prompt: str, pair: tuple[str, str]) -> int | str:
        """1 where the first is ranked better, -1 where the second is, 0 for equal ranks; or why there is no answer."""
        if pair[0] == pair[1]:
            return 0  # nothing to ask
        messages = ranking_messages(prompt, pair, _LABELS, self.judge.aspects, self.judge.section.instructions)
        ranks = self.judge.answer(messages, lambda reply: parse_ranks(reply, _LABELS))
        return ranks if isinstance(ranks, str) else (ranks[0] < ranks[1]) - (ranks[0] > ranks[1])


def _verdict(given: int | str, swapped: int | str) -> int | str:
    """Both orders together: a side wins where both say so."""
    for answer in (given, swapped):
        if isinstance(answer, str):
            return answer
    return given if given == -int(swapped) else 0
