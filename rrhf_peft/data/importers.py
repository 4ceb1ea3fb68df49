"""Rows into ranked groups: one small function for each public format, and how `auto` tells them apart.

To add a format: one function from `Row` to `RankedGroup`, one line in `IMPORTERS`, one test, and its name
in the recipe schema. Importers keep every response, order, score and tie as the file has it.

Left to others: reading files (`row_readers`, `places`), cleaning and tokenising (`tokenizing`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rrhf_peft.data.rows import Row
from rrhf_peft.records import Message, RankedGroup, UserError

_ASSISTANT = "\n\nAssistant:"


class Importer(NamedTuple):
    """A format: how one of its rows is read, and how its columns look.

    Attributes:
        read: One row into one group.
        columns: The sets of columns that it can read; further columns go to the group's `meta`.
        recognises: What `auto` asks beyond the columns.
    """

    read: Callable[[Row], RankedGroup]
    columns: tuple[tuple[str, ...], ...]
    recognises: Callable[[Row], bool] = lambda row: True


def ranked(row: Row) -> RankedGroup:
    """Our own: prompt, responses[], scores[], and sources[] where known."""
    return _scored(row, "prompt", "responses")


def rrhf(row: Row) -> RankedGroup:
    """query, responses[], scores[] or prompt, response[], scores[]."""
    return _scored(row, "query", "responses") if row.has("query") else _scored(row, "prompt", "response")


def preference(row: Row) -> RankedGroup:
    """TRL's prompt, chosen, rejected: text or chat messages; without a prompt, what the two have in common."""
    if isinstance(row.values.get("chosen"), list) or isinstance(row.values.get("rejected"), list):
        return _conversations(row)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if row.has("prompt"):
        return _pair(row, row.prompt("prompt"), chosen, rejected)
    start = _common_words(chosen, rejected)
    return _pair(row, chosen[:start], chosen[start:], rejected[start:])


def hh(row: Row) -> RankedGroup:
    """Anthropic HH: two full transcripts, split at the last "Assistant:", so that prompt + response is exact."""
    prompts, responses = zip(*(_split_transcript(row, name) for name in ("chosen", "rejected")), strict=True)
    return _pair(row, prompts[0], *responses) if prompts[0] == prompts[1] else _alone(row, prompts[0], responses[0])


def rm_static(row: Row) -> RankedGroup:
    """prompt, response, chosen, rejected; `response` repeats the chosen one for fine-tuning and has no score."""
    return _pair(row, row.prompt("prompt"), row.text("chosen"), row.text("rejected"))


def _are_transcripts(row: Row) -> bool:
    texts = [row.values[name] for name in ("chosen", "rejected")]
    return not row.has("prompt") and all(isinstance(text, str) and _ASSISTANT in text for text in texts)


#: Format name -> importer, in the order in which `auto` tries them.
IMPORTERS: dict[str, Importer] = {
    "ranked": Importer(ranked, (("prompt", "responses", "scores"),)),
    "rrhf": Importer(rrhf, (("query", "responses", "scores"), ("prompt", "response", "scores"))),
    "rm_static": Importer(rm_static, (("prompt", "response", "chosen", "rejected"),)),
    "hh": Importer(hh, (("chosen", "rejected"),), _are_transcripts),
    "preference": Importer(preference, (("prompt", "chosen", "rejected"), ("chosen", "rejected"))),
}


def importer_for(row: Row, format: str) -> Importer:
    """The importer of `format`; for ``auto`` the first one whose columns and look this row has.

    Raises:
        UserError: unknown format, or the columns do not fit; names the columns found and the nearest format.
    """
    if format == "auto":
        for importer in IMPORTERS.values():
            if _fits(row, importer) and importer.recognises(row):
                return importer
        nearest = max(IMPORTERS, key=lambda name: _likeness(row, name))
        raise row.problem(
            f"no format fits the columns {_listed(row.values)}. The nearest, {_what_is_missing(row, nearest)}"
        )
    check_format(format)
    if not _fits(row, IMPORTERS[format]):
        others = [name for name, other in IMPORTERS.items() if _fits(row, other) and other.recognises(row)]
        hint = f" They fit format {others[0]}." if others else ""
        raise row.problem(f"the columns are {_listed(row.values)}; {_what_is_missing(row, format)}{hint}")
    return IMPORTERS[format]


def check_format(format: str) -> None:
    """Raise `UserError` unless `format` is ``auto`` or the name of an importer."""
    known = ["auto", *IMPORTERS]
    if format not in known:
        nearest = difflib.get_close_matches(format, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known formats: {', '.join(known)}."
        raise UserError(f"format {format!r}: there is no such importer; {hint}")


def _scored(row: Row, prompt: str, responses: str) -> RankedGroup:
    texts = row.texts(responses)
    scores = row.scores("scores", len(texts))
    if row.has("sources"):
        sources = row.texts("sources")
        if len(sources) != len(texts):
            raise row.problem(
                f"sources has {len(sources)} entries for {len(texts)} responses. Name every response's source, or "
                "leave the column out."
            )
    else:
        sources = [f"response-{place}" for place in range(len(texts))]
    used = (prompt, responses, "scores", "sources")
    return RankedGroup(row.prompt(prompt), texts, scores, sources, row.meta(used))


def _pair(row: Row, prompt: str | list[Message], chosen: str, rejected: str) -> RankedGroup:
    meta = row.meta(("prompt", "chosen", "rejected"))
    return RankedGroup(prompt, [chosen, rejected], [1.0, 0.0], ["chosen", "rejected"], meta)


def _alone(row: Row, prompt: str | list[Message], chosen: str) -> RankedGroup:
    """Only the chosen response, where the rejected one answers another prompt and so is no comparison.

    Ranking objectives drop such a group, counted as a single response; fine-tuning keeps it.
    """
    return RankedGroup(prompt, [chosen], [1.0], ["chosen"], row.meta(("prompt", "chosen", "rejected")))


def _conversations(row: Row) -> RankedGroup:
    """A preference whose answers are message lists: alone, or with the conversation in front of them."""
    histories, answers = [], []
    for name in ("chosen", "rejected"):
        *history, last = row.messages(name)
        if last["role"] != "assistant":
            raise row.problem(f"{name} ends with a message of role {last['role']!r}. The last must be the assistant's.")
        histories.append(history)
        answers.append(last["content"])
    history = histories[0]
    prompt: str | list[Message] = history
    if row.has("prompt"):
        given = row.prompt("prompt")
        if isinstance(given, list):
            # Some data sets repeat the prompt in front of the answers, some do not.
            prompt = history if history[: len(given)] == given else [*given, *history]
        elif not history:
            prompt = given
    elif not history:
        raise row.problem("no prompt: chosen is a single message. Add a prompt column, or the messages before it.")
    return _pair(row, prompt, *answers) if histories[0] == histories[1] else _alone(row, prompt, answers[0])


def _split_transcript(row: Row, name: str) -> tuple[str, str]:
    text = row.text(name)
    prompt, marker, response = text.rpartition(_ASSISTANT)
    if not marker:
        raise row.problem(
            f'{name} has no "\\n\\nAssistant:" turn. Set data.format: preference if it is not a transcript.'
        )
    return prompt + marker, response


def _common_words(one: str, other: str) -> int:
    """Length of the common beginning without its last, perhaps split, word and the white space before that."""
    common = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    last_word = re.search(r"\s+\S*\Z", one[: min(len(one), len(other)) if common is None else common])
    return last_word.start() if last_word else 0


def _fits(row: Row, importer: Importer) -> bool:
    return any(all(name in row.values for name in columns) for columns in importer.columns)


def _likeness(row: Row, format: str) -> float:
    return max(_column_likeness(row, columns) for columns in IMPORTERS[format].columns)


def _column_likeness(row: Row, columns: tuple[str, ...]) -> float:
    """How far the row's columns resemble these, from 0 to 1."""
    best = [
        max((difflib.SequenceMatcher(None, name, found).ratio() for found in row.values), default=0.0)
        for name in columns
    ]
    return sum(best) / len(best)


def _what_is_missing(row: Row, format: str) -> str:
    """What the format needs and this row has not, with the nearest column for each."""
    columns = max(IMPORTERS[format].columns, key=lambda columns: _column_likeness(row, columns))
    missing = []
    for name in columns:
        if name not in row.values:
            unused = [found for found in row.values if found not in columns]
            nearest = difflib.get_close_matches(name, unused, n=1, cutoff=0.6)
            missing.append(name + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    return f"format {format}, needs {_listed(columns)} and misses {', '.join(missing)}. Rename the columns."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "(none)"
