"""The example shows every token, role, score and mask, in plain text too, and data cannot steer the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rrhf_peft.data import render_example, tokenize_groups
from rrhf_peft.records import RankedGroup

GROUP = RankedGroup(
    "Say\nhi [bold]now[/bold]",
    ["hi", "oh \x1b[31mno", "hi", "a longer answer"],
    [2.0, -1.0, 2.0, 0.5],
    ["human", "model", "human", "\x1b[2Jevil"],
    origin={"file": "data.jsonl", "line": 4},
)


def shown(tokenizer, *, max_tokens=40, width=80, **keys):
    (tokenized,), _ = tokenize_groups([GROUP], tokenizer, max_tokens=max_tokens)
    console = Console(file=io.StringIO(), width=width, **{"force_terminal": False, **keys.pop("console", {})})
    console.print(render_example(GROUP, tokenized, tokenizer, **keys))
    return console.file.getvalue()


def test_plain_text_says_it_all(byte_tokenizer):
    text = shown(byte_tokenizer, width=160)
    lines = [line.split() for line in text.splitlines()]
    assert text.splitlines()[0] == "Example: group 0, file data.jsonl, line 4"
    assert "3 responses to rank, 4 read" in text
    assert lines[4][:2] == ["prompt", "0"]
    assert "|<s>|S|a|y|\\n|h|i| |[|b|o|l|d|]|" in text
    assert "|h|i|</s>|" in text
    assert "score 2 (best)" in text
    assert "score -1" in text
    assert "cut: no end" not in text
    assert [line[2] for line in lines if line[:1] == ["response"]] == ["1", "1", "1"]


def test_a_cut_response_is_marked(byte_tokenizer):
    assert "cut: no end" in shown(byte_tokenizer, max_tokens=30)


def test_data_cannot_steer_the_terminal(byte_tokenizer):
    text = shown(byte_tokenizer, width=200)
    assert "\x1b" not in text
    assert "\\x1b" in text


def test_it_fits_80_columns_and_colours_on_a_terminal(byte_tokenizer):
    assert max(map(len, shown(byte_tokenizer).splitlines())) <= 80
    coloured = shown(byte_tokenizer, console={"force_terminal": True, "color_system": "truecolor"})
    assert "\x1b[30;102m" in coloured


@pytest.mark.parametrize(("limit", "hidden"), [(4, 20), (5, 19), (24, 0)])
def test_long_sequences_show_both_ends(byte_tokenizer, limit, hidden):
    """The prompt has 24 tokens."""
    text = shown(byte_tokenizer, width=200, max_tokens_shown=limit)
    prompt = next(line for line in text.splitlines() if line.startswith("prompt"))
    assert (f"... {hidden} more ..." in prompt) == bool(hidden)
    tokens = prompt.replace(f" ... {hidden} more ... |", "").split("|")[1:-1]
    assert len(tokens) == 24 - hidden
    assert (tokens[0], tokens[-1]) == ("<s>", "]")


def test_sentencepiece_words_keep_their_space(llama2_tokenizer):
    group = RankedGroup("Hello there", [" Fine thanks", " no"], [1.0, 0.0], ["a", "b"])
    (tokenized,), _ = tokenize_groups([group], llama2_tokenizer)
    console = Console(file=io.StringIO(), width=100)
    console.print(render_example(group, tokenized, llama2_tokenizer))
    assert "|<s>| Hello| there|" in console.file.getvalue()
    assert "| Fine| thanks|</s>|" in console.file.getvalue()


def test_of_many_responses_the_best_and_the_worst_are_shown(byte_tokenizer):
    group = RankedGroup("q", [f"answer {n}" for n in range(36)], [float(n % 12) for n in range(36)])
    (tokenized,), _ = tokenize_groups([group], byte_tokenizer)
    console = Console(file=io.StringIO(), width=120)
    console.print(render_example(group, tokenized, byte_tokenizer))
    text = console.file.getvalue()
    assert "36 responses to rank, 36 read; shown are the best 4 and the worst 4" in text
    shown = [int(number) for number in re.findall(r"^response (\d+)", text, flags=re.M)]
    assert shown == [1, 11, 12, 13, 24, 25, 26, 36]
