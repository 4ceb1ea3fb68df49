"""What has to be computed with a model or asked of a judge, besides sampling and scoring, into the folder's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from rrhf_peft.data import TEMPLATES, transcript
from rrhf_peft.evaluate.folder import OutputFolder
from rrhf_peft.evaluate.judge_wins import PairJudge
from rrhf_peft.evaluate.likelihood import text_log_probs
from rrhf_peft.evaluate.plan import Plan, tokenizer_of
from rrhf_peft.evaluate.sharding import rows_of_all
from rrhf_peft.jobs import Processes
from rrhf_peft.modeling import attach_adapter, load_base_model
from rrhf_peft.recipe import ModelSection
from rrhf_peft.recipe.scoring import JudgeScorer
from rrhf_peft.records import RankedGroup
from rrhf_peft.score.policy import PolicyScores

Row = dict[str, Any]


def read_samples(folder: OutputFolder, name: str) -> list[Row]:
    """A policy's sampled rows."""
    return read_rows(folder, "samples", name)


def read_rows(folder: OutputFolder, stage: str, name: str, label: str | None = None) -> list[Row]:
    """The rows of one of the folder's files."""
    with folder.file(stage, name, label).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def policy_log_probs(plan: Plan, folder: OutputFolder, name: str, processes: Processes, console: Console) -> None:
    """Log-prob and tokens of the references and of the labelled responses under one policy."""
    loaded: list[PolicyScores] = []  # the weights are the same for both

    def begin(groups: Sequence[RankedGroup]) -> Callable[[Sequence[RankedGroup]], list[Row]]:
        if not loaded:
            loaded.append(_policy(plan, name))
        loaded[0].prove(groups)

        def work(items: Sequence[RankedGroup]) -> list[Row]:
            return [{"log_probs": own} for own in loaded[0].log_probs(items)]

        return work

    for stage, groups in (("references", plan.references), ("pairs", plan.pairs)):
        if groups:
            rows_of_all(
                folder.file(stage, name),
                groups,
                lambda groups=groups: begin(groups),  # type: ignore[misc]
                settings=_recorded(folder, stage, name),
                processes=processes,
                console=console,
                title=f"{stage} under {name}",
            )


def judge_perplexity(plan: Plan, folder: OutputFolder, processes: Processes, console: Console) -> None:
    """Log-prob and tokens of every policy's responses under the judge model."""
    section, judge = plan.section, plan.section.perplexity
    assert judge is not None
    loaded: list[tuple[Any, Any]] = []

    def begin() -> Callable[[Sequence[Row]], list[Row]]:
        if not loaded:
            loaded.append(_judge_model(plan))
        model, tokenizer = loaded[0]
        is_plain = plan.judge_template == "chat" and not tokenizer.chat_template  # gpt2 judges what chat models say
        form = TEMPLATES["raw" if is_plain else plan.judge_template]

        def work(rows: Sequence[Row]) -> list[Row]:
            texts = [form.response(text) for row in rows for text in row["responses"]]
            prompts = [form.prompt(row["prompt"], tokenizer) for row in rows for _ in row["responses"]]
            found = iter(text_log_probs(model, tokenizer, prompts, texts, batch_tokens=section.batch_tokens))
            return [{"log_probs": [next(found) for _ in row["responses"]]} for row in rows]

        return work

    for name in plan.policies:
        rows_of_all(
            folder.file("perplexity", name),
            read_samples(folder, name),
            begin,
            settings=_recorded(folder, "perplexity", name),
            processes=processes,
            console=console,
            title=f"perplexity of {name}",
        )


def judge_wins(plan: Plan, folder: OutputFolder, processes: Processes, console: Console) -> None:
    """The judge's verdict on each policy's response i against response i of the one it is compared with."""
    wins = plan.section.wins
    assert wins is not None
    assert isinstance(wins.by, JudgeScorer)
    section = wins.by
    other = read_samples(folder, wins.against)

    def begin() -> Callable[[Sequence[tuple[Row, Row]]], list[Row]]:
        judge = PairJudge(section)

        def work(items: Sequence[tuple[Row, Row]]) -> list[Row]:
            comparisons = [
                (transcript(own["prompt"]), list(zip(own["responses"], theirs["responses"])))  # noqa: B905 - as many as both have
                for own, theirs in items
            ]
            return judge.compare(comparisons)

        return work

    for name in plan.policies:
        if name != wins.against:
            rows_of_all(
                folder.file("wins", name),
                list(zip(read_samples(folder, name), other, strict=True)),
                begin,
                settings=_recorded(folder, "wins", name),
                processes=processes,
                console=console,
                title=f"judging {name} against {wins.against}",
            )


def _recorded(folder: OutputFolder, stage: str, name: str) -> Any:
    """The settings that the folder was opened with; parts of other settings were refused then."""
    return folder.recorded()[folder.file(stage, name).relative_to(folder.path).as_posix()]


def _policy(plan: Plan, name: str) -> PolicyScores:
    policy = plan.policies[name]
    model, tokenizer = _loaded(policy.model)
    if policy.stage.adapter is not None:
        model = attach_adapter(model, None, init_adapter=policy.stage.adapter)
    return PolicyScores(
        model.eval().requires_grad_(False),
        tokenizer,
        template=policy.template,
        max_prompt_tokens=policy.max_prompt_tokens,
        max_tokens=policy.max_tokens,
        batch_tokens=plan.section.batch_tokens,
    )


def _judge_model(plan: Plan) -> tuple[Any, Any]:
    judge = plan.section.perplexity
    assert judge is not None
    if judge.model is not None:
        model, tokenizer = _loaded(ModelSection(name=judge.model, dtype=judge.dtype))
    else:
        own = plan.recipe.model
        model, tokenizer = _loaded(own if judge.dtype == "auto" else own.model_copy(update={"dtype": judge.dtype}))
    return model.eval(), tokenizer


def _loaded(section: ModelSection) -> tuple[Any, Any]:
    """Base model and tokenizer, as sampling loads them."""
    fields = ("revision", "dtype", "quantization", "double_quant", "attention", "trust_remote_code")
    model = load_base_model(section.name, **{field: getattr(section, field) for field in fields})
    return model, tokenizer_of(section)
