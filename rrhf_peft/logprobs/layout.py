"""Where every token of a batch goes: chunks of rows that share each prompt, or one row per response.

A *piece* is a prompt with one or more of its responses, ``[P | R1 | R2 ...]``; every response's
positions restart at |P|. The shared layout makes pieces as large as the chunk allows; the plain
layout makes one piece per response and one row per piece, which is the usual padded batch.

Only integer arithmetic on lengths, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch


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
    """

    token: torch.Tensor
    position: torch.Tensor
    piece: torch.Tensor
    branch: torch.Tensor
    predictor: torch.Tensor
    target: torch.Tensor
    response: torch.Tensor
    length: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return Rows(**{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)})


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
) -> list[Rows]:
    """Split a batch into chunks of at most `chunk_tokens` padded tokens, where single pieces allow it.

    Whole groups stay together where they fit; a group that does not is split by its responses, each
    part with its own copy of the prompt. A response that does not fit alone gets a chunk alone.

    Args:
        prompt_lengths: G lengths, each at least 1.
        response_lengths: N lengths, each at least 1.
        group: N ascending group indices.
        layout: shared or plain.
        chunk_tokens: the budget, padding included.
    """
    pieces = list(_pieces(prompt_lengths, response_lengths, group, layout, chunk_tokens))
    pieces.sort(key=lambda piece: piece.length, reverse=True)  # stable, so equal batches plan alike
    chunks = []
    while pieces:
        rows, pieces = _fill_chunk(pieces, layout, chunk_tokens)
        chunks.append(_lay_out(rows))
    return chunks


def _pieces(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    group: Sequence[int],
    layout: str,
    chunk_tokens: int,
) -> list[_Piece]:
    pieces: list[_Piece] = []
    offset, response = 0, 0
    for index, prompt_length in enumerate(prompt_lengths):
        prompt = range(offset, offset + prompt_length)
        offset += prompt_length
        members: list[tuple[int, range]] = []
        length = prompt_length
        while response < len(group) and group[response] == index:
            tokens = range(offset, offset + response_lengths[response])
            if members and (layout == "plain" or length + len(tokens) > chunk_tokens):
                pieces.append(_Piece(prompt, tuple(members), length))
                members, length = [], prompt_length
            members.append((response, tokens))
            length += len(tokens)
            offset += len(tokens)
            response += 1
        assert members, f"group {index} has no response"
        pieces.append(_Piece(prompt, tuple(members), length))
    return pieces


def _fill_chunk(pieces: list[_Piece], layout: str, chunk_tokens: int) -> tuple[list[list[_Piece]], list[_Piece]]:
    """First fit, longest first. Rows are as long as the longest piece: attention grows with their square."""
    capacity = pieces[0].length
    most_rows = max(1, chunk_tokens // capacity)
    rows: list[list[_Piece]] = []
    free: list[int] = []
    left: list[_Piece] = []
    for piece in pieces:
        row = next((r for r, room in enumerate(free) if room >= piece.length), None) if layout == "shared" else None
        if row is not None:
            rows[row].append(piece)
            free[row] -= piece.length
        elif len(rows) < most_rows:
            rows.append([piece])
            free.append(capacity - piece.length)
        else:
            left.append(piece)
    return rows, left


def _lay_out(rows: list[list[_Piece]]) -> Rows:
    width = max(sum(piece.length for piece in row) for row in rows)
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
    )
