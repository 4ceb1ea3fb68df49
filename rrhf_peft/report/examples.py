"""Side-by-side examples: the same prompts, the first response of each policy with its reward.

Prompts are taken at even distances through the list and responses by their place, so that nobody picks the
pretty ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rrhf_peft.evaluate.folder import EvaluationFolder
from rrhf_peft.plotting import Style
from rrhf_peft.report.blocks import Answer, Example
from rrhf_peft.report.numbers import number

#: Longer texts are cut, and say so.
_MOST_CHARACTERS = 3000
_NO_COLOR = Style("#888888", "o", "-")


def examples(evaluation: EvaluationFolder, look: Mapping[str, Style], *, wanted: int) -> list[Example]:
    """At most `wanted` prompts that every policy with a scored file answered, in the file's order."""
    if evaluation.headline is None:
        return []
    rows = {
        name: keyed
        for name in evaluation.policies
        if (keyed := _keyed(evaluation.scored_rows(name, evaluation.headline) or []))
    }
    if not rows:
        return []
    first, *others = rows.values()
    shared = [key for key in first if all(key in other for other in others)]
    wanted = min(wanted, len(shared))
    picked = [shared[place * len(shared) // wanted] for place in range(wanted)]
    return [
        Example(
            prompt=_messages(first[key]["prompt"]),
            answers=[
                Answer(
                    policy=name,
                    color=look.get(name, _NO_COLOR).color,
                    reward=number(own[key]["scores"][0], "+.2f"),
                    text=_cut(str(own[key]["responses"][0])),
                )
                for name, own in rows.items()
            ],
        )
        for key in picked
    ]


def _keyed(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by their prompt; a repeated one by how often it came before as well."""
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        text = json.dumps(row["prompt"], sort_keys=True)
        if row["responses"]:
            found[text, seen[text]] = row
        seen[text] += 1
    return found


def _messages(prompt: Any) -> list[tuple[str, str]]:
    """(role, text) of each message; a bare prompt has no role."""
    if isinstance(prompt, list):
        return [
            (str(message.get("role", "")), _cut(str(message.get("content", ""))))
            for message in prompt
            if isinstance(message, dict)
        ]
    return [("", _cut(str(prompt)))]


def _cut(text: str) -> str:
    left_out = len(text) - _MOST_CHARACTERS
    return text.strip() if left_out <= 0 else f"{text[:_MOST_CHARACTERS]} … ({left_out:,} more characters)"
