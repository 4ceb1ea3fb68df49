"""Data that is too large for memory: groups as text and as tokens in Arrow files, memory-mapped by all processes.

Each is written once, by the first process of a machine that asks for it, into the cache of `datasets` (HF_HOME,
HF_DATASETS_CACHE), under the fingerprint of all that it depends on; the others wait and map the same files.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from rrhf_peft.records import PER_RESPONSE, RankedGroup, TokenizedGroup, UserError

T = TypeVar("T")

#: Part of every fingerprint: raised when the same input gives other rows or tokens than before.
_VERSION = 1
#: Groups that are read or written at once.
_BATCH = 1000

_FIELDS = ("prompt", "responses", "scores", "sources", "columns", "origin", *PER_RESPONSE, "index")
_TOKENS = datasets.Features(
    prompt_ids=datasets.List(datasets.Value("int32")),
    response_ids=datasets.List(datasets.List(datasets.Value("int32"))),
    scores=datasets.List(datasets.Value("float64")),
    sources=datasets.List(datasets.Value("string")),
    index=datasets.Value("int64"),
)


class _Table(Sequence[T]):
    """Rows of a memory-mapped `datasets.Dataset`, made into objects when they are asked for."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    @abstractmethod
    def _objects(self, columns: dict[str, list[Any]]) -> list[T]: ...

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self._objects(self.rows[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._objects(self.rows[[index % len(self)]])[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _BATCH):
            yield from self._objects(self.rows[start : start + _BATCH])


class GroupTable(_Table[RankedGroup]):
    """Ranked groups; `fingerprint` tells them from all others."""

    def __init__(self, rows: datasets.Dataset, fingerprint: str) -> None:
        super().__init__(rows)
        self.fingerprint = fingerprint

    def _objects(self, columns: dict[str, list[Any]]) -> list[RankedGroup]:
        return read_rows(columns["group"])

    def select(self, indices: Sequence[int]) -> GroupTable:
        """These of the groups, in this order."""
        return GroupTable(self.rows.select(indices), fingerprint(self.fingerprint, hash_of(indices)))


class TokenTable(_Table[TokenizedGroup]):
    """Tokenized groups."""

    def _objects(self, columns: dict[str, list[Any]]) -> list[TokenizedGroup]:
        return [TokenizedGroup(*row) for row in zip(*(columns[name] for name in _TOKENS), strict=True)]

    def source_counts(self) -> Counter[str]:
        """How many responses each source has."""
        counts: Counter[str] = Counter()
        for chunk in self.rows.data.column("sources").chunks:
            counts.update({entry["values"]: entry["counts"] for entry in pc.value_counts(chunk.flatten()).to_pylist()})
        return counts


def read_rows(rows: Iterable[str]) -> list[RankedGroup]:
    """Groups from the form in which `stored_groups` writes them."""
    return [RankedGroup(**dict(zip(_FIELDS, json.loads(row), strict=True))) for row in rows]


def stored_groups(groups: Callable[[], Iterable[RankedGroup]], key: str) -> GroupTable:
    """What `groups` reads, from the cache; `key` is the fingerprint of all that it depends on.

    Raises:
        UserError: what reading raises; there is no room.
    """

    def write(folder: Path) -> None:
        schema = pa.schema({"group": pa.large_string()})
        rest = iter(groups())
        with pa.OSFile(str(folder / "groups.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while batch := list(islice(rest, _BATCH)):
                rows = [
                    json.dumps([getattr(group, name) for name in _FIELDS], ensure_ascii=False, default=str)
                    for group in batch
                ]
                writer.write_batch(pa.record_batch([pa.array(rows, pa.large_string())], schema=schema))

    folder = _stored(fingerprint("groups", key), write)
    return GroupTable(datasets.Dataset.from_file(str(folder / "groups.arrow")), fingerprint(key))


def stored_tokens(
    table: GroupTable,
    tokenize: Callable[[list[RankedGroup], int], tuple[list[TokenizedGroup], dict[str, Any]]],
    report: Callable[[TokenTable, list[dict[str, Any]]], dict[str, Any]],
    *,
    key: str,
    processes: int,
) -> tuple[TokenTable, dict[str, Any]]:
    """A table as tokens, with a report, from the cache; otherwise tokenized by several processes.

    Args:
        table: The groups.
        tokenize: Groups, and the index of the first one -> those that stay, and what was counted of all, for JSON.
        report: All that stayed, and all that was counted -> what is kept beside them as JSON.
        key: Fingerprint of what the tokens depend on besides the table.
        processes: How many tokenize at once.

    Raises:
        UserError: what the two functions raise; there is no room.
    """

    def write(folder: Path) -> None:
        counts = folder / "counts"
        counts.mkdir()
        map_batch = _Map(tokenize, counts)
        shards = min(processes, -(-len(table) // _BATCH))
        rows = table.rows.map(
            map_batch,
            with_indices=True,
            batched=True,
            batch_size=_BATCH,
            remove_columns=table.rows.column_names,
            features=_TOKENS,
            cache_file_name=str(folder / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint=fingerprint(table.fingerprint, key)[:32],
            num_proc=shards if shards > 1 else None,
            desc="tokenizing",
        )
        counted = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(counts.iterdir())]
        text = json.dumps(report(TokenTable(rows), counted))
        (folder / "report.json").write_text(text, encoding="utf-8")

    folder = _stored(fingerprint("tokens", table.fingerprint, key), write)
    files = sorted(folder.glob("tokens*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    return TokenTable(rows), json.loads((folder / "report.json").read_text(encoding="utf-8"))


class _Map:
    """What `Dataset.map` calls in each process: a batch's groups into the columns of `_TOKENS`."""

    def __init__(self, tokenize: Callable[..., Any], counts: Path) -> None:
        self.tokenize, self.counts = tokenize, counts

    def __call__(self, batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        groups, counted = self.tokenize(read_rows(batch["group"]), indices[0])
        (self.counts / f"{indices[0]:012}.json").write_text(json.dumps(counted), encoding="utf-8")
        columns = {name: [getattr(group, name) for group in groups] for name in _TOKENS}
        columns["prompt_ids"] = [list(ids) for ids in columns["prompt_ids"]]
        columns["response_ids"] = [[list(ids) for ids in group] for group in columns["response_ids"]]
        return columns


def fingerprint(*parts: Any) -> str:
    """Of anything that JSON can say, and of this module's version."""
    return hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True, default=str).encode()).hexdigest()


def hash_of(indices: Sequence[int]) -> str:
    """SHA-256 of whole numbers, in order."""
    return hashlib.sha256(array("q", indices).tobytes()).hexdigest()


def contents_hash(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _stored(key: str, write: Callable[[Path], None]) -> Path:
    """The cache's folder of this fingerprint, written by one process of all that want it, whole or not at all."""
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "rrhf_peft"
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as unfinished:
                        work = Path(unfinished) / "data"
                        work.mkdir()
                        write(work)
                        work.rename(folder)
    except OSError as error:
        raise UserError(
            f"{cache}: large data is kept there as Arrow files, which cannot be written ({error.strerror or error}). "
            "Make room, or set HF_DATASETS_CACHE to a folder on another disk."
        ) from error
    return folder
