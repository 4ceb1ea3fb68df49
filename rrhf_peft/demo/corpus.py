"""Little stories drawn from the quickstart's own grammar: text to make a base model from.

A story is a beginning (two sentences that leave the mood open) and a continuation whose mood is
cheerful, neutral or sad. A model trained on them writes all three kinds from the same beginning,
which leaves something for a reward to prefer.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from rrhf_peft.demo.grammar import DAYS, ENDINGS, ERRANDS, OPENINGS, PEOPLE, PLACES, REACTIONS, Errand

MOODS = ("cheerful", "neutral", "sad")
#: How often a story has each mood. Cheerful ones are the minority, so that there is something to gain.
MOOD_SHARES = (0.25, 0.40, 0.35)
#: How often a sentence keeps its story's mood; the others are neutral.
STEADINESS = 0.7


class Story(NamedTuple):
    """A story in two parts.

    Attributes:
        prompt: Two sentences without a mood.
        continuation: Four or five sentences; begins with a space, so that prompt + continuation is the text.
        mood: One of `MOODS`.
    """

    prompt: str
    continuation: str
    mood: str


def make_stories(count: int, seed: int) -> list[Story]:
    """Draw `count` stories with distinct texts; the same seed gives the same stories."""
    rng = random.Random(seed)
    stories: dict[str, Story] = {}
    while len(stories) < count:
        story = _draw_story(rng)
        stories.setdefault(story.prompt + story.continuation, story)
    return list(stories.values())


def make_prompts(count: int, seed: int) -> list[str]:
    """Draw `count` distinct story beginnings."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[_draw_story(rng).prompt] = None
    return list(prompts)


def _draw_story(rng: random.Random) -> Story:
    (name, they, them, their), (friend, *_) = rng.sample(PEOPLE, 2)
    slots = {
        "name": name,
        "friend": friend,
        "they": they,
        "They": they.capitalize(),
        "them": them,
        "their": their,
        "place": rng.choice(PLACES),
        "day": rng.choice(DAYS),
    }
    errand: Errand = rng.choice(ERRANDS)
    beginning = [rng.choice(OPENINGS), errand.wish]
    mood = rng.choices(MOODS, MOOD_SHARES)[0]
    outcome = rng.choice(getattr(errand, mood))
    reactions: list[str] = []
    length = rng.choice((2, 3))
    while len(reactions) < length:
        sentence = rng.choice(REACTIONS[_mood_of_sentence(mood, rng)])
        if sentence not in reactions:
            reactions.append(sentence)
    ending = rng.choice(ENDINGS[_mood_of_sentence(mood, rng)])
    prompt = " ".join(beginning).format(**slots)
    continuation = " ".join([outcome, *reactions, ending]).format(**slots)
    return Story(prompt, " " + continuation, mood)


def _mood_of_sentence(mood: str, rng: random.Random) -> str:
    return mood if rng.random() < STEADINESS else "neutral"
