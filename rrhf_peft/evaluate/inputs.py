"""What an evaluation reads, looked at before hours of work: prompts, policies as they were trained, scorers, judges.

A policy's answers and rewards are made by sampling and scoring, from recipes derived here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rrhf_peft.data import TEMPLATES, encode_prompts, prompt_text, read_groups
from rrhf_peft.evaluate.folder import RECIPE, file_name
from rrhf_peft.evaluate.numbers import EVALUATION
from rrhf_peft.modeling import load_config, resolve_source, tokenizer_of, weights_fingerprint
from rrhf_peft.recipe import EvaluationSection, ModelSection, Recipe, load_recipe, make_recipe
from rrhf_peft.recipe.stages import JudgeScorer, PolicyScorer, PolicySection, RewardModelScorer, RuleScorer
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.policies import Stage, check_adapters, make_stages
from rrhf_peft.score.rule import load_rule
from rrhf_peft.score.run import files_of_scorer
from rrhf_peft.train.run_folder import METRICS, read_metrics


@dataclass(frozen=True)
class TrainedAs:
    """How a policy read prompts and held its weights in training.

    Attributes:
        template: as `data.template`.
        quantization, double_quant: as in `model`.
        max_prompt_tokens, max_tokens: as in `data`; None where training computes it group by group.
        stop: strings that ended its own answers in online training.
    """

    template: str
    quantization: str
    double_quant: bool
    max_prompt_tokens: int | None
    max_tokens: int
    stop: tuple[str, ...]


def trained_as(folder: str | None) -> TrainedAs | None:
    """Read from the recipe.yaml of a run folder, or of the run folder that a checkpoint lies in.

    No other parent's recipe says anything about an adapter, and none says whether a model's code may run.

    Returns:
        None where the folder is no run.

    Raises:
        UserError: the recipe is damaged.
    """
    recipe = _run_recipe(folder)
    if recipe is None or recipe.model is None or recipe.data is None:
        return None
    return TrainedAs(
        template=recipe.data.template,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_tokens=recipe.data.max_tokens,
        stop=tuple(recipe.online.stop) if recipe.online is not None else (),
    )


def training_of(folder: str | None) -> dict[str, Any] | None:
    """Seconds, peak memory, optimizer steps and objective of the run in a folder; None where there is no run.

    Also where its metrics are damaged: they are told beside an evaluation, which they need not end.
    """
    recipe = _run_recipe(folder)
    if folder is None or recipe is None:
        return None
    try:
        lines = read_metrics(Path(folder).expanduser() / METRICS)
        closing = next(line for line in reversed(lines) if "train_runtime" in line)
        peaks = [line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line]
        return {
            "seconds": float(closing["train_runtime"]),
            "peak_memory_gib": float(max(peaks)) if peaks else None,
            "steps": int(closing["step"]),
            "objective": recipe.objective.name,
        }
    except (UserError, ValueError, TypeError, StopIteration):
        return None


def _run_recipe(folder: str | None) -> Recipe | None:
    if folder is None:
        return None
    path = Path(folder).expanduser()
    homes = [path, path.resolve().parent] if re.fullmatch(r"checkpoint-\d+", path.resolve().name) else [path]
    file = next((home / RECIPE for home in homes if (home / RECIPE).is_file()), None)
    return None if file is None else load_recipe(file, needs=())


@dataclass(frozen=True)
class Policy:
    """One policy as it is evaluated: as it was trained, unless the recipe says otherwise.

    Attributes:
        stage: its model and adapter.
        template: how a prompt becomes text.
        max_prompt_tokens: longer prompts lose their beginning; None keeps them whole.
        max_tokens: prompt and reference (or labelled response) together.
        stop: strings that end an answer.
        differences: in words, where this is not how it was trained.
        training: what its training took (`training_of`), or None.
    """

    stage: Stage
    template: str
    max_prompt_tokens: int | None
    max_tokens: int
    stop: list[str]
    differences: list[str]
    training: dict[str, Any] | None

    @property
    def model(self) -> ModelSection:
        """The base, with how its weights are held."""
        assert self.stage.model is not None
        return self.stage.model


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated.

    Attributes:
        recipe: with the section `evaluation`.
        section: that section.
        prompts: the held-out prompts.
        policies: name -> what is evaluated, and how.
        references: prompts with one reference answer each; empty where none were asked for.
        pairs: labelled groups; empty where none were asked for.
    """

    recipe: Recipe
    section: EvaluationSection
    prompts: list[RankedGroup]
    policies: dict[str, Policy]
    references: list[RankedGroup]
    pairs: list[RankedGroup]

    @property
    def reads(self) -> list[str]:
        """Files, folders and hub ids that nothing may be written over."""
        section = self.section
        data = (section.prompts, section.references, section.pairs)
        names = [name for part in data if part is not None for name in _listed(part)]
        for policy in self.policies.values():
            names += [name for name in (policy.model.name, policy.stage.adapter) if name is not None]
        return names

    @property
    def judge_template(self) -> str:
        """How the perplexity judge reads prompts: as the policies do, and raw where they differ; the same for all."""
        templates = {policy.template for policy in self.policies.values()}
        return templates.pop() if len(templates) == 1 else "raw"


def make_plan(recipe: Recipe) -> Plan:
    """Read and check all that the evaluation needs.

    Raises:
        UserError: something is missing or cannot work; names the key.
    """
    section = recipe.evaluation
    assert section is not None, "load_recipe(needs=['evaluation'])"
    prompts = _read("prompts", section.prompts, section, max_groups=section.max_prompts, needs="prompt")
    policies = _policies(recipe, section)
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
    policy, model = plan.policies[name], plan.recipe.model
    if model is not None and policy.model.name == model.name:
        model = policy.model  # with its weights held as in training
    reads = {"template": policy.template, "stop": policy.stop, "max_prompt_tokens": policy.max_prompt_tokens}
    return _sampling_recipe(plan.recipe, name, model, str(output), **reads)


def scoring_recipe(plan: Plan, label: str, samples: Path, output: Path) -> Recipe:
    """What `rrhf-peft score` would read to reward one policy's answers by one scorer."""
    scoring = {
        "input": str(samples),
        "output": str(output),
        "scorer": plan.section.scorers[label].model_dump(),
        "seed": plan.section.seed,
    }
    model = {} if plan.recipe.model is None else {"model": plan.recipe.model.model_dump()}
    return make_recipe({**model, "scoring": scoring}, f"evaluation.scorers.{label}", needs=())


def settings_of(plan: Plan) -> dict[str, Any]:
    """File relative to the output folder -> what it depends on, the files that it is made from apart."""
    section, recipe = plan.section, plan.recipe
    settings: dict[str, Any] = {}
    prompts = _digest([item.prompt for item in plan.prompts])
    base = None if recipe.model is None else recipe.model.model_dump(mode="json")
    scorers = {label: _scorer_settings(scorer, recipe, base) for label, scorer in section.scorers.items()}
    perplexity = None
    if section.perplexity is not None:
        model = recipe.model if section.perplexity.model is None else ModelSection(name=section.perplexity.model)
        perplexity = {
            "judge": section.perplexity.model or base,
            "dtype": section.perplexity.dtype,
            "weights_sha256": None if model is None else weights_fingerprint(model.name, model.revision),
            "template": plan.judge_template,
        }
    for name, evaluated in plan.policies.items():
        described = evaluated.stage.describe()
        policy = {"model": described["model"], "adapter": described["adapter"], "weights_sha256": described["files"]}
        reads = {"template": evaluated.template, "max_prompt_tokens": evaluated.max_prompt_tokens}
        settings[file_name("samples", name)] = {
            **policy,
            "decoding": section.decoding.model_dump(),
            **reads,
            "stop": evaluated.stop,
            "seed": section.seed,
            "prompts_sha256": prompts,
        }
        for label, scorer in scorers.items():
            settings[file_name("scored", name, label)] = {"seed": section.seed, **scorer}
        if perplexity is not None:
            settings[file_name("perplexity", name)] = perplexity
        for stage, groups in (("references", plan.references), ("pairs", plan.pairs)):
            if groups:
                digest = _digest([[group.prompt, group.responses, list(group.scores)] for group in groups])
                limits = {**reads, "max_tokens": evaluated.max_tokens}
                settings[file_name(stage, name)] = {**policy, **limits, f"{stage}_sha256": digest}
        if section.wins is not None and isinstance(section.wins.by, JudgeScorer) and name != section.wins.against:
            by = section.wins.by.model_dump(mode="json", exclude=set(JudgeScorer.EFFORT))
            settings[file_name("wins", name)] = {"against": section.wins.against, "by": by}
    settings = json.loads(json.dumps(settings))
    numbers = json.loads(section.model_dump_json(exclude={"batch_tokens", "output"}))
    return {**settings, EVALUATION: {**numbers, "files_sha256": _digest(settings)}}


def _scorer_settings(scorer: Any, recipe: Recipe, base: Any) -> dict[str, Any]:
    """What rewards depend on: the scorer, the files that it reads, and the recipe's model where it takes that."""
    dumped = scorer.model_dump(mode="json", exclude=set(scorer.EFFORT))
    reads_model = {"model": base} if '"name": "policy"' in json.dumps(dumped) else {}
    digests = {f"{read}_sha256": digest for read, digest in files_of_scorer(scorer, recipe).items()}
    return {"scorer": dumped, **reads_model, **digests}


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """Put the key in front of errors of code that knows nothing of evaluations."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read(key: str, source: str | list[str], section: EvaluationSection, **how: Any) -> list[RankedGroup]:
    try:
        return read_groups(source, format=section.format, split=section.split, **how)
    except UserError as error:
        raise UserError(f"evaluation.{key}: {str(error).removeprefix('sampling.prompts: ')}") from None


def _policies(recipe: Recipe, section: EvaluationSection) -> dict[str, Policy]:
    """Every policy with the settings it is evaluated under: the recipe's, else those of its training.

    A policy that no run folder tells of, such as the base, reads what the trained ones beside it agree on, so that
    they are compared on the same terms.
    """
    runs: dict[str, TrainedAs] = {}
    for name, policy in section.policies.items():
        with told_of(f"evaluation.policies.{name}"):
            if (run := trained_as(policy.adapter or policy.model)) is not None:
                runs[name] = run
    policies = {}
    for name, policy in section.policies.items():
        run = runs.get(name)

        def setting(key: str, otherwise: Any, run: TrainedAs | None = run, name: str = name) -> Any:
            wanted = getattr(section, key)
            if wanted is not None:
                return wanted
            return getattr(run, key) if run is not None else _agreed(runs, key, name, otherwise)

        model = _model_as_trained(recipe, policy, run, list(runs.values()))
        chosen = Policy(
            stage=_stage(recipe, name, policy, model),
            template=setting("template", "raw"),
            max_prompt_tokens=setting("max_prompt_tokens", None),
            max_tokens=setting("max_tokens", 512),
            stop=list(setting("stop", ())),
            differences=[],
            training=training_of(policy.adapter or policy.model),
        )
        policies[name] = chosen if run is None else replace(chosen, differences=_differences(run, chosen))
    return policies


def _agreed(runs: dict[str, TrainedAs], key: str, name: str, otherwise: Any) -> Any:
    """What all runs have in common, for a policy without a run of its own."""
    values = {run_name: getattr(run, key) for run_name, run in runs.items()}
    different = list(dict.fromkeys(values.values()))
    if len(different) > 1:
        said = ", ".join(f"{run_name}: {value}" for run_name, value in values.items())
        raise UserError(
            f"evaluation.{key}: the policies were trained with different ones ({said}), and nothing says which one "
            f"{name} is to have. Set evaluation.{key}, or evaluate the policies that agree."
        )
    return different[0] if different else otherwise


def _model_as_trained(
    recipe: Recipe, policy: PolicySection, run: TrainedAs | None, runs: Sequence[TrainedAs]
) -> ModelSection | None:
    """The recipe's section `model`, its weights held as in training where the section does not say how.

    A policy without a run, such as the base, has its weights held as those that all runs began from, if they agree.
    """
    if recipe.model is None or (policy.model is not None and policy.model != recipe.model.name):
        return recipe.model
    held = {(one.quantization, one.double_quant) for one in ([run] if run is not None else runs)}
    if len(held) != 1 or "quantization" in recipe.model.model_fields_set:
        return recipe.model
    quantization, double_quant = held.pop()
    return recipe.model.model_copy(update={"quantization": quantization, "double_quant": double_quant})


def _differences(run: TrainedAs, policy: Policy) -> list[str]:
    """Where a policy is not evaluated as it was trained, in words."""
    both: dict[str, tuple[Any, Any]] = {
        "template": (policy.template, run.template),
        "max_prompt_tokens": (policy.max_prompt_tokens, run.max_prompt_tokens),
        "stop": (policy.stop, list(run.stop)),
        "quantization": (policy.model.quantization, run.quantization),
    }
    return [f"{key} {now or 'none'} (in training {then or 'none'})" for key, (now, then) in both.items() if now != then]


def _stage(recipe: Recipe, name: str, policy: PolicySection, model: ModelSection | None) -> Stage:
    where = f"evaluation.policies.{name}"
    if policy.model is None and model is None:
        raise UserError(f"{where}: names no model, and the recipe has no section model. Set its model, or model.name.")
    (stage,) = make_stages(_sampling_recipe(recipe, name, model, "unused.jsonl"))
    assert stage.model is not None
    with told_of(where):
        resolve_source(stage.model.name, revision=stage.model.revision)
        check_adapters([stage])
    return stage


def _sampling_recipe(recipe: Recipe, name: str, model: ModelSection | None, output: str, **reads: Any) -> Recipe:
    section = recipe.evaluation
    assert section is not None
    entry = {**section.decoding.model_dump(), **section.policies[name].model_dump(), "source": name}
    sampling = {
        "prompts": section.prompts,
        "output": output,
        "candidates": [entry],
        "keep_provided": False,
        **section.model_dump(include={"format", "split", "max_prompts", "seed", "batch_tokens"}),
        **reads,
    }
    values: dict[str, Any] = {} if model is None else {"model": model.model_dump()}
    return make_recipe({**values, "sampling": sampling}, f"evaluation.policies.{name}", needs=())


def _check_scorers(recipe: Recipe, section: EvaluationSection) -> None:
    """Read what can be read of every scorer without loading it."""
    parts = [
        (f"evaluation.scorers.{label}", part)
        for label, scorer in section.scorers.items()
        for part in ([one.scorer for one in scorer.parts.values()] if scorer.name == "composite" else [scorer])
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


def _check_context(section: EvaluationSection, prompts: Sequence[RankedGroup], policies: dict[str, Policy]) -> None:
    """Prompt and response must fit into what every policy can read."""
    longest: dict[str, int] = {}  # models with different adapters are looked at once
    for name, policy in policies.items():
        context = _context(policy.model)
        if context is None:
            continue
        if (section.references is not None or section.pairs is not None) and policy.max_tokens > context:
            raise UserError(
                f"evaluation.max_tokens: {policy.max_tokens} is more than the policy {name} can read ({context} "
                f"tokens). Set it to {context} or less."
            )
        key = json.dumps([policy.model.model_dump(mode="json"), policy.template, policy.max_prompt_tokens])
        if key not in longest:
            longest[key] = _longest_prompt(policy, prompts)
        room = context - section.decoding.max_new_tokens
        if longest[key] > room:
            raise UserError(
                f"evaluation.prompts: the longest prompt has {longest[key]} tokens, and with "
                f"{section.decoding.max_new_tokens} new ones the policy {name} cannot read it (context of {context}). "
                f"Set evaluation.max_prompt_tokens to {max(room, 2)} or less, or lower decoding.max_new_tokens."
            )


def _longest_prompt(policy: Policy, prompts: Sequence[RankedGroup]) -> int:
    tokenizer, form = tokenizer_of(policy.model), TEMPLATES[policy.template]
    texts = [prompt_text(item, tokenizer, policy.template) for item in prompts]
    add_bos = not form.writes_bos
    return max(map(len, encode_prompts(tokenizer, texts, add_bos=add_bos, max_tokens=policy.max_prompt_tokens)))


def _context(model: ModelSection) -> int | None:
    source = resolve_source(model.name, revision=model.revision)
    config = load_config(source, trust_remote_code=model.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _references(section: EvaluationSection) -> list[RankedGroup]:
    """Each prompt with its best response."""
    if section.references is None:
        return []
    references: list[RankedGroup] = []
    for prompt in _read("references", section.references, section, needs="prompt"):
        if not prompt.responses:
            raise UserError(
                f"evaluation.references: prompt {prompt.index} has no answer. Name ranked data, or records with "
                "`prompt` and `responses`, or remove evaluation.references."
            )
        scores = [0.0 if score is None else score for score in prompt.scores]
        best = max(range(len(scores)), key=scores.__getitem__)
        references.append(_candidates(len(references), prompt.prompt, [prompt.responses[best]], [scores[best]]))
    return references


def _pairs(section: EvaluationSection) -> list[RankedGroup]:
    if section.pairs is None:
        return []
    groups = [group for source in _listed(section.pairs) for group in _read("pairs", source, section)]
    pairs = [
        _candidates(index, group.prompt, group.responses, group.known_scores) for index, group in enumerate(groups)
    ]
    if not any(len(set(group.scores)) > 1 for group in pairs):
        raise UserError("evaluation.pairs: no group has two different scores, so there is no order to compare with.")
    return pairs


def _candidates(index: int, prompt: Any, responses: Sequence[str], scores: Sequence[float]) -> RankedGroup:
    names = [f"response-{number}" for number in range(len(responses))]
    return RankedGroup(prompt, list(responses), list(scores), names, index=index)


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
