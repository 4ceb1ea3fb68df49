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


def mean_repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of n-grams of words that a text has said before, mean over texts: 1 - different / all, within each text.

    seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training"
    (https://arxiv.org/abs/1908.04319), over words instead of tokens. A text of fewer than n words repeats nothing.
    """
    shares = []
    for words in map(str.split, texts):
        grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0
