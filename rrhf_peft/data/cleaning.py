"""Which responses and groups stay: empty ones rejected, duplicates merged, groups without a pair dropped.

* A response of white space only, or one that yields no tokens, is empty and rejected.
* Two responses of a group with the same token ids, after truncation, are duplicates: the first stays.
  Equal scores stay as they are; different scores are a conflict, and their mean is taken.
* Under a ranking objective a group needs two responses whose scores differ by more than the gap.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rrhf_peft.records import RankedGroup, UserError


@dataclass
class Counts:
    """What happened on the way from ranked to tokenized groups; `DataReport` explains each."""

    groups_read: int = 0
    responses_read: int = 0
    pairs_read: int = 0
    tied_pairs_read: int = 0
    groups_dropped: Counter[str] = field(default_factory=Counter)
    responses_in_dropped_groups: int = 0
    empty_responses: int = 0
    duplicates_merged: Counter[str] = field(default_factory=Counter)
    conflicting_duplicates: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    empty_prompts: int = 0

    def read(self, group: RankedGroup) -> None:
        """Count a group as the file has it."""
        self.groups_read += 1
        self.responses_read += len(group.responses)
        self.pairs_read += math.comb(len(group.responses), 2)
        self.tied_pairs_read += sum(math.comb(count, 2) for count in Counter(group.known_scores).values())

    def dropped(self, reason: str, num_responses: int) -> None:
        """Count a group as dropped, with the responses that are lost with it."""
        self.groups_dropped[reason] += 1
        self.responses_in_dropped_groups += num_responses


@dataclass(frozen=True)
class Encoded:
    """A response before truncation: its templated text and its token ids without EOS."""

    text: str
    ids: list[int]

    @property
    def is_empty(self) -> bool:
        """No tokens, or nothing but white space."""
        return not self.ids or not self.text.strip()


@dataclass
class Kept:
    """A response that stays, cut to length, with the scores of all its duplicates."""

    ids: array[int]
    source: str
    scores: list[float]

    @property
    def score(self) -> float:
        if not self.is_conflict:
            return self.scores[0]
        return math.fsum(score / len(self.scores) for score in self.scores)  # divided first: no sum overflows

    @property
    def is_conflict(self) -> bool:
        return len(set(self.scores)) > 1


def without_duplicates(
    group: RankedGroup, responses: Sequence[Encoded], room: int, eos: int, counts: Counts
) -> list[Kept]:
    """The group's responses, EOS added and cut to `room` tokens, without empty ones and duplicates."""
    texts: set[str] = set()
    whole: set[bytes] = set()
    kept: dict[bytes, Kept] = {}
    for encoded, score, source in zip(responses, group.known_scores, group.sources, strict=True):
        if encoded.is_empty:
            counts.empty_responses += 1
            continue
        full = array("i", [*encoded.ids, eos])
        ids = full[:room]
        counts.responses_truncated += len(ids) < len(full)
        key = ids.tobytes()
        if key in kept:
            kept[key].scores.append(score)
            how = "equal_after_truncation"
            if encoded.text in texts:
                how = "equal_text"
            elif full.tobytes() in whole:
                how = "equal_tokens"
            counts.duplicates_merged[how] += 1
        else:
            kept[key] = Kept(ids, source, [score])
        texts.add(encoded.text)
        whole.add(full.tobytes())
    counts.conflicting_duplicates += sum(response.is_conflict for response in kept.values())
    return list(kept.values())


def why_dropped(scores: Sequence[float], needs_pairs: bool, min_score_gap: float) -> str | None:
    """The reason to drop a group whose remaining responses have these scores, or None to keep it."""
    if not scores:
        return "no_response"
    if needs_pairs and len(scores) == 1:
        return "single_response"
    if needs_pairs and not max(scores) - min(scores) > min_score_gap:
        return "no_ordered_pair"
    return None


def no_data_left(counts: Counts) -> UserError:
    """The error for a data set of which nothing stays: every reason that occurred, with its remedy."""
    if not counts.groups_read:
        return UserError("there are no groups to train on. Check data.train and data.max_groups.")
    explained = {
        "overlong_prompt": "have a prompt over the limit (raise it or data.max_tokens, or truncate)",
        "no_response": "have only empty responses (check the responses column)",
        "single_response": "have a single response left, so nothing to rank (objective sft can use them)",
        "no_ordered_pair": "have no two scores that differ by more than the gap (check the scores column)",
    }
    reasons = "; ".join(f"{count} {explained[reason]}" for reason, count in counts.groups_dropped.items())
    return UserError(f"no data is left: of {counts.groups_read} groups read, {reasons}.")
