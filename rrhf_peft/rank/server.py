"""The pages' server: one process, one thread, on this machine only.

Every address begins with a secret, /SECRET/..., which says who asks; without it there is nothing to see. A request
must name this machine as its host and, where it changes something, come from a page of this server. Pages may load
nothing but what this server sends. Responses reach the browser as Markdown turned into HTML by a parser that passes no
markup through and loads no images.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rrhf_peft.data import chat_messages
from rrhf_peft.rank.answers import OVERVIEW, Answer, Answers
from rrhf_peft.records import RankedGroup
from rrhf_peft.score.judge import letter_label

#: Below the secret -> media type; nothing is page.html.
FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HOSTS = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
#: Characters of a note, and bytes of a request.
_LONGEST_NOTE, _LARGEST_REQUEST = 4000, 2**16

_markdown = MarkdownIt("js-default", {"html": False, "linkify": False, "breaks": True}).disable("image")


class Pages:
    """The application: an annotator's page, and the overview.

    Args:
        groups: what is ranked.
        answers: where answers go.
        shared, per_group: as in `Answers.next_group`.
        guidelines: Markdown for the annotators.
        figures: gives what computes the overview from the answers so far: slow, so it runs beside this thread.
        export: writes the files, and returns their names.
    """

    def __init__(
        self,
        groups: Sequence[RankedGroup],
        answers: Answers,
        shared: int,
        per_group: int,
        *,
        guidelines: str,
        figures: Callable[[], Callable[[], dict[str, Any]]],
        export: Callable[[], list[str]],
    ) -> None:
        self.groups, self.answers = groups, answers
        self.shared, self.per_group = shared, per_group
        self.guidelines = markdown(guidelines)
        self.figures, self.export = figures, export
        self.computed: tuple[int, dict[str, Any]] | None = None
        routes = [
            Route("/{secret}/task", self.task),
            Route("/{secret}/answer", self.answer, methods=["POST"]),
            Route("/{secret}/overview", self.overview),
            Route("/{secret}/export", self.write, methods=["POST"]),
            Route("/{secret}/{file:path}", self.file),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
            exception_handlers={sqlite3.Error: _not_kept},
        )

    async def file(self, request: Request) -> Response:
        self._who(request)
        name = request.path_params["file"]
        if name not in FILES:
            raise HTTPException(404)
        return Response(Path(__file__).with_name(name or "page.html").read_bytes(), media_type=FILES[name])

    async def task(self, request: Request) -> JSONResponse:
        """The next group, or the one that is asked for, with what this annotator answered so far."""
        name = self._annotator(request)
        if name is None:
            return JSONResponse({"overview": True})
        number, total = self.answers.next_group(name, len(self.groups), self.shared, self.per_group)
        progress = {"name": name, "guidelines": self.guidelines, "total": total, **self.answers.counts()[name]}
        wanted = request.query_params.get("group", "")
        if wanted:
            number = int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 else -1
        if number is None:
            return JSONResponse({**progress, "finished": True, "before": self.answers.newest(name)})
        answer = self.answers.get(name, number)
        if answer is None:
            raise HTTPException(404)
        return JSONResponse({**progress, **self._shown(name, answer)})

    async def answer(self, request: Request) -> JSONResponse:
        """Keep ranks (in the order shown), a note and a state: open is a draft, ranked has all ranks."""
        name = self._annotator(request)
        if name is None:
            raise HTTPException(404)
        try:
            values = json.loads(await request.body())
            number, state, ranks, note = (values[key] for key in ("group", "state", "ranks", "note"))
            is_sound = type(number) is int and self.answers.get(name, number) is not None
            is_sound = is_sound and state in ("open", "ranked", "skipped") and len(note) <= _LONGEST_NOTE
            k = len(self.groups[number].responses) if is_sound else 0
            allowed = {(int, rank) for rank in range(1, k + 1)} | ({(type(None), None)} if state != "ranked" else set())
            is_sound = is_sound and len(ranks) == k and all((type(rank), rank) in allowed for rank in ranks)
            note = note.encode("utf-8", "replace").decode()  # a lone surrogate is no text
        except (AttributeError, TypeError, KeyError, ValueError, OverflowError, RecursionError):
            is_sound = False
        if not is_sound:
            raise HTTPException(400)
        of_data = dict(zip(shuffled(name, number, k), ranks, strict=True))
        self.answers.save(name, number, state, [of_data[index] for index in range(k)], note)
        return JSONResponse({"kept": True})

    async def overview(self, request: Request) -> JSONResponse:
        """What the overview shows; computed again where something changed, while annotators are served."""
        self._overview(request)
        changes = self.answers.changes
        if self.computed is None or self.computed[0] != changes:
            self.computed = (changes, await run_in_threadpool(self.figures()))
        return JSONResponse(self.computed[1])

    async def write(self, request: Request) -> JSONResponse:
        self._overview(request)
        return JSONResponse({"files": self.export()})

    def _who(self, request: Request) -> str:
        given = request.path_params["secret"].encode()
        for name, secret in self.answers.links().items():
            if secrets.compare_digest(given, secret.encode()):
                return name
        raise HTTPException(404, "No such page. Take the whole link that rrhf-peft rank printed.")

    def _annotator(self, request: Request) -> str | None:
        name = self._who(request)
        return None if name == OVERVIEW else name

    def _overview(self, request: Request) -> None:
        if self._who(request) != OVERVIEW:
            raise HTTPException(404)

    def _shown(self, name: str, answer: Answer) -> dict[str, Any]:
        """A group as this annotator sees it: shuffled, without sources and scores."""
        group = self.groups[answer.number]
        order = shuffled(name, answer.number, len(group.responses))
        ranks = answer.ranks or [None] * len(order)
        return {
            "group": answer.number,
            "prompt": [
                {"role": message["role"], "text": text, "html": markdown(text)}
                for message in chat_messages(group.prompt)
                for text in [_content(message)]
            ],
            "responses": [
                {"label": letter_label(position), "text": text, "html": markdown(text), "rank": ranks[index]}
                for position, index in enumerate(order)
                for text in [group.responses[index]]
            ],
            "note": answer.note,
            "state": answer.state,
            "before": answer.before,
            "after": answer.after,
        }


async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse what does not come from a page of this server, and send every answer with the same headers."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    is_ours = _hostname(host) in HOSTS and origin in (None, f"http://{host}")
    if request.method == "POST":
        length = request.headers.get("content-length", "")
        is_json = request.headers.get("content-type", "").partition(";")[0] == "application/json"
        is_small = length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= _LARGEST_REQUEST
        is_ours = is_ours and origin is not None and is_json and is_small
    response = await call_next(request) if is_ours else Response("Refused.", 403)
    response.headers.update(HEADERS)
    return response


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _not_kept(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"The answer could not be kept: {error}."}, 500)


def shuffled(annotator: str, number: int, k: int) -> list[int]:
    """The responses of a group in the order that this annotator sees, always the same."""
    return random.Random(f"{annotator} {number}").sample(range(k), k)


def markdown(text: str) -> str:
    """Markdown as HTML without anything that the text could smuggle in: markup in it is text, images are links."""
    return str(_markdown.render(text))


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
