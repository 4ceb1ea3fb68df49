"""Templates: how a prompt and a response become the text that is tokenised, and what ends a response.

The prompt's text and the response's text, one after the other, are the whole sequence; `tokenizing` adds BOS and the
end, except that a chat template's own tokens are the truth: training sees what inference will.

    raw     the texts as they are; messages: their contents, a blank line between them
    hh      "\\n\\nHuman: ...\\n\\nAssistant:" and the response after one space, as in Anthropic's transcripts
    alpaca  the Stanford Alpaca prompt for an instruction without input; the response follows directly
    chat    the tokenizer's own chat template with the assistant's turn opened

A response's own leading white space is part of the text in `raw` and `hh`. In `alpaca` and `chat` the
template has already set the response off, so leading white space is removed, as chat templates do.

`chat` reads two more columns of a group, by the names that TRL gives them: ``tools`` and ``chat_template_kwargs``.
What a template cannot say is refused and never dropped: tool calls and other keys of messages need `chat`, and a chat
template that reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import Message, RankedGroup, UserError

Prompt = str | list[Message]

#: Seconds that a chat template may take for one prompt: thousands of times what an honest one needs.
RENDER_SECONDS = 10.0

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Template(NamedTuple):
    """How prompts and responses become text.

    Attributes:
        prompt: Turns a prompt into text, with the tokenizer at hand, and the group's other columns where there are any.
        response: Does so for a response.
        writes_bos: The prompt's text has its BOS already, or is meant to have none.
    """

    prompt: Callable[..., str]
    response: Callable[[str], str]
    writes_bos: bool = False


def prompt_text(group: RankedGroup, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A group's prompt as text, by the template of that name; the one way from a prompt to what a model reads.

    Raises:
        UserError: the prompt cannot be said in this template; names the group.
    """
    try:
        return TEMPLATES[template].prompt(group.prompt, tokenizer, group.columns)
    except UserError as error:
        raise UserError(f"{group.where}: {error}") from None


def chat_messages(prompt: Prompt) -> list[Message]:
    """A prompt as chat messages: an HH transcript as its turns, any other string as one user message.

    Everything that reads messages gets them from here: chat templates, reward models, judges, endpoints.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    parts = re.split(r"\n\n(Human|Assistant):", prompt)
    if parts[0] or len(parts) < 5 or parts[-2] != "Assistant" or parts[-1].strip():
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1:-2:2], parts[2:-2:2], strict=True)
    return [{"role": roles[label], "content": text.strip()} for label, text in turns]


def transcript(prompt: Prompt) -> str:
    """A prompt as one text for judges and people: a single user message as its content, conversations with roles.

    What a message has besides its content, such as tool calls, stands behind it as JSON.
    """
    messages = chat_messages(prompt)
    if len(messages) == 1 and messages[0]["role"] == "user" and len(messages[0]) == 2:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {_message_text(message)}" for message in messages)


def _message_text(message: Message) -> str:
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    content = message["content"] if isinstance(message["content"], str) else json.dumps(message["content"])
    return "\n".join(part for part in (content, json.dumps(rest, ensure_ascii=False) if rest else "") if part)


def template_note(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """What to tell who trains a model that has a chat template in another form; None where there is nothing to tell."""
    if template == "chat" or not tokenizer.chat_template:
        return None
    return (
        f"data.template is {template}, but {tokenizer.name_or_path or 'the tokenizer'} has a chat template: a model "
        "that was tuned for chat is used in that form, and data.template=chat trains it in that form."
    )


# ---- What stands in front of a response ----


def raw_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None) -> str:
    """A string unchanged; messages as their contents, a blank line between them."""
    if isinstance(prompt, str):
        return prompt
    _refuse_lost_keys(prompt, columns, "template raw")
    return "\n\n".join(message["content"] for message in prompt)


def hh_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None) -> str:
    """An Anthropic HH transcript that ends with an open "Assistant:" turn."""
    if isinstance(prompt, str):
        if not re.match(r"\s*Human:|.*\n\nHuman:", prompt, flags=re.DOTALL):
            return f"\n\nHuman: {prompt}\n\nAssistant:"
        text = prompt if prompt.startswith("\n\n") else "\n\n" + prompt.lstrip()
        last_turn = re.split(r"\n\n(?=Human:|Assistant:)", text)[-1]
    else:
        _refuse_lost_keys(prompt, columns, "template hh")
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


def alpaca_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None) -> str:
    """The Stanford Alpaca prompt."""
    if not isinstance(prompt, str):
        _refuse_lost_keys(prompt, columns, "template alpaca")
    return _ALPACA.format(instruction=raw_prompt(prompt, tokenizer))


def chat_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None) -> str:
    """The tokenizer's chat template, ready for the assistant's answer.

    A string becomes one user message; an HH transcript becomes its turns. Where the last message is the
    assistant's, that message is continued. ``tools`` and ``chat_template_kwargs`` of `columns` go to the template.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses these messages or ignores a part of them.
    """
    messages = chat_messages(prompt)
    opened = messages[-1]["role"] == "assistant"
    keys: dict[str, Any] = {"continue_final_message": True} if opened else {"add_generation_prompt": True}
    return render_chat(messages, tokenizer, columns, **keys)


def _refuse_lost_keys(messages: Sequence[Message], columns: Mapping[str, Any] | None, where: str) -> None:
    """Refuse what plain text cannot say: contents that are not text, tool calls, names, tools."""
    for number, message in enumerate(messages):
        lost = sorted(message.keys() - {"role", "content"})
        if lost or not isinstance(message["content"], str):
            what = ", ".join(lost) or "a content that is not text"
            raise UserError(
                f"{where}: message {number} of the prompt has {what}, which this cannot express. Set data.template to "
                "chat, with a tokenizer whose chat template reads it, or remove it from the data."
            )
    if columns and isinstance(columns.get("tools"), list) and columns["tools"]:
        raise UserError(f"{where}: the column tools cannot be expressed. Set data.template to chat, or remove it.")


# ---- Chat templates ----


def render_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, Any] | None = None,
    **keys: Any,
) -> str:
    """Messages as the tokenizer's chat template writes them.

    Args:
        messages: Of the conversation.
        tokenizer: Whose template is used.
        columns: Of the group; `tools` and `chat_template_kwargs` are read.
        keys: ``add_generation_prompt`` or ``continue_final_message``, and whatever else the template reads.

    Raises:
        UserError: there is no chat template, it refuses the messages, takes too long, or ignores a key of a message.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"template chat: the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template. "
            "Set data.template to raw, hh or alpaca, or model.tokenizer to one that has."
        )
    source = str(tokenizer.chat_template)
    named = {name for message in messages for name in message} - {"role", "content"}
    extra = _template_arguments(columns)
    if extra.get("tools"):
        named.add("tools")
    if ignored := sorted(name for name in named if name not in source):
        raise UserError(
            f"the tokenizer's chat template never reads {', '.join(ignored)}, which the prompt has and would lose. "
            "Remove it from the data, or set model.tokenizer to one whose template reads it."
        )
    try:
        with _time_limit(RENDER_SECONDS):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **extra, **keys))
    except Exception as error:  # a template is a program: it raises whatever it likes
        roles = ", ".join(message["role"] for message in messages)
        reason = (str(error).splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
        raise UserError(
            f"the tokenizer's chat template refuses messages of the roles {roles} ({reason}). Fix the prompt, or set "
            "data.template to raw, hh or alpaca."
        ) from None


def _template_arguments(columns: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a group's columns give to its chat template."""
    columns = columns or {}
    arguments = columns.get("chat_template_kwargs") or {}
    tools = columns.get("tools")
    if isinstance(tools, str):  # Arrow has no type for tools of different shapes
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = None
    if not isinstance(arguments, Mapping) or {"tokenize", "conversation", "return_dict"} & arguments.keys():
        raise UserError("chat_template_kwargs must be an object with arguments of the chat template. Fix that column.")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return {**arguments, **({"tools": tools} if tools and is_list else {})}


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`; in the main thread of systems that have signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"it was not done after {seconds:g} seconds")

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)


# ---- What stands behind a response ----

_QUESTION, _ANSWER = "What is it called?", "Its name is Quince"


class Frame(NamedTuple):
    """What a template puts around a response.

    Attributes:
        lead: White space between prompt and response (Llama 2 writes a space there).
        end: Token ids that end a response. Sampling stops at the last one.
        end_text: The same as text.
    """

    lead: str
    end: list[int]
    end_text: str


def response_frame(tokenizer: PreTrainedTokenizerBase, template: str) -> Frame:
    """What the template puts before and after a response.

    With `chat` it is what the rendered template ends an assistant's turn with, up to and with its first added token
    (``<|im_end|>``, ``<end_of_turn>``, ``<|eot_id|>`` ...): a model that writes that token has ended its turn, and
    what a template puts behind it, such as a line break, is never generated. With the other templates, and where a
    chat template marks the end by plain text or not at all, it is the tokenizer's EOS.

    Raises:
        UserError: the tokenizer has no EOS, or its chat template cannot render a question and an answer.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no EOS token, so no response "
            "could end. Set its eos_token, save it, and name it in model.tokenizer."
        )
    eos = Frame("", [int(tokenizer.eos_token_id)], str(tokenizer.eos_token))
    if template != "chat":
        return eos
    question: Message = {"role": "user", "content": _QUESTION}
    whole = render_chat([question, {"role": "assistant", "content": _ANSWER}], tokenizer)
    before, answer, after = whole.rpartition(_ANSWER)
    opened = render_chat([question], tokenizer, add_generation_prompt=True)
    lead = before.removeprefix(opened) if before.startswith(opened) else ""
    lead = lead if not lead.strip() else ""
    match = added_tokens(tokenizer).search(after) if answer else None
    if match is None:
        return eos._replace(lead=lead)
    end_text = after[: match.end()]
    # As the continuation of an answer, so that no tokenizer puts a space of its own in front.
    ids, context = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (_ANSWER + end_text, _ANSWER)
    )
    token: Any = tokenizer.convert_tokens_to_ids(match[0])
    end = ids[len(context) :] if ids[: len(context)] == context else [token]
    return Frame(lead, [int(token) for token in end], end_text)


def end_of_response_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The token ids that end a response, in training as in generation; see `response_frame`."""
    return response_frame(tokenizer, template).end


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The token ids at which generation stops: the last one of the template's end, and EOS."""
    return sorted({end_of_response_ids(tokenizer, template)[-1], int(tokenizer.eos_token_id)})


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the text of any added token that is not white space: special tokens, and control tokens like them."""
    contents = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    known = sorted((text for text in contents if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")


def tokenization_fingerprint(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Of all that decides which tokens a prompt becomes: the tokenizer and the template.

    Tokens that were sampled under one fingerprint are the continuation of their prompt under the same one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        values = json.loads(backend.to_str())
        rules: Any = {name: value for name, value in values.items() if name not in ("padding", "truncation")}
    else:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts = [rules, tokenizer.bos_token, tokenizer.eos_token, template]
    if template == "chat":
        parts.append(str(tokenizer.chat_template))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _as_is(response: str) -> str:
    return response


#: Template name -> how prompts and responses become text.
TEMPLATES: dict[str, Template] = {
    "raw": Template(raw_prompt, _as_is),
    "hh": Template(hh_prompt, hh_response),
    "alpaca": Template(alpaca_prompt, str.lstrip),
    "chat": Template(chat_prompt, str.lstrip, writes_bos=True),
}
