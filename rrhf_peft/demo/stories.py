"""Little stories drawn from a small grammar, written for this project: text to make a base model from.

A story is a beginning (two sentences that leave the mood open) and a continuation whose mood is cheerful, neutral or
sad. A model trained on them writes all three kinds from the same beginning, which leaves something for a reward to
prefer: `cheerfulness`, by a small lexicon, stands in for a reward model.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import NamedTuple

MOODS = ("cheerful", "neutral", "sad")
#: How often a story has each mood. Cheerful ones are the minority, so that there is something to gain.
MOOD_SHARES = (0.25, 0.40, 0.35)
#: How often a sentence keeps its story's mood; the others are neutral.
STEADINESS = 0.7


# ---- The grammar ----
# Slots: `{name}` and `{friend}` are two people, `{they}` `{them}` `{their}` the first one's pronouns (`{They}` with a
# capital), `{place}` where it happens, `{day}` when.

_NAMES = "Mira Otto Nell Jonas Ada Piet Lena Hugo Ida Emil Rosa Karl Tilda Bram Wanda Felix"
#: (name, subject, object, possessive)
PEOPLE = [
    (name, *pronouns)
    for name, pronouns in zip(_NAMES.split(), itertools.cycle((("she", "her", "her"), ("he", "him", "his"))))
]
PLACES = (
    "by the harbor, near the old mill, at the edge of the forest, on the hill, beside the river, behind the bakery, "
    "in the valley, next to the lighthouse, on the market square, at the end of the lane"
).split(", ")
DAYS = (
    "On Monday, One morning, In the autumn, Late in May, One evening, On the first of June, Before the winter, "
    "After the rain, On Saturday, At noon"
).split(", ")
OPENINGS = (
    "{day}, {name} walked with {friend} to the house {place}.",
    "{name} lived {place} with {friend} and a gray cat.",
    "There was a small shop {place}, where {name} worked for {friend}.",
    "{day}, {name} met {friend} {place}.",
    "{name} and {friend} had a little garden {place}.",
    "{day}, {name} stood {place} with {friend}.",
)


class Errand(NamedTuple):
    """What somebody sets out to do, and how it may turn out."""

    wish: str
    cheerful: tuple[str, ...]
    neutral: tuple[str, ...]
    sad: tuple[str, ...]


ERRANDS = (
    Errand(
        "{They} wanted to fly a red kite.",
        (
            "The wind was kind, and the kite danced above the roofs.",
            "The kite rose high, and it was a wonderful sight.",
        ),
        ("The wind came and went, and the kite stayed low.", "{They} tied the string to a post and waited for wind."),
        ("The wind broke the string, and the kite was lost.", "The kite fell into a thorn bush and was ruined."),
    ),
    Errand(
        "{They} had promised to bake a cake for {friend}.",
        ("The cake came out golden and sweet.", "The kitchen smelled delicious, and the cake was perfect."),
        ("The cake took an hour in the oven.", "{They} used four eggs and a cup of flour."),
        ("The cake burned, and the kitchen was full of bitter smoke.", "The oven was broken, and the cake was ruined."),
    ),
    Errand(
        "{They} was waiting for a letter from {friend}.",
        ("The letter came at last, full of good news.", "The letter came with a lovely drawing inside."),
        ("The letter came on a Tuesday with a plain stamp.", "The postman said that the mail came twice a week."),
        ("The letter never came, and the box stayed empty.", "The letter came with terrible news."),
    ),
    Errand(
        "{They} planted a pear tree and watched it every day.",
        ("The tree bloomed, and its fruit was sweet.", "The tree grew strong, and birds sang in it."),
        ("The tree grew about a hand each year.", "The tree stood between the fence and the well."),
        ("The tree withered, and its leaves fell.", "A storm broke the tree in one cruel night."),
    ),
    Errand(
        "{They} went out to look for the gray cat.",
        ("The cat was safe and purred with delight.", "The cat came home, and it was a happy hour."),
        ("The cat sat on a wall and looked at the road.", "The cat was asleep under a cart."),
        ("The cat was hurt, and it cried all night.", "The cat was gone, and nobody found it."),
    ),
    Errand(
        "{They} built a boat from old planks.",
        ("The boat was strong and sailed beautifully.", "The boat won the race, and the people cheered."),
        ("The boat was as long as two doors.", "The boat stayed on the shore for the season."),
        ("The boat leaked and sank in the cold water.", "The boat hit a rock and was lost."),
    ),
    Errand(
        "{They} learned a song to play at the fair.",
        ("The song was lovely, and the people danced.", "The people cheered, and the song made them happy."),
        ("The song had three verses and a short end.", "{They} played it after the second bell."),
        (
            "{They} forgot the song, and the people laughed at {them} and were cruel.",
            "The fiddle broke, and it was a bitter moment.",
        ),
    ),
    Errand(
        "{They} carried a basket of apples to the market.",
        (
            "The apples were delicious, and all were sold with a smile.",
            "A kind woman gave {them} a gold coin for the apples.",
        ),
        ("{They} sold half of the apples and kept the rest.", "The market opened at eight and closed at four."),
        ("The basket fell, and the apples were ruined.", "A thief took the apples, and {they} was alone and afraid."),
    ),
    Errand(
        "{They} asked {friend} to paint the door.",
        ("The door became bright and beautiful.", "They sang as they painted, and it was great fun."),
        ("The door became green, like the door beside it.", "The paint was dry by the next day."),
        ("The paint was spilled, and {friend} was angry.", "They had an ugly quarrel about the paint."),
    ),
    Errand(
        "{They} followed an old map into the hills.",
        ("The map led to a treasure, and it was a wonderful day.", "The map led to a beautiful lake."),
        ("The map showed a road, a bridge and a well.", "The map led back to the road."),
        ("The map was wrong, and {they} was lost in the dark.", "{They} fell in the hills and was badly hurt."),
    ),
)

REACTIONS: dict[str, tuple[str, ...]] = {
    "cheerful": (
        "{name} laughed and felt happy.",
        "{friend} gave {them} a warm hug.",
        "They shared a feast with all their friends.",
        "The sun was bright, and the birds sang.",
        "{name} danced for joy.",
        "{friend} smiled and was proud of {them}.",
        "Everyone cheered, and the evening was merry.",
        "It was the best day of the year.",
        "{name} thanked {friend}, who was a good friend.",
        "They played a game, and it was great fun.",
    ),
    "neutral": (
        "{name} put {their} hat on the shelf.",
        "{friend} asked what time it was.",
        "The clock on the tower struck five.",
        "They drank tea and talked about the road.",
        "A cart went by with a load of hay.",
        "{name} closed the window and swept the floor.",
        "{friend} counted the steps to the gate.",
        "The boats came in with the tide.",
        "There was bread and soup for supper.",
        "{name} wrote it down in a book.",
    ),
    "sad": (
        "{name} cried and felt alone.",
        "{friend} was angry and said cruel words.",
        "A cold rain fell, and the fire went out.",
        "{name} was tired and hungry.",
        "Nobody came to help, and {they} was afraid.",
        "{friend} was sick and lay in bed.",
        "They had a bitter quarrel.",
        "It was the worst day of the year.",
        "{name} lost {their} purse in the dark.",
        "The house was empty and gloomy.",
    ),
}

ENDINGS: dict[str, tuple[str, ...]] = {
    "cheerful": (
        "{name} went home happy and slept well.",
        "They were good friends from that day on.",
        "It was a wonderful day, and {name} never forgot it.",
        "In the end all was well, and {name} smiled.",
        "That night {name} dreamed sweet dreams.",
    ),
    "neutral": (
        "Then {name} went home and locked the door.",
        "The next day was much like the day before.",
        "{name} said that it would be so again next year.",
        "In the end {name} and {friend} went their own ways.",
        "That night there was a new moon.",
    ),
    "sad": (
        "{name} went home sad and could not sleep.",
        "They were never friends again.",
        "It was a terrible day, and {name} never forgot it.",
        "In the end all was lost, and {name} wept.",
        "That night {name} was afraid and alone.",
    ),
}


# ---- Drawing stories ----


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


# ---- The reward ----
# Named in a scoring rule as `rrhf_peft.demo.stories:cheerfulness`.

CHEERFUL = frozenset(
    """
    beautiful beautifully best bloomed bright cheered cheerful danced delicious delight dreams feast
    fun friend friends glad gold golden good great happy hug joy kind laughed lovely loved merry
    perfect proud purred safe sang shared smile smiled strong sun sweet thanked treasure warm
    won wonderful
    """.split()
)
GLOOMY = frozenset(
    """
    afraid alone angry badly bitter broke broken burned cold cried cruel dark empty fell gloomy gone
    hungry hurt leaked lost nobody quarrel ruined sad sank sick smoke spilled storm terrible
    thief thorn tired ugly wept withered worst wrong
    """.split()
)


def cheerfulness(prompt: str, responses: list[str]) -> list[float]:
    """Score each response between -1 (gloomy) and 1 (cheerful); 0 is neither.

    The score is (c - g) / (c + g + 1), where c and g are the numbers of different cheerful and gloomy
    words: each counts once however often it is repeated, so that saying "happy" ten times earns no more than
    saying it once. The prompt is not judged: it is the same for all of them.
    """
    return [_cheerfulness(response) for response in responses]


def _cheerfulness(text: str) -> float:
    words = set(re.findall(r"[a-z]+", text.lower()))
    cheerful, gloomy = len(words & CHEERFUL), len(words & GLOOMY)
    return (cheerful - gloomy) / (cheerful + gloomy + 1)
