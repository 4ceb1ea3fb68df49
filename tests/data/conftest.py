"""Tokenizers of each kind, and files with given content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def byte_tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    """One token per byte, BOS 1, EOS 2: lengths are plain to see."""
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def stories_tokenizer(tinystories: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tinystories)


@pytest.fixture(scope="session")
def llama2_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
    """Built from a bare SentencePiece model."""
    pytest.importorskip("sentencepiece")
    return LlamaTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines; a string is written as it is."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
