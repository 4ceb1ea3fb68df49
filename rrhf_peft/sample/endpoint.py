"""Candidates from a server that speaks OpenAI's HTTP API: vLLM, TGI, llama.cpp, a hosted model.

One request for each candidate, with a seed of its own, because not every server knows `n`. Whether a seed
makes a server repeat itself is the server's affair.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rrhf_peft.records import UserError
from rrhf_peft.sample.candidate import Candidate, Decoding, FinishReason

#: Seconds before the first further attempt; doubled after each, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0


class EndpointPolicy:
    """A model behind a server. The arguments are those of the recipe's `endpoint:`.

    Attributes:
        refused: How many candidates the server refused for good (too long a prompt, a content filter).
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api: str = "chat",
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "backend endpoint needs the openai client. Install it: pip install 'rrhf-peft[endpoint]'."
            ) from None
        self._openai: Any = openai
        self.base_url, self.model, self.api, self.api_key_env = base_url, model, api, api_key_env
        self.concurrency, self.max_retries, self.pause = concurrency, max_retries, pause
        self.refused = 0
        # Servers of one's own want no key, and the client wants one.
        key = os.environ.get(api_key_env) or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)

    def respond(
        self,
        prompts: Sequence[Any],
        keys: Sequence[str],
        decoding: Decoding,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Candidate]]:
        """The candidates of each prompt, in order; fewer than k where the server refused.

        Args:
            prompts: Lists of messages, or texts under api completions.
            keys: A name for each prompt; with a candidate's number it gives the request's seed.
            decoding: Strategy top_p and its settings.
            progress: Called with the numbers of prompts and of tokens that were added.

        Raises:
            UserError: the server cannot be reached, wants another key, knows no such model, or still fails
                after the last attempt.
        """
        jobs = [(place, number) for place in range(len(prompts)) for number in range(decoding.k)]
        found: list[list[Candidate]] = [[] for _ in prompts]
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [
                pool.submit(self._request, prompts[place], f"{keys[place]}/{number}", decoding)
                for place, number in jobs
            ]
            try:
                for (place, number), future in zip(jobs, futures, strict=True):
                    candidate = future.result()
                    if candidate is None:
                        self.refused += 1
                    else:
                        found[place].append(candidate)
                    if number == decoding.k - 1 and progress is not None:
                        progress(1, sum(item.num_tokens for item in found[place]))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return found

    def _request(self, prompt: Any, key: str, decoding: Decoding) -> Candidate | None:
        openai = self._openai
        for attempt in range(self.max_retries + 1):
            wait = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * (0.5 + random.random() / 2)
            try:
                return self._candidate(self._send(prompt, key, decoding), decoding)
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise UserError(
                    f"{self.base_url}: refuses the key ({_first_line(error)}). Set the environment variable "
                    f"{self.api_key_env}."
                ) from None
            except openai.NotFoundError as error:
                raise UserError(
                    f"{self.base_url}: knows no model {self.model}, or no such address ({_first_line(error)}). Check "
                    "endpoint.model and endpoint.base_url."
                ) from None
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                return None
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    return None
                wait = max(wait, min(_retry_after(error), LONGEST_PAUSE))
                problem = f"status {error.status_code}"
            except openai.APIError as error:  # cut connections, time-outs, answers that are no JSON
                problem = _first_line(error)
            except _MalformedError as error:
                problem = str(error)
            if attempt < self.max_retries:
                self.pause(wait)
        raise UserError(
            f"{self.base_url}: still fails after {self.max_retries + 1} attempts ({problem}). What is finished is "
            "kept: start the same command again when the server is back, or raise endpoint.max_retries."
        )

    def _send(self, prompt: Any, key: str, decoding: Decoding) -> Any:
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": zlib.crc32(key.encode()) & 0x7FFFFFFF,
        }
        if decoding.stop:
            settings["stop"] = list(decoding.stop)
        try:
            if self.api == "chat":
                return self._client.chat.completions.create(messages=prompt, **settings)
            return self._client.completions.create(prompt=prompt, **settings)
        except ValueError as error:  # JSON that is none
            raise _MalformedError(_first_line(error)) from None

    def _candidate(self, answer: Any, decoding: Decoding) -> Candidate:
        try:
            choice = answer.choices[0]
            text = choice.message.content if self.api == "chat" else choice.text
            reason, usage = choice.finish_reason, answer.usage
        except (AttributeError, IndexError, TypeError):
            raise _MalformedError("an answer without a choice") from None
        if not isinstance(text, str):
            raise _MalformedError("a choice without text")
        cut = min((place for place in (text.find(stop) for stop in decoding.stop) if place >= 0), default=None)
        finish: FinishReason = "stop" if cut is not None else "length" if reason == "length" else "eos"
        num_tokens = usage.completion_tokens if usage is not None else 0
        return Candidate(text[:cut], num_tokens, None, finish)


class _MalformedError(Exception):
    """An answer that is not what the API promises."""


def _retry_after(error: Any) -> float:
    """Seconds that the server asks to wait, or none."""
    try:
        return float(error.response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
