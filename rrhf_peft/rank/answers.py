"""What annotators were given and what they answered, in one SQLite file that a kill does not damage.

Every answer is one transaction in WAL mode, on the disk when `save` returns. Who gets which group is decided when it
is asked for: the shared groups go to everyone, the others to `per_group` people each, in an order of everyone's own.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rrhf_peft.records import UserError
from rrhf_peft.score.people import Ranks

State = Literal["open", "ranked", "skipped"]

#: Raised with every change of the tables.
_VERSION = 1
_TABLES = """
CREATE TABLE links (name TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, annotator TEXT NOT NULL REFERENCES links, number INTEGER NOT NULL, state TEXT NOT NULL,
    ranks TEXT NOT NULL DEFAULT 'null', note TEXT NOT NULL DEFAULT '', changed REAL NOT NULL,
    UNIQUE (annotator, number)
);
"""
#: A group that somebody opened and left is given to another after this long.
_SECONDS_OPEN = 3600.0
#: The name of the overview's link; annotators' names are never empty.
OVERVIEW = ""


@dataclass(frozen=True)
class Answer:
    """One annotator's answer to one group.

    Attributes:
        number: of the group.
        state: open, ranked or skipped.
        ranks: for each response in the order of the data, 1 is best and equal ranks are ties; None where there is none
            yet, and in place of the list where nothing was ranked.
        note: the annotator's words.
        before, after: the groups that this annotator had before and after it; None at the ends.
    """

    number: int
    state: State
    ranks: list[int | None] | None
    note: str
    before: int | None
    after: int | None


class Answers:
    """The file of answers; for one thread."""

    def __init__(self, path: Path) -> None:
        """Open or begin the file.

        Raises:
            UserError: it is not such a file, is from a newer version, or cannot be opened.
        """
        self._path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)  # every statement is a transaction
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # on the disk, also through a power cut
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used ({error}). Restore it, or name another --output.") from None
        if version > _VERSION:
            raise UserError(f"{path}: was written by a newer rrhf-peft. Update it, or name another --output.")

    def close(self) -> None:
        """Everything into the one file."""
        self._connection.close()

    @property
    def changes(self) -> int:
        """A number that rises with every change."""
        return self._connection.total_changes

    def links(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Annotator (or `OVERVIEW`) -> the secret of the link, the same after a restart; those of `names` are made."""
        for name in names:
            self._connection.execute("INSERT OR IGNORE INTO links VALUES (?, ?)", (name, secrets.token_urlsafe(24)))
        return dict(self._connection.execute("SELECT name, token FROM links ORDER BY rowid"))

    def next_group(self, annotator: str, count: int, shared: int, per_group: int) -> tuple[int | None, int]:
        """(the group to show now, how many groups this annotator has in all as things stand).

        The group is the one left open, else a new one; None when nothing is left.

        Args:
            annotator: whose.
            count: how many groups there are.
            shared: so many of them go to everyone.
            per_group: people for each of the others.
        """
        now = time.time()
        mine = dict(self._connection.execute("SELECT number, state FROM answers WHERE annotator = ?", (annotator,)))
        taken = dict(
            self._connection.execute(
                "SELECT number, COUNT(*) FROM answers WHERE annotator != ? AND (state = 'ranked' OR state = 'open' "
                "AND changed > ?) GROUP BY number",
                (annotator, now - _SECONDS_OPEN),
            )
        )
        everyones = shared_groups(count, shared)
        people = len(self.links()) - 1
        share = -(-(count - len(everyones)) * per_group // people)  # of the other groups, rounded up
        share -= sum(number not in everyones and state != "skipped" for number, state in mine.items())
        new = []
        for number in random.Random(annotator).sample(range(count), count):
            if number not in mine and (number in everyones or (share > 0 and taken.get(number, 0) < per_group)):
                new.append(number)
                share -= number not in everyones
        total = len(mine) + len(new)
        left_open = [number for number, state in mine.items() if state == "open"]
        if left_open or not new:
            return (left_open[0] if left_open else None), total
        self._connection.execute(
            "INSERT INTO answers (annotator, number, state, changed) VALUES (?, ?, 'open', ?)", (annotator, new[0], now)
        )
        return new[0], total

    def get(self, annotator: str, number: int) -> Answer | None:
        """The answer to a group that this annotator was given; None for any other group."""
        row = self._connection.execute(
            "SELECT id, state, ranks, note FROM answers WHERE annotator = ? AND number = ?", (annotator, number)
        ).fetchone()
        if row is None:
            return None
        key, state, ranks, note = row
        neighbours = [
            self._connection.execute(
                f"SELECT number FROM answers WHERE annotator = ? AND id {which} ? ORDER BY id {order} LIMIT 1",
                (annotator, key),
            ).fetchone()
            for which, order in (("<", "DESC"), (">", "ASC"))
        ]
        before, after = (neighbour[0] if neighbour else None for neighbour in neighbours)
        return Answer(number, state, json.loads(ranks), note, before, after)

    def newest(self, annotator: str) -> int | None:
        """The group that this annotator was given last."""
        row = self._connection.execute(
            "SELECT number FROM answers WHERE annotator = ? ORDER BY id DESC LIMIT 1", (annotator,)
        ).fetchone()
        return row[0] if row else None

    def save(self, annotator: str, number: int, state: State, ranks: Sequence[int | None] | None, note: str) -> None:
        """Keep an answer to a group that this annotator was given; it is on the disk afterwards."""
        self._connection.execute(
            "UPDATE answers SET state = ?, ranks = ?, note = ?, changed = ? WHERE annotator = ? AND number = ?",
            (state, json.dumps(ranks), note, time.time(), annotator, number),
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Annotator -> how many groups are ranked, skipped, open."""
        counts = {name: {"ranked": 0, "skipped": 0, "open": 0} for name in self.links() if name != OVERVIEW}
        for name, state, count in self._connection.execute(
            "SELECT annotator, state, COUNT(*) FROM answers GROUP BY annotator, state"
        ):
            counts[name][state] = count
        return counts

    def ranks(self) -> dict[str, Ranks]:
        """Annotator -> group -> response -> rank, of what is ranked."""
        ranks: dict[str, Ranks] = {name: {} for name in self.counts()}
        for name, number, values in self._connection.execute(
            "SELECT annotator, number, ranks FROM answers WHERE state = 'ranked' ORDER BY number"
        ):
            ranks[name][number] = {index: float(rank) for index, rank in enumerate(json.loads(values))}
        return ranks

    def notes(self) -> dict[tuple[str, int], tuple[State, str]]:
        """(annotator, group) -> (state, note), of what is ranked or skipped."""
        rows = self._connection.execute("SELECT annotator, number, state, note FROM answers WHERE state != 'open'")
        return {(name, number): (state, note) for name, number, state, note in rows}


def shared_groups(count: int, shared: int) -> set[int]:
    """Those of `count` groups that everyone ranks, drawn once for all."""
    return set(random.Random(0).sample(range(count), min(shared, count)))
