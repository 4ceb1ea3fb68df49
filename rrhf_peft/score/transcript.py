"""A prompt as one text, for scorers that read text: rules, judges and people."""

from __future__ import annotations

from rrhf_peft.records import Message


def transcript(prompt: str | list[Message]) -> str:
    """A string unchanged; a single user message as its content; longer conversations with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
