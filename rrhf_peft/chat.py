"""`rrhf-peft chat`: talk to what was trained, and beside it to the model it was trained from.

Prompts become tokens as in training: by the template of the run's recipe. The base is the same weights with the adapter
off. Lines come from stdin, so that a script can ask what a person would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer, set_seed

from rrhf_peft.console import print_json, say
from rrhf_peft.data import encode_prompts, prompt_text, stop_token_ids
from rrhf_peft.modeling import base_of, load_policy, tokenizer_of
from rrhf_peft.recipe import ModelSection, load_recipe, takes_from_base
from rrhf_peft.records import Message, RankedGroup, UserError
from rrhf_peft.train.run_folder import RECIPE

#: Templates with turns; with the others every line is a prompt of its own.
_WITH_TURNS = ("chat", "hh")
HELP = "Type a prompt. /new forgets the conversation, /quit or the end of the input leaves."


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn: greedily at temperature 0."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256


@dataclass
class Side:
    """One of the policies that answer.

    Attributes:
        name: How it is called: base or trained.
        model: Its weights.
        adapter_off: Whether it is that model with its adapter switched off.
        messages: The conversation so far.
    """

    name: str
    model: Any
    adapter_off: bool = False
    messages: list[Message] = field(default_factory=list)


@dataclass
class Chat:
    """The policies of a run, their tokenizer and template."""

    sides: list[Side]
    tokenizer: Any
    template: str

    @torch.no_grad()
    def answer(self, side: Side, line: str, decoding: Decoding, show: Callable[[str], None]) -> str:
        """What a policy answers to a line; `show` gets the text piece by piece.

        Raises:
            UserError: the template cannot say this conversation.
        """
        said: Message = {"role": "user", "content": line}
        prompt = [*side.messages, said] if self.template in _WITH_TURNS else line
        text = prompt_text(RankedGroup(prompt), self.tokenizer, self.template)
        context = getattr(side.model.config.get_text_config(), "max_position_embeddings", None)
        room = max(2, context - decoding.max_new_tokens) if context else None
        (ids,) = encode_prompts(self.tokenizer, [text], add_bos=self.template != "chat", max_tokens=room)
        drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.temperature else {}
        with side.model.disable_adapter() if side.adapter_off else contextlib.nullcontext():
            output = side.model.generate(
                input_ids=torch.tensor([ids], device=side.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=side.model.device),
                max_new_tokens=min(decoding.max_new_tokens, context - len(ids)) if context else decoding.max_new_tokens,
                do_sample=bool(decoding.temperature),
                eos_token_id=stop_token_ids(self.tokenizer, self.template),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=_Streamer(self.tokenizer, show),
                **drawn,
            )
        answer = str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()
        side.messages += [said, {"role": "assistant", "content": answer}]
        return answer


class _Streamer(TextStreamer):
    """Hands on the text of a response as it comes, without the prompt."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand it on."""
        self._show(text)


def open_chat(run: Path, *, alone: bool = False) -> Chat:
    """Load a run folder, or a merged one.

    Args:
        run: The folder.
        alone: Without the base beside it.

    Raises:
        UserError: the folder holds no model, or what it was trained from cannot be loaded.
    """
    if not (run / RECIPE).is_file():
        if not (run / "config.json").is_file():
            raise UserError(f"{run}: holds neither a run ({RECIPE}) nor a model (config.json). Give a run's folder.")
        model, tokenizer = load_policy(ModelSection(name=str(run)))
        return Chat([Side("trained", model)], tokenizer, "chat" if tokenizer.chat_template else "raw")
    recipe = load_recipe(run / RECIPE)
    if (run / "adapter_config.json").is_file():
        model, tokenizer = load_policy(recipe.model, adapter=str(run))
        sides = [Side("trained", model)]
        if not takes_from_base(model.active_peft_config.init_lora_weights):
            sides.insert(0, Side("base", model, adapter_off=True))
    else:
        tokenizer = tokenizer_of(recipe.model)
        sides = [Side("trained", load_policy(recipe.model.model_copy(update={"name": str(run)}))[0])]
        if not alone:
            sides.insert(0, Side("base", base_of(recipe.model, tokenizer).eval()))
    return Chat(sides[-1:] if alone else sides, tokenizer, recipe.data.template)


def converse(
    chat: Chat, lines: Iterable[str], decoding: Decoding, console: Console, *, seed: int = 0, as_json: bool = False
) -> None:
    """Answer line by line: side by side and as it is written in a terminal, whole and labelled anywhere else."""
    set_seed(seed)
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line == "/new":
            for side in chat.sides:
                side.messages.clear()
        elif line and console.is_terminal and not as_json:
            _answer_live(chat, line, decoding, console)
        elif line:
            answers = {side.name: chat.answer(side, line, decoding, lambda text: None) for side in chat.sides}
            if as_json:
                print_json({"prompt": line, **answers})
            else:
                say("\n".join([f"> {line}", *(f"{name}: {answer}" for name, answer in answers.items())]))


def _answer_live(chat: Chat, line: str, decoding: Decoding, console: Console) -> None:
    written = {side.name: "" for side in chat.sides}

    def table() -> Table:
        columns = Table(*written, expand=True, box=None, padding=(0, 2, 1, 0))
        columns.add_row(*(Text(text) for text in written.values()))
        return columns

    with Live(console=console, refresh_per_second=12) as live:
        for side in chat.sides:

            def show(text: str, side: Side = side) -> None:
                written[side.name] += text
                live.update(table())

            chat.answer(side, line, decoding, show)
