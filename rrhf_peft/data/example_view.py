"""One training example token by token: who speaks, what the loss sees, in colour and legible without."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rrhf_peft.records import RankedGroup, TokenizedGroup

#: Alternating styles, so that neighbouring tokens are told apart; dim where the loss does not look.
_PROMPT_STYLES = ("dim", "dim italic")
_RESPONSE_STYLES = ("black on bright_green", "black on bright_cyan")
_SPECIAL_STYLE = "bold magenta"


def render_example(
    group: RankedGroup,
    tokenized: TokenizedGroup,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens_shown: int = 120,
) -> RenderableType:
    """The prompt and each response of one group: role, source, score, loss mask, and tokens between bars.

    Mask 0: the tokens are only conditioned on. Mask 1: their log-probs make the response's score.
    Sequences longer than `max_tokens_shown` show as many tokens of both ends together.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("who", width=20, overflow="fold")
    table.add_column("mask", justify="center")
    table.add_column("tokens", overflow="fold", ratio=1)
    table.add_row(
        _who("prompt", [f"{len(tokenized.prompt_ids):,} tokens", "shared"]),
        "0",
        _tokens(tokenized.prompt_ids, tokenizer, _PROMPT_STYLES, max_tokens_shown),
    )
    best = max(tokenized.scores)
    for place, ids in enumerate(tokenized.response_ids):
        score = tokenized.scores[place]
        facts = [tokenized.sources[place], f"score {score:.4g}" + (" (best)" if score == best else "")]
        if ids[-1] != tokenizer.eos_token_id:
            facts.append("cut: no EOS")
        table.add_row()
        table.add_row(
            _who(f"response {place + 1}", [*facts, f"{len(ids):,} tokens"]),
            "1",
            _tokens(ids, tokenizer, _RESPONSE_STYLES, max_tokens_shown),
        )
    origin = "".join(f", {name} {value}" for name, value in group.origin.items())
    title = Text(f"Example: group {tokenized.index}{_visible(origin)}", style="bold underline")
    read, kept = len(group.responses), len(tokenized.response_ids)
    return Group(title, Text(f"{kept} responses to rank, {read} read"), Text(), table)


def _who(role: str, facts: Sequence[str]) -> Text:
    return Text.assemble((role, "bold"), *(f"\n{_visible(fact)}" for fact in facts))


def _tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, styles: tuple[str, str], limit: int) -> Text:
    text = Text("|")
    special = set(tokenizer.all_special_ids)
    head = (limit + 1) // 2
    for place, token in enumerate(ids):
        if len(ids) > limit and head <= place < len(ids) - (limit - head):
            if place == head:
                text.append(f" ... {len(ids) - limit:,} more ... |", style="italic")
            continue
        text.append(_token(token, tokenizer), style=_SPECIAL_STYLE if token in special else styles[place % 2])
        text.append("|")
    return text


def _token(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """One token as text. SentencePiece marks a word's beginning with U+2581, which decoding one token loses."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text = str(tokenizer.decode([token]))
    if isinstance(piece, str) and piece.startswith("\u2581"):
        text = piece.replace("\u2581", " ")
    return _visible(text)


def _visible(text: str) -> str:
    """Line breaks and other characters without a shape as escapes, so that data cannot steer the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
