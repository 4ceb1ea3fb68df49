"""Plain figures about texts: how varied and how long they are. Words are what whitespace separates."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams, pooled over the texts; 0 where there are none.

    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (https://arxiv.org/abs/1510.03055). It falls with the amount of text, so compare like with like.
    """
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_words(texts: Sequence[str]) -> float:
    """Mean number of words per text; 0 where there are no texts."""
    return sum(len(text.split()) for text in texts) / len(texts) if texts else 0.0
