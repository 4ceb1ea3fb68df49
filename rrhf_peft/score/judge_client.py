"""Requests to an OpenAI-compatible endpoint: patient with faults that pass, counted, within a budget."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from typing import Any

from rrhf_peft.records import Message, UserError

#: Replies that say "not now": too many requests, a server's fault, a gateway that waited in vain.
PASSING = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
#: Replies that no repetition mends and that concern every request alike.
FATAL = frozenset({401, 402, 403, 404})
LONGEST_WAIT = 60.0


class RequestFailedError(Exception):
    """A request without an answer, after all attempts; the message says why."""

    PREFIX = "no answer: "

    def __init__(self, reason: str) -> None:
        super().__init__(f"{self.PREFIX}{reason}")


class JudgeClient:
    """Chat completions with retries; safe to use from many threads.

    Args:
        base_url: of the endpoint, for example http://localhost:8000/v1.
        model: name that the endpoint serves.
        api_key_env: environment variable that holds the key; endpoints that want none may leave it unset.
        attempts: how often a request is made before it counts as failed.
        first_wait: seconds before the second attempt; doubled each time, up to a minute.
        timeout: seconds for one attempt.
        temperature: of the judge's decoding.
        reply_tokens: longest reply.
        max_requests: attempts allowed in all, None for no limit.
        max_total_tokens: tokens allowed in all, as the endpoint counts them; those of requests under way
            may come on top.
        json_mode: ask for ``response_format: json_object``, where the endpoint knows it.

    Attributes:
        counts: requests, retries, answers, failures, prompt_tokens, completion_tokens, and what went
            wrong by kind (``http 429``, ``timeout``, ``connection`` ...).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str,
        attempts: int,
        first_wait: float,
        timeout: float,
        temperature: float,
        reply_tokens: int,
        max_requests: int | None,
        max_total_tokens: int | None,
        json_mode: bool,
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError(
                "The scorer judge needs a package that is not installed: pip install 'rrhf-peft[endpoint]'."
            ) from None
        self._errors = openai
        self._client = openai.OpenAI(
            base_url=base_url, api_key=os.environ.get(api_key_env) or "none", max_retries=0, timeout=timeout
        )
        self.base_url, self.model, self.attempts, self.first_wait = base_url, model, attempts, first_wait
        self._options: dict[str, Any] = {"temperature": temperature, "max_tokens": reply_tokens}
        if json_mode:
            self._options["response_format"] = {"type": "json_object"}
        self.max_requests, self.max_total_tokens = max_requests, max_total_tokens
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def ask(self, messages: list[Message]) -> str:
        """The text of the reply.

        Raises:
            RequestFailedError: no answer to this request after all attempts.
            UserError: no request can succeed (key, address, model), or the budget is spent.
        """
        body: Any = messages
        for attempt in range(self.attempts):
            self._spend()
            retry_after: float | None = None
            try:
                reply = self._client.chat.completions.create(
                    model=self.model,
                    messages=body,
                    **self._options,
                )
            except self._errors.APITimeoutError:
                reason = "timeout"
            except self._errors.APIConnectionError:
                reason = "connection"
            except self._errors.APIStatusError as error:
                reason = f"http {error.status_code}"
                if error.status_code in FATAL:
                    self._count(reason, "failures")
                    raise UserError(
                        f"{self.base_url}: refuses the request for model {self.model!r} with {reason} "
                        f"({_first_line(error)}). Check base_url, model and the API key; finished groups are kept."
                    ) from None
                if error.status_code not in PASSING:
                    self._count(reason, "failures")
                    raise RequestFailedError(f"{reason}, {_first_line(error)}") from None
                retry_after = _seconds(error.response.headers.get("retry-after"))
            except (self._errors.APIError, ValueError):  # a body that is no chat completion
                reason = "malformed body"
            else:
                text = _text(reply)
                if text is not None:
                    self._answered(reply)
                    return text
                reason = "malformed body"
            self._count(reason)
            if attempt + 1 < self.attempts:
                self._count("retries")
                wait = min(self.first_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                time.sleep(max(wait, min(retry_after or 0.0, LONGEST_WAIT)))
        self._count("failures")
        raise RequestFailedError(f"{reason}, {self.attempts} attempts")

    def _spend(self) -> None:
        with self._lock:
            tokens = self.counts["prompt_tokens"] + self.counts["completion_tokens"]
            for limit, used, key in (
                (self.max_requests, self.counts["requests"], "max_requests"),
                (self.max_total_tokens, tokens, "max_total_tokens"),
            ):
                if limit is not None and used >= limit:
                    raise UserError(
                        f"scoring.scorer.{key}: the budget of {limit} is spent. Finished groups are kept: raise it and "
                        "run the same command again to go on."
                    )
            self.counts["requests"] += 1

    def _count(self, *names: str) -> None:
        with self._lock:
            self.counts.update(names)

    def _answered(self, reply: Any) -> None:
        usage = getattr(reply, "usage", None)
        with self._lock:
            self.counts["answers"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.counts[name] += int(getattr(usage, name, 0) or 0)


def _text(reply: Any) -> str | None:
    """The reply's text; None where the endpoint sent something else than a chat completion."""
    choices = getattr(reply, "choices", None)
    if not choices:
        return None
    content = getattr(getattr(choices[0], "message", None), "content", None)
    return content if isinstance(content, str) else None


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header is not None else None
    except ValueError:  # an HTTP date; the back-off is patient enough
        return None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
