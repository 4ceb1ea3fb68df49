"""Everything an evaluation will read, looked at before hours of work: prompts, policies, scorers, judges.

A policy's answers and rewards are made by sampling and scoring, from recipes derived here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rrhf_peft.data import TEMPLATES, prompt_text, read_groups
from rrhf_peft.evaluate.folder import EVALUATION, OutputFolder
from rrhf_peft.modeling import load_tokenizer, resolve_source
from rrhf_peft.recipe import EvaluationSection, ModelSection, Recipe, make_recipe
from rrhf_peft.recipe.evaluation import PolicySection
from rrhf_peft.recipe.scoring import JudgeScorer, PolicyScorer, RewardModelScorer, RuleScorer
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.policies import Stage, check_adapters, make_stages
from rrhf_peft.sample.prompts import encode_prompts
from rrhf_peft.score.rule import load_rule


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated.

    Attributes:
        recipe: with the section `evaluation`.
        section: that section.
        prompts: the held-out prompts.
        policies: name -> model and adapter.
        references: prompts with one reference answer each; empty where none were asked for.
        pairs: labelled groups; empty where none were asked for.
    """

    recipe: Recipe
    section: EvaluationSection
    prompts: list[RankedGroup]
    policies: dict[str, Stage]
    references: list[RankedGroup]
    pairs: list[RankedGroup]


def make_plan(recipe: Recipe) -> Plan:
    """Read and check all that the evaluation needs.

    Raises:
        UserError: something is missing or cannot work; names the key.
    """
    section = recipe.evaluation
    assert section is not None, "load_recipe(needs=['evaluation'])"
    prompts = _read("prompts", section.prompts, lambda where: read_groups(where, **_reading(section), needs="prompt"))
    policies = {name: _policy(recipe, name, policy) for name, policy in section.policies.items()}
    _check_scorers(recipe, section)
    if section.perplexity is not None:
        if section.perplexity.model is None and recipe.model is None:
            raise UserError("evaluation.perplexity.model: name the judge; the recipe has no section model to take.")
        if section.perplexity.model is not None:
            resolve_source(section.perplexity.model, what="judge model (evaluation.perplexity.model)")
    _check_context(section, prompts, policies)
    return Plan(recipe, section, prompts, policies, _references(section), _pairs(section))


def sampling_recipe(plan: Plan, name: str, output: Path) -> Recipe:
    """What `rrhf-peft sample` would read to let one policy answer the prompts."""
    return _sampling_recipe(plan.recipe, name, plan.section.policies[name], str(output))


def scoring_recipe(plan: Plan, label: str, samples: Path, output: Path) -> Recipe:
    """What `rrhf-peft score` would read to reward one policy's answers by one scorer."""
    scoring = {
        "input": str(samples),
        "output": str(output),
        "scorer": plan.section.scorers[label].model_dump(),
        "seed": plan.section.seed,
    }
    return make_recipe({**_model_values(plan.recipe), "scoring": scoring}, f"evaluation.scorers.{label}", needs=())


def settings_of(plan: Plan, folder: OutputFolder) -> dict[str, Any]:
    """File relative to the output folder -> what it depends on, the files that it is made from apart."""
    section, found = plan.section, {}

    def add(stage: str, name: str, settings: Any, label: str | None = None) -> None:
        file = folder.file(stage, name, label).relative_to(folder.path)
        found[file.as_posix()] = json.loads(json.dumps(settings))

    prompts = _digest([item.prompt for item in plan.prompts])
    texts = section.model_dump(include={"template", "stop", "max_prompt_tokens"})
    limits = section.model_dump(include={"template", "max_prompt_tokens", "max_tokens"})
    own_model = None if plan.recipe.model is None else plan.recipe.model.model_dump(mode="json")
    for name, stage in plan.policies.items():
        described = stage.describe()
        policy = {"model": described["model"], "adapter": stage.adapter, "weights_sha256": described["files"]}
        decoding = section.decoding.model_dump()
        add("samples", name, {**policy, "decoding": decoding, **texts, "seed": section.seed, "prompts_sha256": prompts})
        for label, scorer in section.scorers.items():
            own = scorer.model_dump(mode="json", exclude=set(scorer.EFFORT))
            reads_model = {"model": own_model} if '"name": "policy"' in json.dumps(own) else {}
            add("scored", name, {"scorer": own, "seed": section.seed, **reads_model}, label)
        if section.perplexity is not None:
            model = section.perplexity.model or own_model
            judge = {"judge": model, "dtype": section.perplexity.dtype, "template": section.template}
            add("perplexity", name, judge)
        for stage_name, groups in (("references", plan.references), ("pairs", plan.pairs)):
            if groups:
                digest = _digest([[own.prompt, own.responses, list(own.scores)] for own in groups])
                add(stage_name, name, {**policy, **limits, f"{stage_name}_sha256": digest})
        if section.wins is not None and isinstance(section.wins.by, JudgeScorer) and name != section.wins.against:
            by = section.wins.by.model_dump(mode="json", exclude=set(JudgeScorer.EFFORT))
            add("wins", name, {"against": section.wins.against, "by": by})
    found[EVALUATION] = json.loads(section.model_dump_json(exclude={"batch_tokens", "output"}))
    found[EVALUATION]["files_sha256"] = _digest(dict(found))
    return found


def _read(key: str, where: str | list[str], read: Any) -> Any:
    try:
        return read(where)
    except UserError as error:
        raise UserError(f"evaluation.{key}: {str(error).removeprefix('sampling.prompts: ')}") from None


def _reading(section: EvaluationSection) -> dict[str, Any]:
    return {"format": section.format, "split": section.split, "max_groups": section.max_prompts}


def _policy(recipe: Recipe, name: str, policy: PolicySection) -> Stage:
    where = f"evaluation.policies.{name}"
    if policy.model is None and recipe.model is None:
        raise UserError(f"{where}: names no model, and the recipe has no section model. Set its model, or model.name.")
    (stage,) = make_stages(_sampling_recipe(recipe, name, policy, "unused.jsonl"))
    assert stage.model is not None
    try:
        resolve_source(stage.model.name, revision=stage.model.revision)
        check_adapters([stage])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return stage


def _sampling_recipe(recipe: Recipe, name: str, policy: PolicySection, output: str) -> Recipe:
    section = recipe.evaluation
    assert section is not None
    entry = {**section.decoding.model_dump(), **policy.model_dump(), "source": name}
    sampling = {
        "prompts": section.prompts,
        "output": output,
        "candidates": [entry],
        "keep_provided": False,
        **section.model_dump(
            include={"format", "split", "template", "stop", "max_prompts", "max_prompt_tokens", "seed", "batch_tokens"}
        ),
    }
    return make_recipe({**_model_values(recipe), "sampling": sampling}, f"evaluation.policies.{name}", needs=())


def _model_values(recipe: Recipe) -> dict[str, Any]:
    if recipe.model is None:
        return {}
    values: dict[str, Any] = {"model": recipe.model.model_dump()}
    return values


def _check_scorers(recipe: Recipe, section: EvaluationSection) -> None:
    """Read what can be read of every scorer without loading it."""
    parts = [
        (f"evaluation.scorers.{label}", part)
        for label, scorer in section.scorers.items()
        for part in ([own.scorer for own in scorer.parts.values()] if scorer.name == "composite" else [scorer])
    ]
    if section.wins is not None and isinstance(section.wins.by, JudgeScorer):
        parts.append(("evaluation.wins.by", section.wins.by))
    for where, scorer in parts:
        try:
            if isinstance(scorer, RuleScorer):
                load_rule(scorer.function)
            elif isinstance(scorer, RewardModelScorer) and scorer.layout == "sequence_classification":
                resolve_source(scorer.model, revision=scorer.revision, what="reward model")
            elif isinstance(scorer, PolicyScorer):
                if scorer.model is None and recipe.model is None and scorer.adapter is None:
                    raise UserError("names no model, and the recipe has no section model. Set its model.")
                if scorer.model is not None:
                    resolve_source(scorer.model)
            elif isinstance(scorer, JudgeScorer) and importlib.util.find_spec("openai") is None:
                raise UserError("a judge needs a package that is not installed: pip install 'rrhf-peft[endpoint]'.")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _check_context(section: EvaluationSection, prompts: Sequence[RankedGroup], policies: dict[str, Stage]) -> None:
    """Prompt and response must fit into what every policy can read."""
    longest: dict[str, int] = {}  # models with different adapters are looked at once
    for name, stage in policies.items():
        assert stage.model is not None
        context = _context(stage.model)
        if context is None:
            continue
        if (section.references is not None or section.pairs is not None) and section.max_tokens > context:
            raise UserError(
                f"evaluation.max_tokens: {section.max_tokens} is more than the policy {name} can read ({context} "
                f"tokens). Set it to {context} or less."
            )
        key = stage.model.model_dump_json()
        if key not in longest:
            longest[key] = _longest_prompt(section, prompts, stage.model)
        room = context - section.decoding.max_new_tokens
        if longest[key] > room:
            raise UserError(
                f"evaluation.prompts: the longest prompt has {longest[key]} tokens, and with "
                f"{section.decoding.max_new_tokens} new ones the policy {name} cannot read it (context of {context}). "
                f"Set evaluation.max_prompt_tokens to {max(room, 2)} or less, or lower decoding.max_new_tokens."
            )


def _longest_prompt(section: EvaluationSection, prompts: Sequence[RankedGroup], model: ModelSection) -> int:
    tokenizer, form = tokenizer_of(model), TEMPLATES[section.template]
    texts = [prompt_text(item, tokenizer, section.template) for item in prompts]
    add_bos = not form.writes_bos
    return max(map(len, encode_prompts(tokenizer, texts, add_bos=add_bos, max_tokens=section.max_prompt_tokens)))


def tokenizer_of(model: ModelSection) -> Any:
    """The tokenizer of a policy or a judge."""
    return load_tokenizer(
        model.tokenizer or model.name,
        revision=model.revision if model.tokenizer is None else None,
        trust_remote_code=model.trust_remote_code,
    )


def _context(model: ModelSection) -> int | None:
    config = AutoConfig.from_pretrained(
        resolve_source(model.name, revision=model.revision),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _references(section: EvaluationSection) -> list[RankedGroup]:
    """Each prompt with its best response."""
    if section.references is None:
        return []
    found: list[RankedGroup] = []
    reading: dict[str, Any] = {"format": section.format, "split": section.split}
    for prompt in _read("references", section.references, lambda where: read_groups(where, **reading, needs="prompt")):
        if not prompt.responses:
            raise UserError(
                f"evaluation.references: prompt {prompt.index} has no answer. Name ranked data, or records with "
                "`prompt` and `responses`, or remove evaluation.references."
            )
        scores = [0.0 if score is None else score for score in prompt.scores]
        best = max(range(len(scores)), key=scores.__getitem__)
        found.append(_candidates(len(found), prompt.prompt, [prompt.responses[best]], [scores[best]]))
    return found


def _pairs(section: EvaluationSection) -> list[RankedGroup]:
    if section.pairs is None:
        return []

    def read(places: str | list[str]) -> list[RankedGroup]:
        reading: dict[str, Any] = {"format": section.format, "split": section.split}
        return [
            group
            for place in ([places] if isinstance(places, str) else places)
            for group in read_groups(place, **reading)
        ]

    groups = _read("pairs", section.pairs, read)
    found = [_candidates(index, group.prompt, group.responses, group.scores) for index, group in enumerate(groups)]
    if not any(len(set(own.scores)) > 1 for own in found):
        raise UserError("evaluation.pairs: no group has two different scores, so there is no order to compare with.")
    return found


def _candidates(index: int, prompt: Any, responses: Sequence[str], scores: Sequence[float]) -> RankedGroup:
    names = [f"response-{place}" for place in range(len(responses))]
    return RankedGroup(prompt, list(responses), list(scores), names, index=index)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
