"""Templates: how a prompt and a response become the text that is tokenised.

The prompt's text and the response's text, one after the other, are the whole sequence; BOS and EOS are
added by `tokenizing`, except that a chat template's own tokens are the truth: whether it writes a BOS or
not, training sees what inference will.

    raw     the texts as they are; messages: their contents, a blank line between them
    hh      "\\n\\nHuman: ...\\n\\nAssistant:" and the response after one space, as in Anthropic's transcripts
    alpaca  the Stanford Alpaca prompt for an instruction without input; the response follows directly
    chat    the tokenizer's own chat template with the assistant's turn opened

A response's own leading white space is part of the text in `raw` and `hh`. In `alpaca` and `chat` the
template has already set the response off, so leading white space is removed, as chat templates do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import Message, UserError

Prompt = str | list[Message]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Template(NamedTuple):
    """How prompts and responses become text.

    Attributes:
        prompt: Turns a prompt into text, with the tokenizer at hand.
        response: Does so for a response.
        writes_bos: The prompt's text has its BOS already, or is meant to have none.
    """

    prompt: Callable[[Prompt, PreTrainedTokenizerBase], str]
    response: Callable[[str], str]
    writes_bos: bool = False


def raw_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A string unchanged; messages as their contents, a blank line between them."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def hh_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """An Anthropic HH transcript that ends with an open "Assistant:" turn."""
    if isinstance(prompt, str):
        if not re.match(r"\s*Human:|.*\n\nHuman:", prompt, flags=re.DOTALL):
            return f"\n\nHuman: {prompt}\n\nAssistant:"
        text = prompt if prompt.startswith("\n\n") else "\n\n" + prompt.lstrip()
        last_turn = re.split(r"\n\n(?=Human:|Assistant:)", text)[-1]
    else:
        labels = {"user": "Human: ", "assistant": "Assistant: "}  # a system message stands unlabelled in front
        turns = [labels.get(message["role"], "") + message["content"] for message in prompt]
        text = "".join("\n\n" + turn for turn in turns)
        last_turn = turns[-1]
    if not last_turn.startswith("Assistant:"):
        return text.rstrip() + "\n\nAssistant:"
    # An assistant's turn that has begun is continued; one that is only opened loses trailing space.
    return text if last_turn.removeprefix("Assistant:").strip() else text.rstrip()


def hh_response(response: str) -> str:
    """The response after "Assistant:": one space in front, unless it brings its own white space."""
    return response if response[:1].isspace() else " " + response


def alpaca_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Stanford Alpaca prompt."""
    return _ALPACA.format(instruction=raw_prompt(prompt, tokenizer))


def chat_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, ready for the assistant's answer.

    A string becomes one user message; an HH transcript becomes its turns. Where the last message is the
    assistant's, that message is continued.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"template chat: the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template. "
            "Set data.template to raw, hh or alpaca, or model.tokenizer to one that has."
        )
    messages = _turns(prompt) if isinstance(prompt, str) else prompt
    opened = messages[-1]["role"] == "assistant"
    keys: dict[str, Any] = {"continue_final_message": True} if opened else {"add_generation_prompt": True}
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **keys))
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the tokenizer's chat template refuses messages of the roles {roles} ({error}). Fix the prompt, or set "
            "data.template to raw, hh or alpaca."
        ) from None


def _turns(prompt: str) -> list[Message]:
    """An HH transcript as messages; any other string as one user message."""
    parts = re.split(r"\n\n(Human|Assistant):", prompt)
    if parts[0] or len(parts) < 5 or parts[-2] != "Assistant" or parts[-1].strip():
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1:-2:2], parts[2:-2:2], strict=True)
    return [{"role": roles[label], "content": text.strip()} for label, text in turns]


def _as_is(response: str) -> str:
    return response


#: Template name -> how prompts and responses become text.
TEMPLATES: dict[str, Template] = {
    "raw": Template(raw_prompt, _as_is),
    "hh": Template(hh_prompt, hh_response),
    "alpaca": Template(alpaca_prompt, str.lstrip),
    "chat": Template(chat_prompt, str.lstrip, writes_bos=True),
}
