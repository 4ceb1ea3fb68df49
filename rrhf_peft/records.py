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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:  # `rrhf-peft --help` needs UserError, not torch's seconds
    import torch

#: A chat message: ``{"role": "user" | "assistant" | "system", "content": "..."}``.
Message = dict[str, str]


class UserError(ValueError):
    """Something the user can mend: the message is one paragraph that names the place and the remedy.

    The command line prints it without a traceback and exits non-zero. From Python it is an
    ordinary ``ValueError``.
    """


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """One prompt with k scored responses, as text.

    Attributes:
        prompt: The prompt as a string, or as a list of chat messages.
        responses: k response texts.
        scores: k scores, higher is better. Equal scores are a tie.
        sources: k names of who wrote each response (``beam:alpaca-7b``, ``human``, ``chosen`` ...).
        meta: Whatever else the source file said, and where the group was read (``file``, ``line``).
    """

    prompt: str | list[Message]
    responses: list[str]
    scores: list[float]
    sources: list[str]
    meta: dict[str, Any] = field(default_factory=dict)


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
