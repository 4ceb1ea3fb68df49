"""Candidates from a server that speaks OpenAI's HTTP API: vLLM, TGI, llama.cpp, a hosted model.

One request for each candidate, with a seed of its own, because not every server knows `n`. Whether a seed
makes a server repeat itself is the server's affair.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from rrhf_peft.data import chat_messages, prompt_text
from rrhf_peft.openai_client import OpenAIClient, RequestFailedError
from rrhf_peft.recipe.stages import EndpointSection
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.candidate import Answers, Candidate, Decoding, FinishReason


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
        self.template, self.api = template, section.api
        self.client = OpenAIClient(**section.model_dump(), at=at, known_to_answer=known_to_answer, pause=pause)

    def respond(
        self,
        prompts: Sequence[RankedGroup],
        keys: Sequence[str],
        decoding: Decoding,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Answers]:
        """The answers to each prompt, in order; a candidate that the server did not give is a failure with its reason.

        Args:
            prompts: With texts or messages.
            keys: A name for each prompt; with a candidate's number it gives the request's seed.
            decoding: Strategy top_p and its settings.
            progress: Called with the numbers of prompts and of tokens that were added.

        Raises:
            UserError: nothing is answered any more.
        """
        inputs = [self._input(prompt) for prompt in prompts]
        settings: dict[str, Any] = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
        }
        if decoding.stop:
            settings["stop"] = list(decoding.stop)

        def request(job: tuple[int, int]) -> Candidate | str:
            index, number = job
            seed = zlib.crc32(f"{keys[index]}/{number}".encode()) & 0x7FFFFFFF
            try:
                reply = self.client.ask(inputs[index], seed=seed, **settings)
            except RequestFailedError as error:
                return str(error)
            ends = [end for end in (reply.text.find(stop) for stop in decoding.stop) if end >= 0]
            reason: FinishReason = "stop" if ends else "length" if reply.finish_reason == "length" else "eos"
            return Candidate(reply.text[: min(ends, default=None)], reply.num_tokens, None, reason)

        jobs = [(index, number) for index in range(len(prompts)) for number in range(decoding.k)]
        left = [decoding.k] * len(prompts)

        def done(job: int, answer: Candidate | str) -> None:
            index = jobs[job][0]
            left[index] -= 1
            if progress is not None:
                progress(left[index] == 0, 0 if isinstance(answer, str) else answer.num_tokens or 0)

        answers = [Answers([], []) for _ in prompts]
        for (index, _), answer in zip(jobs, self.client.gather(request, jobs, done), strict=True):
            if isinstance(answer, str):
                answers[index].failures.append(answer)
            else:
                answers[index].candidates.append(answer)
        return answers

    def _input(self, prompt: RankedGroup) -> Any:
        if self.api == "chat":
            return chat_messages(prompt.prompt)
        unused: Any = None  # these templates read no tokenizer
        return prompt_text(prompt, unused, self.template)
