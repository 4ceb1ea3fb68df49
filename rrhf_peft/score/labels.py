"""Names for the shuffled responses of a group that tell nothing about them."""

from __future__ import annotations

import string


def letter_label(place: int) -> str:
    """A for 0, B for 1 ... Z, AA, AB ..."""
    letters, place = "", place + 1
    while place:
        place, letter = divmod(place - 1, 26)
        letters = string.ascii_uppercase[letter] + letters
    return letters
