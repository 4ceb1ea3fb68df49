"""The quickstart's own text: deterministic, plain, consistent, open in its beginnings."""

from __future__ import annotations

import re
from collections import Counter

from rrhf_peft.demo.stories import (
    CHEERFUL,
    GLOOMY,
    MOOD_SHARES,
    MOODS,
    PEOPLE,
    cheerfulness,
    make_prompts,
    make_stories,
)

STORIES = make_stories(2000, seed=5)


def test_the_same_seed_gives_the_same_stories_and_another_seed_others() -> None:
    assert make_stories(50, seed=5) == STORIES[:50]
    assert make_stories(50, seed=6) != STORIES[:50]


def test_stories_are_distinct_plain_text() -> None:
    texts = [story.prompt + story.continuation for story in STORIES]
    assert len(set(texts)) == len(texts)
    for story, text in zip(STORIES, texts, strict=True):
        assert text.isascii()
        assert "{" not in text
        assert "  " not in text
        assert text == text.strip()
        assert story.continuation.startswith(" ")


def test_every_name_in_a_continuation_was_introduced_in_its_prompt() -> None:
    names = {person[0] for person in PEOPLE}
    for story in STORIES:
        mentioned = set(re.findall(r"[A-Z][a-z]+", story.continuation)) & names
        introduced = set(re.findall(r"[A-Z][a-z]+", story.prompt)) & names
        assert mentioned <= introduced
        assert len(introduced) == 2


def test_moods_occur_in_their_shares_and_the_beginning_does_not_tell_which() -> None:
    moods = Counter(story.mood for story in STORIES)
    for mood, share in zip(MOODS, MOOD_SHARES, strict=True):
        assert abs(moods[mood] / len(STORIES) - share) < 0.04
    assert {score for story in STORIES for score in cheerfulness("", [story.prompt])} == {0.0}


def test_the_reward_tells_the_moods_apart_and_grades_within_them() -> None:
    scores = {mood: [] for mood in MOODS}
    for story in STORIES:
        scores[story.mood] += cheerfulness(story.prompt, [story.continuation])
    mean = {mood: sum(own) / len(own) for mood, own in scores.items()}
    assert mean["cheerful"] > 0.7
    assert abs(mean["neutral"]) < 0.1
    assert mean["sad"] < -0.7
    assert len(set(scores["cheerful"])) > 5


def test_prompts_are_distinct_and_begin_the_same_stories() -> None:
    assert len(set(make_prompts(2000, seed=5))) == 2000
    assert make_prompts(50, seed=5) == [story.prompt for story in STORIES[:50]]


def test_cheerfulness_is_the_stated_formula_and_counts_each_word_once() -> None:
    assert cheerfulness("sad", ["Happy, happy sun! A COLD road.", "", "gone gone"]) == [1 / 4, 0.0, -1 / 2]
    everything = " ".join(CHEERFUL), " ".join(GLOOMY)
    assert all(abs(score) < 1 for score in cheerfulness("", list(everything)))
    assert not CHEERFUL & GLOOMY
