"""The numbers of an evaluation, from the files in its folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rrhf_peft.evaluate.folder import OutputFolder
from rrhf_peft.evaluate.inputs import Plan, training_of
from rrhf_peft.evaluate.statistics import (
    distinct_n,
    expected_best,
    mean_repetition,
    mean_reward,
    mean_words,
    preference_figures,
    reward_verdicts,
    win_shares,
)
from rrhf_peft.records import UserError

Row = dict[str, Any]


def make_figures(plan: Plan, folder: OutputFolder) -> dict[str, Any]:
    """The contents of `evaluation.json`.

    Of each policy, over all k responses to every prompt, empty ones included:
        model, adapter, responses: what it is, and how many responses it gave.
        template, quantization: as it was evaluated; `differs_from_training` says where that is not as it was trained.
        train: seconds, peak memory, steps and objective of the run in the adapter's (or model's) folder, or None.
        rewards: label -> mean over prompts of the mean reward, with a bootstrap interval over prompts.
        unrewarded: label -> responses that the scorer gave no reward; they do not count.
        best_of_n: label -> size -> expected reward of the best of n (`best_of.expected_best`).
        perplexity: of the responses under the judge, every token alike, EOS not counted.
        reference_perplexity: of the reference answers under the policy, tokenised as training does, EOS included.
        preference: how p_i orders the labelled groups (`ranking.PreferenceFigures`).
        distinct_1, distinct_2, repetition (seq-rep-4), words: of the texts (`evaluation.texts`).
        tokens, unfinished: mean tokens, and the share cut at max_new_tokens.

    Of each policy but the one compared with, in `differences`: label -> how much more reward it has than that one on
    the prompts that both were rewarded on, with an interval that resamples those prompts, and how many they are. The
    policies answer the same prompts, so that this interval is narrower than those of the two means.

    Of each comparison in `wins`: shares of win, tie and lose, each the mean over prompts of its share of the answer
    pairs (response i against response i); the win rate, a tie counting half, with an interval over prompts, and what
    it would be at equal length; and `failures`, pairs without a verdict.

    Raises:
        UserError: files of the folder do not fit together.
    """
    section = plan.section
    samples = {name: folder.rows("samples", name) for name in plan.policies}
    rewards = {
        name: {label: _rewards(folder, name, label, samples[name]) for label in section.scorers}
        for name in plan.policies
    }
    figures = {
        "version": 1,
        "settings": _settings(plan),
        "headline": next(iter(section.scorers), None),
        "policies": {name: _policy(plan, folder, name, samples[name], rewards[name]) for name in plan.policies},
    }
    against = section.wins.against if section.wins is not None else next(iter(plan.policies))
    others = [name for name in plan.policies if name != against]
    figures["differences"] = [
        {"policy": name, "against": against, "rewards": _differences(plan, rewards[name], rewards[against])}
        for name in others
    ]
    figures["wins"] = [_wins(plan, folder, name, samples, rewards) for name in others] if section.wins else []
    return figures


def _differences(
    plan: Plan, own: dict[str, list[list[float | None]]], other: dict[str, list[list[float | None]]]
) -> dict[str, dict[str, Any]]:
    """Label -> mean difference of the two policies' mean rewards over the prompts that both were rewarded on."""
    found = {}
    for label in own:
        both = [(_known(mine), _known(theirs)) for mine, theirs in zip(own[label], other[label], strict=True)]
        apart = [[float(np.mean(mine) - np.mean(theirs))] for mine, theirs in both if mine and theirs]
        if apart:
            found[label] = {**_estimate(plan, apart), "prompts": len(apart)}
    return found


def _settings(plan: Plan) -> dict[str, Any]:
    section = plan.section
    names = {"decoding", "template", "stop", "max_prompt_tokens", "seed", "confidence", "resamples", "examples"}
    judge = section.perplexity
    return {
        "prompts": len(plan.prompts),
        "references": len(plan.references),
        "pairs": len(plan.pairs),
        "perplexity_judge": None if judge is None else judge.model or plan.recipe.model.name,
        "best_of": section.best_of_sizes,
        **section.model_dump(mode="json", include=names),
    }


def _policy(
    plan: Plan, folder: OutputFolder, name: str, rows: Sequence[Row], rewards: dict[str, list[list[float | None]]]
) -> dict[str, Any]:
    section, policy = plan.section, plan.policies[name]
    texts = [text for row in rows for text in row["responses"]]
    details = [own for row in rows for own in row["meta"]["candidates"]]
    known = {label: [_known(own) for own in groups] for label, groups in rewards.items()}
    train = training_of(policy.stage.adapter or policy.model.name)
    perplexity = _perplexity(folder, "perplexity", name) if section.perplexity is not None else None
    return {
        "model": policy.model.name,
        "adapter": policy.stage.adapter,
        "template": policy.template,
        "quantization": policy.model.quantization,
        "differs_from_training": policy.differences,
        "responses": len(texts),
        "train": train,
        "rewards": {label: _estimate(plan, own) for label, own in known.items() if any(own)},
        "unrewarded": {label: sum(one is None for own in groups for one in own) for label, groups in rewards.items()},
        "best_of_n": {label: _best_of(plan, own) for label, own in known.items() if any(own)},
        "perplexity": perplexity,
        "reference_perplexity": _perplexity(folder, "references", name) if plan.references else None,
        "preference": _preference(plan, folder, name) if plan.pairs else None,
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "repetition": mean_repetition(texts),
        "words": mean_words(texts),
        "tokens": sum(own["num_tokens"] for own in details) / len(details),
        "unfinished": sum(own["finish_reason"] == "length" for own in details) / len(details),
    }


def _known(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]


def _rewards(folder: OutputFolder, name: str, label: str, samples: Sequence[Row]) -> list[list[float | None]]:
    """For each prompt, the reward of each response; None where the scorer gave none."""
    rewards: list[list[float | None]] = [[None] * len(row["responses"]) for row in samples]
    place_of = {row["meta"]["prompt_index"]: place for place, row in enumerate(samples)}
    for row in folder.rows("scored", name, label):
        place = place_of.get(row["meta"]["prompt_index"], -1)
        kept = row["meta"].get("kept") or range(len(row["responses"]))
        if place < 0 or [samples[place]["responses"][own] for own in kept] != row["responses"]:
            raise UserError(
                f"{folder.file('scored', name, label)}: rewards other responses than those of "
                f"{folder.file('samples', name)}. Remove it and run the same command again."
            )
        for own, score in zip(kept, row["scores"], strict=True):
            rewards[place][own] = score
    return rewards


def _estimate(plan: Plan, per_prompt: Sequence[Sequence[float]]) -> dict[str, float]:
    section = plan.section
    groups = [own for own in per_prompt if own]
    return asdict(mean_reward(groups, confidence=section.confidence, resamples=section.resamples, seed=section.seed))


def _best_of(plan: Plan, per_prompt: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Size -> expected best; prompts with fewer rewards than that do not count."""
    found = {}
    for size in plan.section.best_of_sizes:
        bests = [[expected_best(own, size)] for own in per_prompt if len(own) >= size]
        if bests:
            found[str(size)] = _estimate(plan, bests)
    return found


def _perplexity(folder: OutputFolder, stage: str, name: str) -> float | None:
    """Of all tokens of all texts; None where there is none."""
    log_probs = [own for row in folder.rows(stage, name) for own in row["log_probs"] if own is not None]
    tokens = sum(count for _, count in log_probs)
    if not tokens:
        return None
    return math.exp(min(-math.fsum(total for total, _ in log_probs) / tokens, 700.0))


def _preference(plan: Plan, folder: OutputFolder, name: str) -> dict[str, Any] | None:
    section = plan.section
    preferences, scores = [], []
    for group, row in zip(plan.pairs, folder.rows("pairs", name), strict=True):
        known = [
            (own[0] / own[1], score)
            for own, score in zip(row["log_probs"], group.known_scores, strict=True)
            if own is not None  # a response without text has no p_i
        ]
        preferences.append([p for p, _ in known])
        scores.append([score for _, score in known])
    found = preference_figures(
        preferences, scores, confidence=section.confidence, resamples=section.resamples, seed=section.seed
    )
    return None if found is None else asdict(found)


def _wins(
    plan: Plan,
    folder: OutputFolder,
    name: str,
    samples: dict[str, list[Row]],
    rewards: dict[str, dict[str, list[list[float | None]]]],
) -> dict[str, Any]:
    wins = plan.section.wins
    assert wins is not None
    against, by = wins.against, wins.by if isinstance(wins.by, str) else wins.by.model
    if isinstance(wins.by, str):
        groups = zip(rewards[name][wins.by], rewards[against][wins.by], strict=True)
        verdicts: list[list[int | None]] = [_by_reward(own, theirs, wins.tie_margin) for own, theirs in groups]
    else:
        verdicts = [row["verdicts"] for row in folder.rows("wins", name)]
    longer = [
        [float(len(own) - len(theirs)) for own, theirs in zip(mine["responses"], other["responses"])]  # noqa: B905
        for mine, other in zip(samples[name], samples[against], strict=True)
    ]
    pairs = [
        [(verdict, more) for verdict, more in zip(own, lengths, strict=True) if verdict is not None]
        for own, lengths in zip(verdicts, longer, strict=True)
    ]
    shares = win_shares([[one for one, _ in own] for own in pairs], [[more for _, more in own] for own in pairs])
    rates = [[(one + 1) / 2 for one, _ in own] for own in pairs]  # a win counts 1, a tie half
    rate = _estimate(plan, rates) if any(rates) else None
    failures = sum(verdict is None for own in verdicts for verdict in own)
    return {"policy": name, "against": against, "by": by, **asdict(shares), "win_rate": rate, "failures": failures}


def _by_reward(own: Sequence[float | None], theirs: Sequence[float | None], margin: float) -> list[int | None]:
    return [
        None if mine is None or other is None else reward_verdicts([mine], [other], margin)[0]
        for mine, other in zip(own, theirs)  # noqa: B905 - as many as both have
    ]
