"""Where every token of a batch goes, chunks of rows that share each prompt or one row per response, and who sees whom.

A *piece* is a prompt with one or more of its responses, ``[P | R1 | R2 ...]``; every response's
positions restart at |P|. The shared layout makes pieces as long as pays and packs them into rows; the plain layout
makes one piece per response and one row per piece, which is the usual padded batch. All of that is integer arithmetic
on lengths, on the host. A chunk holds whole groups, whose loss depends on nothing else; only a group larger than a
chunk is split.

In a shared row a token sees its own piece's prompt and its own response's past. The rule is written
once, as a predicate on (query, key); dense masks and FlexAttention block masks both come from it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig

#: Attention implementations that take an explicit mask; flash attention does not.
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")

#: The budget may make a chunk cost so much more than its rows would without it; else it takes fewer of them.
_MOST_WASTE = 1.15

#: Layer types a shared-prompt mask can express.
MASKED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")

#: Entries of a config that name a window the mask knows, or only say where it holds.
_KNOWN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern")


@dataclass(frozen=True)
class Rows:
    """One chunk: R rows of L positions, and which of them predict which response token.

    Attributes:
        token: int64 [R, L], index into the batch's flat `input_ids`; anything valid where padded.
        position: int64 [R, L], the model's position ids.
        piece: int64 [R, L], which piece a token belongs to, from 0; -1 where padded.
        branch: int64 [R, L], 0 for a prompt token, 1, 2, ... for the piece's responses.
        predictor: int64 [n], index into the R * L positions whose hidden state predicts response token n.
        target: int64 [n], index of that token in the flat `input_ids`.
        response: int64 [m], the responses of this chunk, in the order of their tokens in `target`.
        length: int64 [m], how many of `target` belong to each.
        is_part: whether its groups have responses in other chunks too.
    """

    token: torch.Tensor
    position: torch.Tensor
    piece: torch.Tensor
    branch: torch.Tensor
    predictor: torch.Tensor
    target: torch.Tensor
    response: torch.Tensor
    length: torch.Tensor
    is_part: bool = False

    @property
    def num_padded(self) -> int:
        """Positions that hold no token."""
        return int((self.piece < 0).sum())

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "is_part"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class _Piece:
    prompt: range  # flat indices of the prompt's tokens
    responses: tuple[tuple[int, range], ...]  # (response, flat indices of its tokens)
    length: int


def plan_chunks(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    group: Sequence[int],
    *,
    layout: Literal["shared", "plain"],
    chunk_tokens: int,
    attention_tokens: float = math.inf,
) -> list[Rows]:
    """Split a batch into chunks of at most `chunk_tokens` padded tokens, by whole groups where they fit.

    A group that does not fit is split by its responses, each part with its own copy of the prompt, and its chunks hold
    nothing else. A response that does not fit alone gets a chunk alone.

    A row of L tokens costs L (1 + L / `attention_tokens`). So a group of many responses behind a short prompt is in
    several pieces as well: a piece costs least per response token when it has sqrt(P (P + `attention_tokens`)) of them.

    Args:
        prompt_lengths: G lengths, each at least 1.
        response_lengths: N lengths, each at least 1.
        group: N ascending group indices.
        layout: shared or plain.
        chunk_tokens: the budget, padding included.
        attention_tokens: how long a row is whose attention takes as much time as all else.
    """
    whole: list[list[_Piece]] = []
    chunks: list[Rows] = []
    offset, response = 0, 0
    for index, prompt_length in enumerate(prompt_lengths):
        prompt = range(offset, offset + prompt_length)
        offset += prompt_length
        members: list[tuple[int, range]] = []
        while response < len(group) and group[response] == index:
            members.append((response, range(offset, offset + response_lengths[response])))
            offset += response_lengths[response]
            response += 1
        assert members, f"group {index} has no response"
        if layout == "plain":
            pieces = _filled(prompt, members, 0)
        else:
            pieces = _split(prompt, members, chunk_tokens, attention_tokens)
        if len(pieces) == 1 or _padded(pieces, layout) <= chunk_tokens:
            whole.append(pieces)
        else:
            chunks += _chunks([[piece] for piece in pieces], layout, chunk_tokens, attention_tokens, is_part=True)
    return _chunks(whole, layout, chunk_tokens, attention_tokens) + chunks


def _padded(pieces: list[_Piece], layout: str) -> int:
    """The least positions that these pieces take: one after the other in a row, or a row each."""
    lengths = [piece.length for piece in pieces]
    return sum(lengths) if layout == "shared" else len(lengths) * max(lengths)


def _split(prompt: range, members: list[tuple[int, range]], chunk_tokens: int, attention_tokens: float) -> list[_Piece]:
    """A group's pieces, of about the same length: as many as cost least, if they fit a chunk together."""
    tokens = sum(len(part) for _, part in members)
    cheapest = math.sqrt(len(prompt) * (len(prompt) + attention_tokens))
    for count in range(min(max(1, round(tokens / cheapest)), len(members)), 1, -1):
        if tokens + count * len(prompt) <= chunk_tokens:
            return _balanced(prompt, members, count)
    return _balanced(prompt, members, len(_filled(prompt, members, chunk_tokens)))


def _balanced(prompt: range, members: list[tuple[int, range]], count: int) -> list[_Piece]:
    """At most so many pieces, whose longest is as short as that allows."""
    low, high = len(prompt) + 1, len(prompt) + sum(len(tokens) for _, tokens in members)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(prompt, members, middle)) <= count else (middle + 1, high)
    return _filled(prompt, members, low)


def _filled(prompt: range, members: list[tuple[int, range]], longest: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    held: list[tuple[int, range]] = []
    length = len(prompt)
    for member in members:
        if held and length + len(member[1]) > longest:
            pieces.append(_Piece(prompt, tuple(held), length))
            held, length = [], len(prompt)
        held.append(member)
        length += len(member[1])
    return [*pieces, _Piece(prompt, tuple(held), length)]


def _chunks(
    items: list[list[_Piece]], layout: str, chunk_tokens: int, attention_tokens: float, *, is_part: bool = False
) -> list[Rows]:
    """Chunks of items, whose pieces stay together: the longest first, so that those of a chunk are much alike."""
    items = sorted(items, key=lambda item: max(piece.length for piece in item), reverse=True)
    chunks = []
    while items:
        count = 1
        while count < len(items) and _padded([*chain(*items[: count + 1])], layout) <= chunk_tokens:
            count += 1
        rows = _arranged([*chain(*items[:count])], layout, chunk_tokens, attention_tokens)
        while count > 1 and _cost(rows, attention_tokens) > _MOST_WASTE * _cost(
            _arranged([*chain(*rows)], layout, sys.maxsize, attention_tokens), attention_tokens
        ):  # rows are that wide only to fit the chunk
            count -= 1
            rows = _arranged([*chain(*items[:count])], layout, chunk_tokens, attention_tokens)
        items = items[count:]
        chunks.append(_lay_out(rows, is_part))
    return chunks


def _arranged(pieces: list[_Piece], layout: str, chunk_tokens: int, attention_tokens: float) -> list[list[_Piece]]:
    """The rows of a chunk: as many, and as wide, as cost least."""
    pieces = sorted(pieces, key=lambda piece: piece.length, reverse=True)
    if layout == "plain":
        return [[piece] for piece in pieces]
    total, longest = sum(piece.length for piece in pieces), pieces[0].length
    best = [pieces]
    most = len(_packed(pieces, longest))
    for count in {*range(1, min(most, 8) + 1), *range(max(1, most - 4), most + 1)}:
        width = max(longest, -(-total // count))
        while len(rows := _packed(pieces, width)) > count:
            width += max(1, width // 100)
        fits = _width(rows) * len(rows) <= chunk_tokens
        if fits and _cost(rows, attention_tokens) < _cost(best, attention_tokens):
            best = rows
    return best


def _packed(pieces: list[_Piece], width: int) -> list[list[_Piece]]:
    """First fit: rows of at most `width`."""
    rows: list[list[_Piece]] = []
    free: list[int] = []
    for piece in pieces:
        row = next((r for r, room in enumerate(free) if room >= piece.length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(piece)
        free[row] -= piece.length
    return rows


def _width(rows: list[list[_Piece]]) -> int:
    return max(sum(piece.length for piece in row) for row in rows)


def _cost(rows: list[list[_Piece]], attention_tokens: float) -> float:
    """Of rows of equal width, in tokens."""
    width = _width(rows)
    return len(rows) * width * (1 + width / attention_tokens)


def _lay_out(rows: list[list[_Piece]], is_part: bool) -> Rows:
    width = _width(rows)
    shape = (len(rows), width)
    token, position, branch = (np.zeros(shape, np.int64) for _ in range(3))
    owner = np.full(shape, -1, np.int64)
    predictors, targets, responses, lengths = [], [], [], []
    piece_index = 0
    for r, row in enumerate(rows):
        column = 0
        for piece in row:
            prompt = len(piece.prompt)
            token[r, column : column + prompt] = piece.prompt
            position[r, column : column + prompt] = np.arange(prompt)
            owner[r, column : column + piece.length] = piece_index
            last_of_prompt = r * width + column + prompt - 1
            column += prompt
            for number, (response, tokens) in enumerate(piece.responses, start=1):
                length = len(tokens)
                stretch = slice(column, column + length)
                token[r, stretch] = tokens
                position[r, stretch] = np.arange(prompt, prompt + length)
                branch[r, stretch] = number
                predictor = np.arange(r * width + column - 1, r * width + column + length - 1)
                predictor[0] = last_of_prompt  # shared by all responses of the piece
                predictors.append(predictor)
                targets.append(np.asarray(tokens))
                responses.append(response)
                lengths.append(length)
                column += length
            piece_index += 1
    return Rows(
        token=torch.from_numpy(token),
        position=torch.from_numpy(position),
        piece=torch.from_numpy(owner),
        branch=torch.from_numpy(branch),
        predictor=torch.from_numpy(np.concatenate(predictors)),
        target=torch.from_numpy(np.concatenate(targets)),
        response=torch.tensor(responses),
        length=torch.tensor(lengths),
        is_part=is_part,
    )


def shared_layout_obstacle(config: PreTrainedConfig) -> str | None:
    """Why this model cannot take the shared layout as far as its config tells, or None."""
    implementation = config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        return f"attention implementation {implementation} takes no explicit mask"
    foreign = set(getattr(config, "layer_types", None) or ()) - set(MASKED_LAYERS)
    if foreign:
        return f"its {', '.join(sorted(foreign))} layers carry state along the row"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its position biases (ALiBi) follow the position in the row"
    if (window := _unknown_window(config)) is not None:
        return (
            f"its {window} counts positions in the row, where other responses stand between a response and its prompt"
        )
    return None


def _unknown_window(config: PreTrainedConfig) -> str | None:
    """The entry by which a model limits attention in a way `shared_mask` does not know, such as GPT-Neo's, or None."""
    kinds = getattr(config, "attention_layers", None)  # GPT-Neo: one of global and local for every layer
    if isinstance(kinds, list | tuple):
        return f"window_size {getattr(config, 'window_size', '')} of local attention" if "local" in kinds else None
    for name, value in config.to_dict().items():
        limits = "window" in name or name in ("local_attention", "attention_dilations", "local_block_size")
        if limits and name.lstrip("_") not in _KNOWN_WINDOWS and value and not isinstance(value, dict):
            return f"{name} {value}"
    return None


def shared_mask(rows: Rows, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The attention mask for the model's backbone: a mask, or one per layer type where layers differ.

    Args:
        rows: one chunk, on the model's device.
        config: the text model's config; names the attention implementation and the layers' windows.
        dtype: of the hidden states; eager attention adds the mask to its scores.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if not layer_types:  # one kind of layer, windowed or not (Mistral)
        return _mask(rows, config, dtype, window=window)
    masks = {
        "full_attention": lambda: _mask(rows, config, dtype),
        "sliding_attention": lambda: _mask(rows, config, dtype, window=window),
        "chunked_attention": lambda: _mask(rows, config, dtype, chunk=chunk),
    }
    if layer_types == {"full_attention"}:
        return masks["full_attention"]()
    return {name: masks[name]() for name in layer_types}


def _mask(
    rows: Rows, config: PreTrainedConfig, dtype: torch.dtype, window: int | None = None, chunk: int | None = None
) -> Any:
    count, width = rows.token.shape

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        past = rows.position[b, k] <= rows.position[b, q]
        same_branch = (rows.branch[b, k] == 0) | (rows.branch[b, k] == rows.branch[b, q])
        allowed = (rows.piece[b, q] == rows.piece[b, k]) & same_branch & past
        if window is not None:
            allowed = allowed & (rows.position[b, k] > rows.position[b, q] - window)
        if chunk is not None:
            allowed = allowed & (rows.position[b, k] // chunk == rows.position[b, q] // chunk)
        return allowed

    if config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, count, None, width, width, device=str(rows.token.device))
    device = rows.token.device
    b = torch.arange(count, device=device).view(-1, 1, 1)
    column = torch.arange(width, device=device)
    allowed = sees(b, b, column.view(1, -1, 1), column.view(1, 1, -1)).unsqueeze(1)  # [R, 1, L, L]
    if config._attn_implementation == "eager":  # adds its mask, so a boolean one would be silently wrong
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
    return allowed
