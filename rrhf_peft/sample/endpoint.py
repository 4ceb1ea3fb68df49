"""Candidates from a server that speaks OpenAI's HTTP API: vLLM, TGI, llama.cpp, a hosted model.

One request for each candidate, with a seed of its own, or one for all of a prompt's (`use_n`), where the server knows
`n`. Requests of all prompts are under way together, up to `concurrency`. Whether a seed makes a server repeat itself is
the server's affair.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rrhf_peft.data import chat_messages, prompt_text
from rrhf_peft.openai_client import OpenAIClient, Reply, RequestFailedError
from rrhf_peft.recipe.stages import EndpointSection
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.policies import Answers, Candidate, Decoding, FinishReason


class EndpointPolicy:
    """A model behind a server: gets messages, or templated text that needs no tokenizer.

    Args:
        section: The recipe's `endpoint:`.
        template: How prompts become text under api completions.
        at: The entry of the recipe, for error messages.
        known_to_answer: The endpoint has answered this run before.
        pause: Waits the seconds it is given; for tests.

    Raises:
        UserError: an extra is missing, or an address or a key is none.
    """

    #: Servers do not tell which tokens they sampled.
    tokenizer_fingerprint: str | None = None
    across_units = True

    def __init__(
        self,
        section: EndpointSection,
        template: str = "raw",
        *,
        at: str = "endpoint",
        known_to_answer: bool = False,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        if section.api == "completions" and template == "chat":
            raise UserError(
                "sampling.template: chat needs a tokenizer, which an endpoint does not give. Set endpoint.api: chat, "
                "so that the server applies its own template."
            )
        self.template, self.section = template, section
        self.client = OpenAIClient(section, at=at, api=section.api, known_to_answer=known_to_answer, pause=pause)

    def respond(
        self,
        prompts: Sequence[RankedGroup],
        keys: Sequence[str],
        decoding: Decoding,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, Answers]]:
        """(index, answers) of every prompt as it is done; what the server did not give is a failure with its reason.

        Args:
            prompts: With texts or messages.
            keys: A name for each prompt; with a candidate's number it gives the request's seed.
            decoding: Strategy top_p and its settings.
            progress: Called with the numbers of prompts and of tokens that were added.

        Raises:
            UserError: nothing is answered any more.
        """
        size = decoding.k if self.section.use_n else 1
        settings: dict[str, Any] = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
        }
        if decoding.stop:
            settings["stop"] = list(decoding.stop)

        async def request(job: tuple[int, int]) -> list[Candidate | str]:
            index, number = job
            seed = zlib.crc32(f"{keys[index]}/{number}".encode()) & 0x7FFFFFFF
            try:
                replies = await self.client.choices(self._input(prompts[index]), size, seed=seed, **settings)
            except (RequestFailedError, UnsayableError) as error:
                return [str(error)] * size
            return [
                f"no text: {reply}" if isinstance(reply, RequestFailedError) else _candidate(reply, decoding.stop)
                for reply in replies
            ]

        jobs = [(index, number) for index in range(len(prompts)) for number in range(0, decoding.k, size)]
        given: dict[int, dict[int, list[Candidate | str]]] = {}
        for job, answers in self.client.each(request, jobs):
            index, number = jobs[job]
            numbered = given.setdefault(index, {})
            numbered[number] = answers
            is_done = len(numbered) * size == decoding.k
            if progress is not None:
                progress(is_done, sum(item.num_tokens or 0 for item in answers if isinstance(item, Candidate)))
            if is_done:
                items = [item for _, part in sorted(given.pop(index).items()) for item in part]
                candidates = [item for item in items if isinstance(item, Candidate)]
                yield index, Answers(candidates, [item for item in items if isinstance(item, str)])

    def _input(self, prompt: RankedGroup) -> Any:
        if self.section.api == "chat":
            return chat_messages(prompt.prompt)
        unused: Any = None  # these templates read no tokenizer
        try:
            return prompt_text(prompt, unused, self.template)
        except UserError as error:
            raise UnsayableError(str(error)) from None


class UnsayableError(Exception):
    """A prompt that the template cannot say: it costs its own candidates and no others."""


def _candidate(reply: Reply, stop: Sequence[str]) -> Candidate:
    ends = [end for end in map(reply.text.find, stop) if end >= 0]
    reason: FinishReason = "stop" if ends else "length" if reply.finish_reason == "length" else "eos"
    return Candidate(reply.text[: min(ends, default=None)], reply.num_tokens, None, reason)
