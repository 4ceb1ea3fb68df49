"""The client of servers that speak OpenAI's HTTP API: vLLM, TGI, llama.cpp, a hosted model; for candidates and judges.

One rule for all that can go wrong with a request:

    408, 409, 425, 429, 5xx, time-outs, cut lines,    tried again, after the seconds that Retry-After asks for or
    bodies that are no completion                     a doubling pause, at most a minute each
    any other status, an answer without text          failed at once: `RequestFailedError` with the server's words
    a redirect                                        not followed: prompts go only to the address that was named

A request that failed costs its own response and nothing else. Only when not one of `FAILURES_IN_A_ROW` requests was
answered, or none of a whole batch, does the run stop, with the server's words. How hard the client tries
(`max_retries`, `concurrency`, `timeout`, `base_url`) changes no answer and belongs into no fingerprint.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from rrhf_peft.records import UserError

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
    """Completions with retries; `ask` may be called from many threads.

    Args:
        base_url: Of the endpoint, for example http://localhost:8000/v1.
        model: The name under which the server knows the model.
        at: The recipe section that these settings stand in, for error messages: ``scoring.scorer``.
        api: chat sends messages, completions sends text.
        api_key_env: Environment variable that holds the key; servers that want none may leave it unset.
        concurrency: Requests under way at the same time.
        timeout: Seconds until an attempt counts as failed, from its start to its last byte.
        max_retries: Further attempts after the first one.
        first_pause: Seconds before the second attempt; doubled after each.
        max_requests: Attempts allowed in all, None for no limit.
        max_total_tokens: Tokens allowed in all, as the server counts them; requests under way may come on top.
        known_to_answer: The endpoint has answered this run before, so that refusals at the start say nothing about it.
        pause: Waits the seconds it is given; for tests.

    Attributes:
        counts: requests, retries, answers, failures, prompt_tokens, completion_tokens, and what went wrong by kind
            (``http 429``, ``timeout``, ``connection``, ``malformed body``, ``no text``).

    Raises:
        UserError: the openai package is missing, or the address or the key cannot be one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        at: str,
        api: Literal["chat", "completions"] = "chat",
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
        first_pause: float = 0.5,
        max_requests: int | None = None,
        max_total_tokens: int | None = None,
        known_to_answer: bool = False,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                f"{at}: needs the openai package, which is not installed: pip install 'rrhf-peft[endpoint]'."
            ) from None
        self.base_url, self.model, self.api, self.at = _checked_url(base_url, at), model, api, at
        self.api_key_env, self._key = api_key_env, _key_of(api_key_env)
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.first_pause, self.max_requests, self.max_total_tokens = first_pause, max_requests, max_total_tokens
        self.counts: Counter[str] = Counter()
        self._openai: Any = openai
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",  # the library wants one, servers in the next room do not
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(
                timeout=timeout, follow_redirects=False, event_hooks={"response": [self._raise_for_status]}
            ),
        )
        self._works, self._last = known_to_answer, ("", "")
        self._unavailable_in_a_row, self._refused_in_a_row = 0, set[int]()
        self._lock, self._stop, self._pause = threading.Lock(), threading.Event(), pause

    def ask(self, prompt: Any, **options: Any) -> Reply:
        """The answer to a list of messages, or to a text under api completions.

        Args:
            prompt: What to send.
            **options: Further fields of the request: temperature, max_tokens, seed ...

        Raises:
            RequestFailedError: no usable answer to this request after all attempts.
            UserError: nothing is answered any more, or the budget is spent.
        """
        for attempt in range(self.max_retries + 1):
            self._spend()
            asked_for, again, refused = 0.0, True, False
            try:
                reply, usage = _read_reply(self._post(prompt, options), self.api)
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
            except self._openai.APITimeoutError:
                kind, words = "timeout", ""
            except self._openai.OpenAIError as error:
                kind, words = "connection", str(error.__cause__ or error)
            else:
                self._answered(usage)
                return reply
            self._count(kind)
            if not again or attempt == self.max_retries or self._stop.is_set():
                reason = f"{kind} after {attempt + 1} attempts" if again and attempt else kind
                raise self._failed(kind, reason, self._clean(words), prompt, refused)
            self._count("retries")
            doubled = min(self.first_pause * 2.0 ** min(attempt, 20), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            (self._pause or self._stop.wait)(max(doubled, min(asked_for, LONGEST_PAUSE)))
        raise AssertionError("the last attempt returns or raises")

    def answered_before(self) -> None:
        """The endpoint has answered this run before, so that refusals at the start say nothing about it."""
        with self._lock:
            self._works = True

    def gather(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        done: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """``[function(item) for item in items]``, `concurrency` at a time; `function` calls `ask`.

        Threads are daemons, so that neither Ctrl-C nor an error waits for requests under way.

        Args:
            function: Called in a thread for each item.
            items: What to ask.
            done: Told, in the calling thread, of the index and the result of every item that is done.

        Raises:
            UserError: from `ask`; or not one request of these was answered.
        """
        answers, failures = self.counts["answers"], self.counts["failures"]
        stop = self._stop = threading.Event()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        finished: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    finished.put((index, function(items[index]), None))
                except BaseException as error:
                    finished.put((index, None, error))

        for index in range(len(items)):
            waiting.put(index)
        for _ in range(min(self.concurrency, len(items))):
            threading.Thread(target=work, daemon=True).start()
        results: list[Any] = [None] * len(items)
        try:
            for _ in items:
                index, results[index], error = finished.get()
                if error is not None:
                    raise error
                if done is not None:
                    done(index, results[index])
        finally:
            stop.set()
        with self._lock:
            failed = self.counts["failures"] - failures
            if failed and self.counts["answers"] == answers and (self._unavailable_in_a_row or not self._works):
                raise self._gives_up(failed)
        return results

    def _post(self, prompt: Any, options: dict[str, Any]) -> bytes:
        """The bytes of one answer, within the time-out and the longest body."""
        deadline = time.monotonic() + self.timeout
        if self.api == "chat":
            opened = self._client.chat.completions.with_streaming_response.create(
                model=self.model, messages=prompt, **options
            )
        else:
            opened = self._client.completions.with_streaming_response.create(model=self.model, prompt=prompt, **options)
        with opened as response:
            body = bytearray()
            chunks = response.iter_bytes()
            while True:
                try:
                    chunk = next(chunks, None)
                except Exception as error:  # of httpx or of httpx2, whichever this version of openai stands on
                    if "Timeout" in type(error).__name__:
                        raise self._openai.APITimeoutError(request=response.http_request) from error
                    raise self._openai.APIConnectionError(request=response.http_request) from error
                if chunk is None:
                    return bytes(body)
                body += chunk
                if len(body) > LONGEST_BODY:
                    raise _MalformedError(f"an answer of more than {LONGEST_BODY >> 20} MiB")
                if time.monotonic() > deadline:  # a server that sends a byte now and then
                    raise self._openai.APITimeoutError(request=response.http_request)

    def _raise_for_status(self, response: Any) -> None:
        """Told of every response before its body is read: errors are read here, and no further than needed."""
        if response.is_success:
            return
        deadline, body = time.monotonic() + self.timeout, bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > LONGEST_ERROR_BODY or time.monotonic() > deadline:
                break
        words = _error_words(bytes(body))
        if 300 <= response.status_code < 400:
            words = f"redirects to {response.headers.get('location', 'nowhere')}"
        raise _StatusError(response.status_code, words, _retry_after(response.headers))

    def _spend(self) -> None:
        with self._lock:
            tokens = self.counts["prompt_tokens"] + self.counts["completion_tokens"]
            for limit, used, key in (
                (self.max_requests, self.counts["requests"], "max_requests"),
                (self.max_total_tokens, tokens, "max_total_tokens"),
            ):
                if limit is not None and used >= limit:
                    raise UserError(
                        f"{self.at}.{key}: the budget of {limit} is spent. What is finished is kept: raise it and run "
                        "the same command again to go on."
                    )
            self.counts["requests"] += 1

    def _count(self, *names: str) -> None:
        with self._lock:
            self.counts.update(names)

    def _answered(self, usage: dict[str, int]) -> None:
        with self._lock:
            self.counts.update(usage)
            self.counts["answers"] += 1
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
        with self._lock:
            self.counts["failures"] += 1
            self._last = (kind, reason)
            if refused:
                self._refused_in_a_row.add(hash(json.dumps(prompt)))
            else:
                self._unavailable_in_a_row += 1
            in_a_row = self._unavailable_in_a_row + (0 if self._works else len(self._refused_in_a_row))
            if in_a_row >= FAILURES_IN_A_ROW:
                return self._gives_up(in_a_row)
        return RequestFailedError(reason)

    def _gives_up(self, requests: int) -> UserError:
        kind, reason = self._last
        remedies = {
            "http 401": f"Check the key in the environment variable {self.api_key_env}.",
            "http 403": f"Check the key in the environment variable {self.api_key_env}.",
            "http 404": f"It knows no model {self.model}, or no such address: check {self.at}.model and base_url.",
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


def _read_reply(body: bytes, api: str) -> tuple[Reply, dict[str, int]]:
    """An answer's bytes as a reply and its tokens; nothing in them is trusted to be there."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise _MalformedError(f"not JSON: {body[:LONGEST_REASON].decode('utf-8', 'replace')}") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _MalformedError(_error_words(body) if isinstance(answer, dict) and answer.get("error") else "no choices")
    choice = choices[0]
    message = choice.get("message") if api == "chat" else choice
    if not isinstance(message, dict):
        raise _MalformedError("a choice without a message")
    text, finish_reason = message.get("content" if api == "chat" else "text"), choice.get("finish_reason")
    if not isinstance(text, str):
        refusal = message.get("refusal")
        raise _NoTextError(refusal if isinstance(refusal, str) else f"finish_reason {finish_reason}")
    # JSON can spell half a surrogate pair, which no file can hold.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    said = answer.get("usage")
    usage = {
        name: said[name]
        for name in ("prompt_tokens", "completion_tokens")
        if isinstance(said, dict) and type(said.get(name)) is int and 0 <= said[name] < 1 << 40
    }
    reply = Reply(text, finish_reason if isinstance(finish_reason, str) else None, usage.get("completion_tokens"))
    return reply, usage


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
