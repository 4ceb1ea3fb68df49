"""Let people rank candidates in a browser.

    candidates --> groups.jsonl --pages--> answers.sqlite --> ranks-NAME.jsonl, score.yaml, argilla.json, ...

The folder keeps everything: given again, the same command goes on where it was, with the same links. What is ranked
never changes under the annotators; other candidates are another ranking.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_peft.files import begun_folder, check_output, lock, read_mark, replace_text
from rrhf_peft.rank.answers import OVERVIEW, Answers
from rrhf_peft.rank.results import GROUPS, figures, write_results
from rrhf_peft.records import PER_RESPONSE, RankedGroup, UserError
from rrhf_peft.score.combine import read_candidates

ANSWERS = "answers.sqlite"
#: More responses than letters are not ranked by anybody at a time.
MOST_RESPONSES = 26


@dataclass(frozen=True)
class Ranking:
    """A ranking that is served, or was.

    Attributes:
        folder: with the answers and the files made of them.
        groups: how many groups are ranked.
        left_out: groups that are not: with fewer than two responses, or without those that are compared.
        links: annotator -> address of the page; empty where nothing is served.
        overview: address of the overview.
        figures: as the overview shows them (`results.figures`).
        files: what was written from the answers, by name.
    """

    folder: Path
    groups: int
    left_out: int
    links: dict[str, str]
    overview: str | None
    figures: dict[str, Any]
    files: list[str]


def rank_candidates(
    candidates: Sequence[str],
    folder: Path,
    *,
    annotators: Sequence[str] = (),
    compare: tuple[str, str] | None = None,
    shared: int = 30,
    per_group: int = 1,
    guidelines: Path | None = None,
    port: int | None = 8642,
    on_ready: Callable[[Ranking], None] = lambda ranking: None,
    **reading: Any,
) -> Ranking:
    """Serve the pages until interrupted, then write the results.

    Args:
        candidates: files, folders or hub ids, as scoring reads them.
        folder: of the ranking; begun or continued.
        annotators: names; those of earlier runs keep their links.
        compare: two sources (or names of files without suffix): one response of each is compared, prompt by prompt.
        shared: so many groups are ranked by everyone, for agreement.
        per_group: people for each of the others.
        guidelines: a Markdown file for the annotators.
        port: on this machine; 0 is any free one, None serves nothing and only writes the results.
        on_ready: called when the pages can be opened.
        reading: format, split and max_groups of `read_candidates`.

    Raises:
        UserError: nothing to rank, another ranking in the folder, a name that cannot be a file's, a port in use.
    """
    pages, serve = _web()
    for name in annotators:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,39}", name, flags=re.ASCII):
            raise UserError(f"--annotator {name!r}: names are 1 to 40 letters, digits, points, dashes or underscores.")
    read = read_candidates(list(candidates), **reading)
    groups = pairs_of(read, *compare) if compare is not None else [group for group in read if len(group.responses) > 1]
    if not groups:
        raise UserError(f"{', '.join(candidates)}: no group has two responses to rank. Sample more for each prompt.")
    for group in groups:
        if len(group.responses) > MOST_RESPONSES:
            raise UserError(
                f"{group.where}: has {len(group.responses)} responses, and people rank at most {MOST_RESPONSES} at a "
                "time. Sample fewer, or leave some out."
            )
    text = _text_of(guidelines)
    if port is None and not (folder / ANSWERS).exists():
        raise UserError(f"--export: {folder} holds no answers. Name the --output of the ranking.")
    sockets = contextlib.nullcontext() if port is None else _listening(port)
    with sockets as listening, lock(folder), _opened(folder, groups, candidates) as answers:

        def facts() -> Callable[[], dict[str, Any]]:
            counts, ranks = answers.counts(), answers.ranks()
            return lambda: figures(groups, counts, ranks, shared, compare)

        def ranking(address: str | None, files: list[str]) -> Ranking:
            links = {name: f"{address}/{secret}/" for name, secret in answers.links().items()} if address else {}
            overview = links.pop(OVERVIEW, None)
            return Ranking(folder, len(groups), len(read) - len(groups), links, overview, facts()(), files)

        def export() -> list[str]:
            return write_results(folder, groups, answers, shared, compare)

        if listening is not None:
            answers.links([OVERVIEW, *(annotators or ([] if len(answers.links()) > 1 else ["me"]))])
            app = pages(groups, answers, shared, per_group, guidelines=text, figures=facts, export=export).app
            on_ready(ranking(f"http://127.0.0.1:{listening.getsockname()[1]}", []))
            with contextlib.suppress(KeyboardInterrupt):  # which ends the ranking as it should
                serve(app, listening)
        return ranking(None, export())


def pairs_of(groups: Sequence[RankedGroup], a: str, b: str) -> list[RankedGroup]:
    """For each prompt that both answered, the first response of `a` and the first of `b`, in this order.

    Raises:
        UserError: one of them wrote nothing here, or they never answered the same prompt.
    """
    firsts: dict[str, dict[str, tuple[RankedGroup, int]]] = {}
    for group in groups:
        for index, source in enumerate(group.sources):
            for name in {source, Path(str(group.origin.get("file", ""))).stem} & {a, b}:
                firsts.setdefault(json.dumps(group.prompt), {}).setdefault(name, (group, index))
    for name in (a, b):
        if not any(name in first for first in firsts.values()):
            names = sorted({source for group in groups for source in group.sources})
            raise UserError(
                f"--compare: nothing here is by {name!r}. There are the sources {', '.join(names[:20])}; a file's name "
                "without its suffix stands for all that is in it."
            )
    both = [(first[a], first[b]) for first in firsts.values() if a in first and b in first]
    if a == b or not both:
        raise UserError(f"--compare: no prompt has a response of {a!r} and another one of {b!r}. Name two others.")
    return [_pair(*pair, (a, b), index) for index, pair in enumerate(both)]


def _pair(
    first: tuple[RankedGroup, int], second: tuple[RankedGroup, int], names: tuple[str, str], index: int
) -> RankedGroup:
    values: dict[str, Any] = {
        name: [getattr(group, name)[number] for group, number in (first, second)]
        for name in ("responses", "scores", *PER_RESPONSE)
    }
    (group, _), other = first, second[0].columns["raw_scores"]
    raw = {
        name: [scores[first[1]], other[name][second[1]]]
        for name, scores in group.columns["raw_scores"].items()
        if name in other
    }
    columns = {**group.columns, "raw_scores": raw}
    return RankedGroup(group.prompt, sources=names, columns=columns, origin=group.origin, index=index, **values)


@contextlib.contextmanager
def _opened(folder: Path, groups: Sequence[RankedGroup], candidates: Sequence[str]) -> Iterator[Answers]:
    """The folder's answers; the caller holds its lock.

    Raises:
        UserError: the folder holds something else, or a ranking of other groups.
    """
    check_output(folder, key="--output", folder=True, reads=candidates, continues=True)
    mark = read_mark(folder) if folder.is_dir() else None
    if folder.is_dir() and any(folder.iterdir()) and (mark is None or mark.verb != "rank"):
        raise UserError(f"--output: {folder} is no folder of rrhf-peft rank. Name another.")
    rows = [{**group.row(), **group.columns} for group in groups]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    kept = folder / GROUPS
    if kept.exists() and kept.read_bytes() != content.encode("utf-8", "backslashreplace"):
        raise UserError(
            f"{kept}: the answers in {folder} are to other groups than these. Give the same candidates and options to "
            "go on, or name another --output."
        )
    if (folder / ANSWERS).exists():
        Answers(folder / ANSWERS).close()  # damage is told before anything is written
    with begun_folder(folder, verb="rank", writes=["*"], resume=True) as begun:
        if not kept.exists():
            replace_text(kept, content)
        begun.keep()
        answers = Answers(folder / ANSWERS)
        try:
            yield answers
        finally:
            answers.close()


def _text_of(guidelines: Path | None) -> str:
    try:
        return guidelines.read_text(encoding="utf-8") if guidelines is not None else ""
    except OSError as error:
        raise UserError(f"--guidelines: {guidelines} cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"--guidelines: {guidelines} is not UTF-8 text. Save it as UTF-8.") from None


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen(128)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port {port}: cannot be listened on ({reason}). Give another one.") from None
        yield listening


def _web() -> tuple[Any, Callable[[Any, socket.socket], None]]:
    """The pages' application, and what serves it until it is interrupted."""
    try:
        import uvicorn

        from rrhf_peft.rank.server import Pages
    except ModuleNotFoundError as error:
        raise UserError(
            f"the ranking page needs a package that is not installed ({error.name}): pip install 'rrhf-peft[rank]'."
        ) from None

    def serve(app: Any, listening: socket.socket) -> None:
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                                ws="none", http="h11", timeout_graceful_shutdown=2)  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])

    return Pages, serve
