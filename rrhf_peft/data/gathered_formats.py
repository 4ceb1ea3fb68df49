"""Formats that spread a group over several rows: the rows of a file are gathered by what they answer.

Each function is named after its format; its docstring says where the layout comes from. A file is read whole
before its first group, in the order of the groups' first rows, whose place is the groups' origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rrhf_peft.data.rated_groups import numbered_sources, rated_group, score_of_rank
from rrhf_peft.data.rows import Row
from rrhf_peft.records import Message, RankedGroup

_HELPSTEER_ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_OASST_ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}


def helpsteer2(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """nvidia/HelpSteer2 (and HelpSteer): a response per row, rated 0 to 4 in five aspects; gathered by prompt.

    The score is helpfulness. All five ratings stay in ``meta["ratings"]``, one entry for each row.
    """
    for own in _gathered(rows, lambda row: row.text("prompt")):
        ratings = [{aspect: row.rating(aspect) for aspect in _HELPSTEER_ASPECTS} for row in own]
        yield rated_group(
            own[0].text("prompt"),
            [row.text("response") for row in own],
            [rating["helpfulness"] for rating in ratings],
            numbered_sources(len(own)),
            {**own[0].meta(own[0].values), "ratings": ratings},
        )


def shp(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """stanfordnlp/SHP: two comments per row, with their votes; gathered by post_id, each comment once.

    The score is score_A or score_B, the comment's votes. `labels` (1: A is preferred) must agree with it. SHP
    itself only pairs a comment with later ones that have fewer votes; votes also order the other pairs.
    """
    for own in _gathered(rows, lambda row: row.text("post_id")):
        comments: dict[tuple[str, str, float], None] = {}
        for row in own:
            votes = {side: row.number(f"score_{side}") for side in "AB"}
            if votes["A"] != votes["B"] and (votes["A"] > votes["B"]) != (row.number("labels") == 1):
                raise row.problem(
                    "labels contradicts score_A and score_B (it is 1 where A is preferred). Mend or remove that row."
                )
            for side in "AB":
                text = row.text(f"human_ref_{side}")
                name = f"c_root_id_{side}"
                comments[row.text(name) if row.has(name) else text, text, votes[side]] = None
        meta = own[0].meta(name for name in own[0].values if name not in ("post_id", "domain"))
        yield RankedGroup(
            own[0].text("history"),
            [text for _, text, _ in comments],
            [votes for _, _, votes in comments],
            ["human"] * len(comments),
            {**meta, "comments": [name for name, _, _ in comments]},
        )


def stack_exchange_paired(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """lvwerra/stack-exchange-paired: response_j is better than response_k; gathered by qid, or else question.

    The pairs of a question become one group where scores can say exactly what they say: pairs that are
    compared neither directly nor through others are ties. Where they cannot, each response that is better than
    others makes a group with those, which among themselves are ties; so no order is made up and none is lost.
    """
    for own in _gathered(rows, lambda row: str(row.values["qid"]) if row.has("qid") else row.text("question")):
        worse: dict[str, dict[str, None]] = {}
        for row in own:
            better, other = row.text("response_j"), row.text("response_k")
            worse.setdefault(better, {})
            worse.setdefault(other, {})
            if better != other:
                worse[better][other] = None
        meta = own[0].meta(("question", "response_j", "response_k"))
        prompt, levels = own[0].text("question"), _levels(worse)
        orders = [levels] if levels else [{one: 1, **dict.fromkeys(worse[one], 0)} for one in worse if worse[one]]
        for order in orders:
            scores = [float(level) for level in order.values()]
            yield RankedGroup(prompt, list(order), scores, ["human"] * len(order), meta)


def oasst_trees(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """OpenAssistant's message trees: prompt.replies[].replies[] ..., with rank 0 the best of its siblings.

    Each message that has ranked replies of the assistant is a group; its prompt is the path to it. Sources are
    "human", or the model's name for synthetic messages. Deleted replies are left out, those without a rank are
    unrated, and messages none of whose replies has a rank, such as those with a single one, make no group.
    """
    for row in rows:
        meta = row.meta(("prompt",))
        pending: list[tuple[list[Message], Row]] = [([], row.object("prompt"))]
        while pending:
            path, node = pending.pop()
            path = [*path, _oasst_message(node)]
            replies = node.objects("replies") if node.has("replies") else []
            yield from _oasst_group(path, replies, {**meta, "message_id": node.values.get("message_id")})
            pending += [(path, reply) for reply in reversed(replies)]


def oasst_messages(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """OpenAssistant/oasst1 and oasst2 as flat messages, which name their parent_id; otherwise like the trees."""
    messages = {row.text("message_id"): row for row in rows}
    replies: dict[str, list[Row]] = {}
    for row in messages.values():
        if row.has("parent_id"):
            parent = row.text("parent_id")
            if parent not in messages:
                raise row.problem(f"parent_id {parent!r} is no message of this file. Read the trees' file instead.")
            replies.setdefault(parent, []).append(row)
    for parent, own in replies.items():
        path: list[Message] = []
        node: Row | None = messages[parent]
        for _ in messages:
            if node is None:
                break
            path.insert(0, _oasst_message(node))
            node = messages[node.text("parent_id")] if node.has("parent_id") else None
        meta = messages[parent].meta(name for name in messages[parent].values if name != "message_tree_id")
        yield from _oasst_group(path, own, {**meta, "message_id": parent})


def _gathered(rows: Iterable[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    """The rows of each key, keys in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _levels(worse: dict[str, dict[str, None]]) -> dict[str, int] | None:
    """Scores that order exactly the pairs which `worse` orders, directly or through others; None if none can.

    Of every response `worse` holds those it is better than. In an order that scores can express, a response
    is better than exactly those on lower levels, so what is better than more is higher.
    """
    below = {one: _reachable(worse, one) for one in worse}
    sizes = sorted({len(own) for own in below.values()})
    levels = {one: sizes.index(len(own)) for one, own in below.items()}
    exact = all(below[one] == {other for other in worse if levels[other] < levels[one]} for one in worse)
    return levels if exact else None


def _reachable(worse: dict[str, dict[str, None]], start: str) -> set[str]:
    found: set[str] = set()
    pending = [start]
    while pending:
        new = worse[pending.pop()].keys() - found
        found |= new
        pending += new
    return found


def _oasst_message(node: Row) -> Message:
    role = node.text("role")
    if role not in _OASST_ROLES:
        raise node.problem(f"{node.prefix}role is {role!r}, not prompter or assistant. Mend or remove that message.")
    return {"role": _OASST_ROLES[role], "content": node.text("text")}


def _oasst_group(path: list[Message], replies: list[Row], meta: dict[str, Any]) -> Iterator[RankedGroup]:
    answers = [reply for reply in replies if reply.text("role") == "assistant" and not reply.values.get("deleted")]
    scores = [score_of_rank(reply.rating("rank")) for reply in answers]
    if any(score is not None for score in scores):
        sources = [
            reply.text("model_name") if reply.values.get("synthetic") and reply.has("model_name") else "human"
            for reply in answers
        ]
        yield rated_group(path, [reply.text("text") for reply in answers], scores, sources, meta)
