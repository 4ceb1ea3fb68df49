"""The `rounds:` section: sample, score, train, evaluate, and again from the trained policy (IP-n)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rrhf_peft.recipe.sampling import SamplingSection
from rrhf_peft.recipe.scoring import CompositeScorer, HumanScorer, ScoringSection
from rrhf_peft.recipe.section import OutputPath, Section


class RoundsSection(Section):
    """What `rrhf-peft rounds` reads, beside `model`, `sampling`, `scoring`, `training` and `evaluation`.

    Their paths (sampling.output, scoring.input and output, data.train, training.output_dir, evaluation.output and
    policies) are set by the rounds and left out of the recipe. Entries of `sampling.candidates` that name no model,
    adapter or endpoint are the current policy. Round n draws with sampling.seed + n - 1 and trains with
    training.seed + n - 1, so that no round repeats the draws of another.
    """

    output: OutputPath = Field(description="The folder of all rounds; each has a folder of its own in it.")
    count: int = Field(3, ge=1, description="n of IP-n. May be raised later, to go on from the last round.")
    start_from: Literal["last", "base"] = Field(
        "last",
        description="last: each round trains the policy of the round before further. base: each trains the recipe's "
        "model anew, on what the policy of the round before has sampled.",
    )
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="Each round takes the next this many prompts, from the start again at the end. "
        "Unset: every round takes them all.",
    )


def round_paths(output: str, number: int) -> dict[str, dict[str, str]]:
    """Section -> key -> where round `number` (from 1) writes and reads."""
    folder = f"{output.rstrip('/')}/round-{number}"
    candidates, scored = f"{folder}/candidates.jsonl", f"{folder}/scored.jsonl"
    return {
        "sampling": {"output": candidates},
        "scoring": {"input": candidates, "output": scored},
        "data": {"train": scored},
        "training": {"output_dir": f"{folder}/run"},
        "evaluation": {"output": f"{folder}/evaluation"},
    }


def with_round_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's unchecked values with the paths of its first round filled in; without `rounds`, as they are.

    The first round's, so that the single verbs (`inspect`, `plan`, `train` ...) understand the recipe as well.

    Raises:
        ValueError: a path is set to something else.
    """
    rounds = values.get("rounds")
    output = rounds.get("output") if isinstance(rounds, dict) else None
    if not isinstance(output, str) or not output:
        return values
    filled = dict(values)
    for section, paths in round_paths(output, 1).items():
        own = values.get(section, {})
        if not isinstance(own, dict) or (section == "evaluation" and section not in values):
            continue  # no such section, or one that the schema refuses
        for key, path in paths.items():
            if own.get(key, path) != path:
                raise ValueError(f"{section}.{key}: is set by rounds, in {output}; remove it")
        if section in values or section in ("data", "training"):
            filled[section] = {**own, **paths}
    if isinstance(filled.get("evaluation"), dict):
        policies = filled["evaluation"].get("policies")
        if policies not in (None, {"base": {}}, {"base": {"model": None, "adapter": None}}):
            raise ValueError("evaluation.policies: is set by rounds (base, round-1 ...); remove it")
        if filled["evaluation"].get("wins") is not None:
            raise ValueError(
                "evaluation.wins: compares policies of one evaluation, and each round has its own; remove it, and "
                "compare the run folders with `rrhf-peft evaluate` afterwards"
            )
        filled["evaluation"]["policies"] = {"base": {}}
    return filled


def is_current_policy(entry: Any) -> bool:
    """Whether an entry of `sampling.candidates` stands for the policy that is being trained."""
    return entry.model is None and entry.adapter is None and entry.endpoint is None


def rounds_contradictions(
    sampling: SamplingSection | None, scoring: ScoringSection | None
) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for settings that cannot go together with `rounds`."""
    if sampling is not None and not any(map(is_current_policy, sampling.candidates)):
        yield (
            "sampling.candidates",
            "no entry is the policy that the rounds train, so that every round would sample the same; "
            "leave model, adapter and endpoint out of one entry",
        )
    scorer = None if scoring is None else scoring.scorer
    parts = [part.scorer for part in scorer.parts.values()] if isinstance(scorer, CompositeScorer) else [scorer]
    if any(isinstance(part, HumanScorer) for part in parts):
        yield (
            "scoring.scorer",
            "people rank one file of candidates, and every round makes another; run sample, score and train one by one",
        )
