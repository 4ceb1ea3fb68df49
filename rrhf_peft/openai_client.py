"""The client of servers that speak OpenAI's HTTP API: vLLM, TGI, llama.cpp, a hosted model; for candidates and judges.

One rule for all that can go wrong with a request:

    408, 409, 425, 429, 5xx, time-outs, cut lines,    tried again, after the seconds that Retry-After asks for or
    bodies that are no completion                     a doubling pause, at most a minute each
    any other status, an answer without text          failed at once: `RequestFailedError` with the server's words
    a redirect                                        not followed: prompts go only to the address that was named

A request that failed costs its own response and nothing else. Only when not one of `FAILURES_IN_A_ROW` requests was
answered, or none of all, does the run stop, with the server's words. How hard the client tries (`ServerSection.EFFORT`)
changes no answer and belongs into no fingerprint.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from rrhf_peft.records import UserError

if TYPE_CHECKING:
    from rrhf_peft.recipe.stages import ServerSection

#: Statuses that say "not now": too many requests, a server's fault, a gateway that waited in vain. So does every 5xx.
RETRIED = frozenset({408, 409, 425, 429})
#: Statuses that concern every request alike, however different their prompts: key, money, address.
CONCERN_ALL = frozenset({401, 402, 404, 407})
#: Seconds; the longest pause between two attempts, whatever the server asks for.
LONGEST_PAUSE = 60.0
#: So many requests in a row without one answer mean that the next ones need not be tried.
FAILURES_IN_A_ROW = 16
#: Bytes; of an answer, and of an error's words, of which LONGEST_REASON characters are kept.
LONGEST_BODY, LONGEST_ERROR_BODY, LONGEST_REASON = 8 << 20, 64 << 10, 200

Item = TypeVar("Item")
Result = TypeVar("Result")


#: Where a task's requests are counted, beside the client's totals.
_counting: ContextVar[Counter[str] | None] = ContextVar("counting", default=None)


class RequestFailedError(Exception):
    """A request without a usable answer, after all attempts; the message says why, in the server's words."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        text: What the model wrote.
        finish_reason: As the server names it: "stop", "length" ...
        num_tokens: Tokens of the answer as the server counts them; None where it does not.
    """

    text: str
    finish_reason: str | None
    num_tokens: int | None


class OpenAIClient:
    """Completions with retries, many at a time: `each` runs coroutines that await `ask`.

    Args:
        server: Its section of the recipe: address, model, key, concurrency, retries and budgets.
        at: Where that section stands, for error messages: ``scoring.scorer``.
        api: chat sends messages, completions sends text.
        known_to_answer: The endpoint has answered this run before, so that refusals at the start say nothing about it.
        pause: Told the seconds of a pause, instead of waiting; for tests.

    Attributes:
        counts: requests, retries, answers, failures, prompt_tokens, completion_tokens, and what went wrong by kind
            (``http 429``, ``timeout``, ``connection``, ``malformed body``, ``no text``).

    Raises:
        UserError: the openai package is missing, or the address or the key cannot be one.
    """

    def __init__(
        self,
        server: ServerSection,
        *,
        at: str,
        api: Literal["chat", "completions"] = "chat",
        known_to_answer: bool = False,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                f"{at}: needs the openai package, which is not installed: pip install 'rrhf-peft[endpoint]'."
            ) from None
        self.server, self.at, self.api = server, at, api
        self.base_url, self._key = _checked_url(server.base_url, at), _key_of(server.api_key_env)
        self.counts: Counter[str] = Counter()
        self._openai: Any = openai
        self._client: Any = None  # of the event loop that is running
        self._works, self._last, self._pause = known_to_answer, ("", ""), pause
        self._unavailable_in_a_row, self._refused_in_a_row = 0, set[int]()

    async def ask(self, prompt: Any, **options: Any) -> Reply:
        """The answer to a list of messages, or to a text under api completions.

        Args:
            prompt: What to send.
            **options: Further fields of the request: temperature, max_tokens, seed ...

        Raises:
            RequestFailedError: no usable answer to this request after all attempts.
            UserError: nothing is answered any more, or the budget is spent.
        """
        (reply,) = await self.choices(prompt, **options)
        if isinstance(reply, RequestFailedError):
            raise reply
        return reply

    async def choices(self, prompt: Any, n: int = 1, **options: Any) -> list[Reply | RequestFailedError]:
        """The same for `n` answers in one request, which pays for the prompt once; one without text has its reason.

        Raises:
            RequestFailedError: no usable answer, or fewer than `n`.
            UserError: as `ask`.
        """
        if n > 1:
            options["n"] = n
        for attempt in range(self.server.max_retries + 1):
            self._spend()
            asked_for, again, refused = 0.0, True, False
            try:
                body = await asyncio.wait_for(self._post(prompt, options), self.server.timeout)
                replies, usage = _read_replies(body, self.api)
                if len(replies) != n:
                    raise _MalformedError(f"{len(replies)} of {n} choices; a server that takes no n needs use_n: false")
                if all(isinstance(reply, RequestFailedError) for reply in replies):
                    raise _NoTextError(str(replies[0]))
            except _StatusError as error:
                kind, words, asked_for = f"http {error.status}", str(error), error.retry_after
                again = error.status >= 500 or error.status in RETRIED
                refused = not again and error.status not in CONCERN_ALL
            except _MalformedError as error:
                kind, words = "malformed body", str(error)
            except _NoTextError as error:  # it is paid for, and the same seed would give the same
                kind, words, again, refused = "no text", str(error), False, True
            except UnicodeEncodeError:
                kind, words, again, refused = "no request", "the prompt is not valid Unicode", False, True
            except (asyncio.TimeoutError, self._openai.APITimeoutError):
                kind, words = "timeout", ""
            except self._openai.OpenAIError as error:
                kind, words = "connection", str(error.__cause__ or error)
            else:
                self._answered(usage)
                return replies
            self._count(**{kind: 1})
            if not again or attempt == self.server.max_retries:
                reason = f"{kind} after {attempt + 1} attempts" if again and attempt else kind
                raise self._failed(kind, reason, self._clean(words), prompt, refused)
            self._count(retries=1)
            doubled = min(self.server.first_wait * 2.0 ** min(attempt, 20), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            seconds = max(doubled, min(asked_for, LONGEST_PAUSE))
            if self._pause is None:
                await asyncio.sleep(seconds)
            else:
                self._pause(seconds)
        raise AssertionError("the last attempt returns or raises")

    def answered_before(self) -> None:
        """The endpoint has answered this run before, so that refusals at the start say nothing about it."""
        self._works = True

    def each(
        self, function: Callable[[Item], Awaitable[Result]], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result]]:
        """(index, ``await function(item)``) of every item as it is done, `concurrency` of them at a time.

        The event loop has a daemon thread of its own, so that neither Ctrl-C nor an error waits for requests under
        way, and a notebook's loop is not in the way.

        Args:
            function: Awaits `ask` or `choices`.
            items: What to ask; taken as there is room for the next.

        Raises:
            UserError: from `ask`; or not one request of these was answered.
        """
        answers, failures = self.counts["answers"], self.counts["failures"]
        finished: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        loop, upcoming, spent = asyncio.new_event_loop(), enumerate(items), list[_BudgetSpentError]()
        held: list[tuple[int, Any, None]] = []

        async def work() -> None:
            for index, item in upcoming:
                try:
                    held.append((index, await function(item), None))
                except _BudgetSpentError as error:
                    spent.append(error)
                if spent:  # what is under way is paid for, and waited for
                    break
                deliver()

        def deliver() -> None:
            """What failed may be the first of what makes the run give up: it waits for an answer behind it."""
            if not self._unavailable_in_a_row and (self._works or not self._refused_in_a_row):
                for result in held:
                    finished.put(result)
                held.clear()

        async def work_all() -> None:
            async with self._openai.AsyncOpenAI(
                base_url=self.server.base_url,
                api_key=self._key or "none",  # the library wants one, servers in the next room do not
                max_retries=0,
                timeout=self.server.timeout,
                http_client=self._openai.DefaultAsyncHttpxClient(
                    timeout=self.server.timeout,
                    follow_redirects=False,
                    event_hooks={"response": [self._raise_for_status]},
                ),
            ) as self._client:
                await asyncio.gather(*(work() for _ in range(self.server.concurrency)))
            failed = self.counts["failures"] - failures
            if failed and self.counts["answers"] == answers and (self._unavailable_in_a_row or not self._works):
                raise self._gives_up(failed)
            for result in held:
                finished.put(result)
            if spent:
                raise spent[0]

        task = loop.create_task(work_all())

        def run() -> None:
            error = None
            try:
                loop.run_until_complete(task)
            except BaseException as raised:
                error = raised
            finished.put((-1, None, error))
            for left in asyncio.all_tasks(loop):
                left.cancel()
            with contextlib.suppress(BaseException):
                loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
            loop.close()

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                index, result, error = finished.get()
                if error is not None:
                    raise error
                if index < 0:
                    break
                yield index, result
        finally:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(task.cancel)

    def gather(self, function: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
        """The results of `each`, in the order of `items`."""
        results = dict(self.each(function, items))
        return [results[index] for index in range(len(items))]

    async def _post(self, prompt: Any, options: dict[str, Any]) -> bytes:
        """The bytes of one answer, up to the longest body."""
        api = self._client.chat.completions if self.api == "chat" else self._client.completions
        named = {"messages" if self.api == "chat" else "prompt": prompt}
        options = {**options, "extra_body": {**self.server.extra_body, **options.get("extra_body", {})}}
        async with api.with_streaming_response.create(model=self.server.model, **named, **options) as response:
            body = bytearray()
            try:
                async for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > LONGEST_BODY:
                        break
            except Exception as error:  # of httpx or of httpx2, whichever this version of openai stands on
                raise self._openai.APIConnectionError(request=response.http_request) from error
        if len(body) > LONGEST_BODY:
            raise _MalformedError(f"an answer of more than {LONGEST_BODY >> 20} MiB")
        return bytes(body)

    async def _raise_for_status(self, response: Any) -> None:
        """Told of every response before its body is read: errors are read here, and no further than needed."""
        if response.is_success:
            return
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > LONGEST_ERROR_BODY:
                break
        words = _error_words(bytes(body))
        if 300 <= response.status_code < 400:
            words = f"redirects to {response.headers.get('location', 'nowhere')}"
        raise _StatusError(response.status_code, words, _retry_after(response.headers))

    @property
    def cost(self) -> float:
        """What the tokens so far have cost, by the prices of the section."""
        server, counts = self.server, self.counts
        prices = (server.prompt_price or 0.0, server.completion_price or 0.0)
        return (prices[0] * counts["prompt_tokens"] + prices[1] * counts["completion_tokens"]) / 1e6

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """What the requests in the block add to `counts`, whatever others are under way."""
        counts = Counter[str]()
        token = _counting.set(counts)
        yield counts
        _counting.reset(token)

    def count(self, name: str) -> None:
        """Count something else that went wrong."""
        self._count(**{name: 1})

    def _count(self, **counts: int) -> None:
        self.counts.update(counts)
        if (counting := _counting.get()) is not None:
            counting.update(counts)

    def _spend(self) -> None:
        server, tokens = self.server, self.counts["prompt_tokens"] + self.counts["completion_tokens"]
        for limit, used, key in (
            (server.max_requests, self.counts["requests"], "max_requests"),
            (server.max_total_tokens, tokens, "max_total_tokens"),
            (server.max_cost, self.cost, "max_cost"),
        ):
            if limit is not None and used >= limit:
                raise _BudgetSpentError(
                    f"{self.at}.{key}: the budget of {limit:g} is spent. What is finished is kept: raise it and run "
                    "the same command again to go on."
                )
        self._count(requests=1)

    def _answered(self, usage: dict[str, int]) -> None:
        self._count(**usage, answers=1)
        self._works = True
        self._unavailable_in_a_row, self._refused_in_a_row = 0, set()

    def _failed(self, kind: str, reason: str, words: str, prompt: Any, refused: bool) -> Exception:
        """Count a failed request: its error, or the run's when it is one too many.

        Args:
            kind: ``http 400``, ``timeout`` ...
            reason: The same with the number of attempts.
            words: The server's, cleaned.
            prompt: What was sent. Refusals of one prompt, however many of its candidates, count once in a row.
            refused: Whether another prompt may fare better; else the endpoint is unavailable to all.
        """
        reason = f"{reason}: {words}" if words else reason
        self._count(failures=1)
        self._last = (kind, reason)
        if refused:
            self._refused_in_a_row.add(hash(json.dumps(prompt)))
        else:
            self._unavailable_in_a_row += 1
        in_a_row = self._unavailable_in_a_row + (0 if self._works else len(self._refused_in_a_row))
        return self._gives_up(in_a_row) if in_a_row >= FAILURES_IN_A_ROW else RequestFailedError(reason)

    def _gives_up(self, requests: int) -> UserError:
        kind, reason = self._last
        server, check_key = self.server, f"Check the key in the environment variable {self.server.api_key_env}."
        remedies = {
            "http 401": check_key,
            "http 403": check_key,
            "http 404": f"It knows no model {server.model}, or no such address: check {self.at}.model and base_url.",
            "no text": "A model that reasons first needs more tokens for its answer.",
        }
        remedy = remedies.get(kind, "See to the endpoint.")
        if kind.startswith("http 3"):
            remedy = f"Redirects are not followed: set {self.at}.base_url to that address if you trust it."
        elif kind.startswith("http 4") and kind not in remedies:
            remedy = "It refuses what it is asked: change the settings or the prompts that it names."
        return UserError(
            f"{self.base_url}: not one of {requests} requests in a row was answered ({reason}). {remedy} What was "
            "finished before is kept: run the same command again to go on."
        )

    def _clean(self, words: str) -> str:
        """A server's words on one line, without the key and control characters, and not too many of them."""
        if len(self._key) > 3:
            words = words.replace(self._key, "[key]")
        plain = " ".join("".join(char if char.isprintable() else " " for char in words).split()).rstrip(".")
        return plain if len(plain) <= LONGEST_REASON else plain[: LONGEST_REASON - 1] + "…"


class _BudgetSpentError(UserError):
    """No further request may be sent."""


class _StatusError(Exception):
    """A status other than 2xx, with the server's words."""

    def __init__(self, status: int, words: str, retry_after: float) -> None:
        super().__init__(words)
        self.status, self.retry_after = status, retry_after


class _MalformedError(Exception):
    """A body that is not what the API promises."""


class _NoTextError(Exception):
    """A completion that is whole and holds no text."""


def _error_words(body: bytes) -> str:
    """What an error says: OpenAI's ``error.message``, other servers' ``message`` or ``detail``, or all of it."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


def _retry_after(headers: Any) -> float:
    """Seconds that the server asks to wait, 0 without a word of it; the header holds a number or a date."""
    said = headers.get("retry-after")
    if said is None:
        return 0.0
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _read_replies(body: bytes, api: str) -> tuple[list[Reply | RequestFailedError], dict[str, int]]:
    """An answer's bytes as replies and their tokens; nothing in them is trusted to be there."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise _MalformedError(f"not JSON: {body[:LONGEST_REASON].decode('utf-8', 'replace')}") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise _MalformedError(_error_words(body) if isinstance(answer, dict) and answer.get("error") else "no choices")
    said = answer.get("usage")
    usage = {
        name: said[name]
        for name in ("prompt_tokens", "completion_tokens")
        if isinstance(said, dict) and type(said.get(name)) is int and 0 <= said[name] < 1 << 40
    }
    # Of several answers a server tells the tokens of all together.
    num_tokens = usage.get("completion_tokens") if len(choices) == 1 else None
    return [_read_choice(choice, api, num_tokens) for choice in choices], usage


def _read_choice(choice: dict[str, Any], api: str, num_tokens: int | None) -> Reply | RequestFailedError:
    message = choice.get("message") if api == "chat" else choice
    if not isinstance(message, dict):
        raise _MalformedError("a choice without a message")
    text, finish_reason = message.get("content" if api == "chat" else "text"), choice.get("finish_reason")
    if not isinstance(text, str):
        refusal = message.get("refusal")
        return RequestFailedError(refusal if isinstance(refusal, str) else f"finish_reason {finish_reason}")
    # JSON can spell half a surrogate pair, which no file can hold.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Reply(text, finish_reason if isinstance(finish_reason, str) else None, num_tokens)


def _checked_url(base_url: str, at: str) -> str:
    """The address as messages show it, without a password."""
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(f"{at}.base_url: {base_url!r} is no http address, for example http://localhost:8000/v1.")
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"


def _key_of(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"The environment variable {variable} holds characters that no key has. Set it again.")
    return key
