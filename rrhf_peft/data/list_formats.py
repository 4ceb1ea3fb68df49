"""Formats whose rows hold a prompt with a list of responses: each row is a group, or several.

Each function is named after its format; its docstring says where the layout comes from.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from rrhf_peft.data.rated_groups import numbered_sources, rated_group, score_of_rank
from rrhf_peft.data.rows import Row
from rrhf_peft.records import RankedGroup


def ranked(row: Row) -> RankedGroup:
    """Our own: prompt, responses[], scores[], and sources[] where known."""
    return _scored(row, "prompt", "responses")


def rrhf(row: Row) -> RankedGroup:
    """query, responses[], scores[] or prompt, response[], scores[]."""
    return _scored(row, "query", "responses") if row.has("query") else _scored(row, "prompt", "response")


def ultrafeedback(row: Row) -> RankedGroup:
    """openbmb/UltraFeedback: instruction, completions[] of response, model and annotations.<aspect>.Rating.

    The score is the mean of the aspects' ratings (the data set's own fine-grained score), because
    ``overall_score`` has had known errors. Ratings are text and may say "N/A". An aspect that is rated for no
    completion of the row is left out of the mean; a completion that misses an aspect which others have is
    unrated, since its mean would compare different things.
    """
    completions = row.objects("completions")
    ratings = [_aspect_ratings(completion) for completion in completions]
    aspects = {aspect for own in ratings for aspect, rating in own.items() if rating is not None}
    return rated_group(
        row.text("instruction"),
        [completion.text("response") for completion in completions],
        [_mean_of(own, aspects) for own in ratings],
        [completion.text("model") for completion in completions],
        row.meta(("instruction", "completions", "models")),
    )


def nectar(row: Row) -> RankedGroup:
    """berkeley-nest/Nectar: prompt (an HH transcript), answers[] of answer, model and rank, 1 the best."""
    answers = row.objects("answers")
    return rated_group(
        row.text("prompt"),
        [answer.text("answer") for answer in answers],
        [score_of_rank(answer.rating("rank")) for answer in answers],
        [answer.text("model") for answer in answers],
        row.meta(("prompt", "answers")),
    )


def lmflow(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """LMFlow's ``text_to_scored_textlist``: instances[] of input and output[] of text and score.

    The instances alone, one per row, are read as well.
    """
    for row in rows:
        if row.has("type") and row.values["type"] != "text_to_scored_textlist":
            raise row.problem(
                f"type is {row.values['type']!r}. Of LMFlow's types only text_to_scored_textlist has scores for lists "
                "of responses; convert the file, or use format preference for pairs."
            )
        whole = row.has("instances")
        for place, instance in enumerate(row.objects("instances") if whole else [row]):
            answers = instance.objects("output")
            meta: dict[str, Any] = row.meta(("type", "instances", "input", "output"))
            yield rated_group(
                instance.text("input"),
                [answer.text("text") for answer in answers],
                [answer.rating("score") for answer in answers],
                numbered_sources(len(answers)),
                {**meta, "instance": place} if whole else meta,
            )


def pro(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """PRO (DAMO-ConvAI): prefix[][], suffix[], reward[]; a prefix for each suffix, usually all the same.

    A prefix is a list of turns marked <|prompter|> and <|assistant|>, which become an HH transcript as in PRO's
    trainer, or one text. Different prefixes make different groups. Files that PRO wrote without a reward model have
    reward 1 everywhere, and therefore nothing but ties: their order is not trusted.
    """
    for row in rows:
        responses = row.texts("suffix")
        rewards, prefixes = row.scores("reward", len(responses)), row.items("prefix")
        if len(prefixes) != len(responses):
            raise row.problem(
                f"prefix has {len(prefixes)} entries for {len(responses)} of suffix. Give every suffix its prefix."
            )
        groups: dict[str, list[int]] = {}
        for place, prefix in enumerate(prefixes):
            groups.setdefault(_transcript(row, prefix, f"prefix[{place}]"), []).append(place)
        for prompt, places in groups.items():
            space = " " if prompt.endswith("Assistant:") else ""
            yield RankedGroup(
                prompt,
                [space + responses[place] for place in places],
                [rewards[place] for place in places],
                [f"response-{place}" for place in places],
                row.meta(("prefix", "suffix", "reward")),
            )


def _scored(row: Row, prompt: str, responses: str) -> RankedGroup:
    texts = row.texts(responses)
    scores = row.scores("scores", len(texts))
    if row.has("sources"):
        sources = row.texts("sources")
        if len(sources) != len(texts):
            raise row.problem(
                f"sources has {len(sources)} entries for {len(texts)} responses. Name every response's source, or "
                "leave the column out."
            )
    else:
        sources = numbered_sources(len(texts))
    used = (prompt, responses, "scores", "sources")
    return RankedGroup(row.prompt(prompt), texts, scores, sources, row.meta(used))


def _aspect_ratings(completion: Row) -> dict[str, float | None]:
    annotations = completion.object("annotations")
    return {
        aspect: annotations.object(aspect).rating("Rating") if annotations.has(aspect) else None
        for aspect in annotations.values
    }


def _mean_of(ratings: dict[str, float | None], aspects: set[str]) -> float | None:
    values = [ratings.get(aspect) for aspect in sorted(aspects)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _transcript(row: Row, prefix: Any, field: str) -> str:
    turns = prefix if isinstance(prefix, list) else [prefix]
    text = "".join(row.as_text(turn, field) for turn in turns)
    if "<|prompter|>" not in text and "<|assistant|>" not in text:
        return text
    return text.replace("<|prompter|>", "\n\nHuman: ").replace("<|assistant|>", "\n\nAssistant: ").rstrip()
