"""The shared vocabulary: what flows between the packages, and nothing that acts on it.

    files --data--> RankedGroup --data--> TokenizedGroup --data--> GroupBatch
                                            GroupBatch --logprobs--> ResponseLogProbs
                                      ResponseLogProbs --objectives--> loss, metrics

Shape legend, used throughout the package:
    G  groups in a batch          N  responses in a batch, over all its groups
    T  tokens in a batch          k  responses of one group (may differ from group to group)
    H  hidden size                V  vocabulary size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:  # `rrhf-peft --help` needs UserError, not torch's seconds
    import torch

#: A chat message: ``{"role": "user" | "assistant" | "system" | "tool", "content": "..."}``, with whatever else a chat
#: template reads (``tool_calls``, ``name``, ``reasoning_content`` ...).
Message = dict[str, Any]

#: Scores beyond this size, of either sign, are refused: their squares and sums leave the range of a float.
LARGEST_SCORE = 1e30

#: The columns of a ranked file that say something of each response, where it is known.
PER_RESPONSE = ("finish_reasons", "num_tokens", "token_ids", "tokenizers")


class UserError(ValueError):
    """Something the user can fix: the message is one paragraph that names the cause and the remedy.

    The command line prints it without a traceback and exits non-zero. From Python it is an
    ordinary ``ValueError``.
    """


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """One prompt with its k responses, as text: a bare prompt, candidates to score, or a ranked group.

    On disk, as JSON Lines or Arrow, the columns have the names of the attributes; `row` writes them.

    Attributes:
        prompt: The prompt as a string, or as a list of chat messages.
        responses: k response texts; empty for a bare prompt.
        scores: k scores, higher is better; equal scores are a tie, and None is not scored (yet). Left out: all None.
        sources: k names of who wrote each response (``beam:alpaca-7b``, ``human``, ``chosen`` ...). Left out:
            ``response-0``, ``response-1`` ...
        columns: Whatever else the source file said: ground truth, tests, ``tools``, ``chat_template_kwargs`` ...
        origin: Where the group was read: ``file``, and ``line`` (from 1) or ``row`` (from 0).
        finish_reasons: k reasons why sampling stopped (``eos``, ``stop``, ``length``); None where nobody knows. A
            response cut at its length (``length``) has no end for a model to learn.
        num_tokens: k lengths in tokens as sampled, the end token included; None where unknown.
        token_ids: k lists of the tokens that were sampled, the end token included; None where unknown, and where
            the text is not all that was sampled (it was cut at a stop string).
        tokenizers: k fingerprints of the tokenizer and template that `token_ids` belong to
            (`rrhf_peft.data.tokenization_fingerprint`).
        index: Position in the data as read, from 0; names the group in messages and in random streams.

    Raises:
        UserError: a field has the wrong type, or not one entry for each response; a score is not finite or absurd.
    """

    prompt: str | list[Message]
    responses: list[str] = field(default_factory=list)
    scores: Sequence[float | None] = field(default_factory=list)
    sources: Sequence[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    finish_reasons: Sequence[str | None] = ()
    num_tokens: Sequence[int | None] = ()
    token_ids: Sequence[Sequence[int] | None] = ()
    tokenizers: Sequence[str | None] = ()
    index: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            self._check_messages()
        responses = self.responses
        if not isinstance(responses, (list, tuple)) or not all(isinstance(text, str) for text in responses):
            raise self._problem(f"responses must be a list of texts, not {responses!r:.60}")
        k = len(responses)
        if k and not len(self.scores):
            object.__setattr__(self, "scores", [None] * k)
        if k and not len(self.sources):
            object.__setattr__(self, "sources", [f"response-{number}" for number in range(k)])
        for name in PER_RESPONSE:
            if not len(getattr(self, name)):
                object.__setattr__(self, name, _unknown(k))
        for name in ("scores", "sources", *PER_RESPONSE):
            if len(getattr(self, name)) != k:
                raise self._problem(f"{name} has {len(getattr(self, name))} entries for {k} responses")
        for score in self.scores:
            if score is not None and (not isinstance(score, Real) or isinstance(score, bool)):
                raise self._problem(f"a score must be a number, not {score!r:.60}")
            if score is not None and not abs(score) <= LARGEST_SCORE:
                raise self._problem(f"a score is {score:g}, which is not finite, or beyond {LARGEST_SCORE:g}")
        for ids in self.token_ids:
            if ids is not None and (
                isinstance(ids, str) or not all(type(token) is int and token >= 0 for token in ids)
            ):
                raise self._problem("token_ids must be lists of whole numbers, or None")
        if not all(isinstance(source, str) for source in self.sources):
            raise self._problem(f"sources must be texts, not {self.sources!r:.60}")

    @property
    def known_scores(self) -> list[float]:
        """The scores of a group that is ranked.

        Raises:
            UserError: a response has no score.
        """
        known = [score for score in self.scores if score is not None]
        if len(known) < len(self.scores):
            raise self._problem(f"{len(self.scores) - len(known)} of {len(self.scores)} responses have no score")
        return known

    @property
    def where(self) -> str:
        """Where the group was read, as messages write it."""
        if "file" not in self.origin:
            return f"group {self.index}"
        file, line = self.origin["file"], self.origin.get("line")
        return f"{file}: row {self.origin.get('row')} (from 0)" if line is None else f"{file}:{line}"

    def row(self) -> dict[str, Any]:
        """The group as a row of a ranked file: prompt, responses, scores and sources, and of `PER_RESPONSE` what is
        known. `columns` and `origin` are not in it; a bare prompt is `prompt` alone, and candidates have no scores."""
        row: dict[str, Any] = {"prompt": self.prompt}
        if self.responses:
            row["responses"] = list(self.responses)
            if any(score is not None for score in self.scores):
                row["scores"] = list(self.scores)
            row["sources"] = list(self.sources)
        for name in PER_RESPONSE:
            values = getattr(self, name)
            if any(value is not None for value in values):
                row[name] = [list(value) if name == "token_ids" and value is not None else value for value in values]
        return row

    def choose(self, indices: Sequence[int]) -> RankedGroup:
        """The same group with these of its responses, in this order."""
        chosen: dict[str, Any] = {
            name: [getattr(self, name)[index] for index in indices]
            for name in ("responses", "scores", "sources", *PER_RESPONSE)
        }
        return replace(self, **chosen)

    def _check_messages(self) -> None:
        if not isinstance(self.prompt, (list, tuple)) or not self.prompt:
            raise self._problem(f"prompt must be text or a list of chat messages, not {self.prompt!r:.60}")
        for number, message in enumerate(self.prompt):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise self._problem(
                    f'prompt[{number}] must be a chat message such as {{"role": "user", "content": "..."}}, not '
                    f"{message!r:.60}"
                )

    def _problem(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}. Fix that group, or leave it out.")


@cache
def _unknown(count: int) -> tuple[None, ...]:
    """Shared by all groups of this size: a million groups hold no list of Nones each."""
    return (None,) * count


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """One ranked group as token ids (compact `array("i")`), after templating, truncation and clean-up.

    Attributes:
        prompt_ids: The prompt, with the sequence's one BOS where the tokenizer has one. Never empty.
        response_ids: k responses, each with its EOS unless it was cut at the end. Never empty.
        scores: k scores, higher is better.
        sources: k source names.
        index: The group's position in the data as read; names the group in error messages.
    """

    prompt_ids: Sequence[int]
    response_ids: list[Sequence[int]]
    scores: list[float]
    sources: list[str]
    index: int


class GroupBatch(TypedDict):
    """Whole groups as flat tensors: every group is the stretch ``[P | R1 | ... | Rk]``, prompt once.

    The batch does not say how its tokens are laid out in rows: the engine decides that
    (``rrhf_peft.logprobs.layout``), because it depends on how the batch is split into chunks.

    Keys:
        prompt_lengths: int64 [G], tokens of each prompt.
        response_lengths: int64 [N], tokens of each response, EOS included.
        group: int64 [N], the group of each response, ascending from 0 to G - 1.
        scores: float64 [N], higher is better.
        source: int64 [N], index into the data set's list of source names.
        index: int64 [G], ``TokenizedGroup.index`` of each group.
        input_ids: int64 [T], all stretches one after the other.
    """

    prompt_lengths: torch.Tensor
    response_lengths: torch.Tensor
    group: torch.Tensor
    scores: torch.Tensor
    source: torch.Tensor
    index: torch.Tensor
    input_ids: torch.Tensor


class ResponseLogProbs(NamedTuple):
    """What the policy thinks of every response: all that an objective ever sees of a model.

    A reference policy is simply a second ``ResponseLogProbs``.

    Attributes:
        sum: float32 [N], sum over the response's tokens (EOS included) of log P(token | past), in nats.
        num_tokens: int64 [N], the tokens summed over: the paper's |y_i|.
        padded_length: int64 [N], longest prompt + response of the response's group, in tokens.
        group: int64 [N], the group of each response, ascending.
    """

    sum: torch.Tensor
    num_tokens: torch.Tensor
    padded_length: torch.Tensor
    group: torch.Tensor


class Mean(NamedTuple):
    """A metric as numerator and denominator, so that means over micro-batches and processes are exact.

    Attributes:
        total: float32 scalar, sum of the values.
        weight: float32 scalar, how many values were summed; 0 when there were none.
    """

    total: torch.Tensor
    weight: torch.Tensor


#: Metric name -> Mean.
Metrics = dict[str, Mean]
