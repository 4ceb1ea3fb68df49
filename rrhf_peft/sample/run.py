"""`rrhf-peft sample`: prompts and policies in, candidates.jsonl out, by any number of processes.

The work is cut into stages (one policy each), their entries (one way to decode each) and these into units of
consecutive prompts. Every process appends its finished units to its own file, so that a run killed at any moment
continues where it was, with any number of processes, and comes to the same rows:

    OUTPUT.stages/<fingerprint>.jsonl.parts/   an entry at work (`rrhf_peft.jobs`)
    OUTPUT.stages/<fingerprint>.jsonl          a finished entry
    OUTPUT                                     all rows, only when all entries are finished
    OUTPUT without .jsonl, .failures.jsonl     the prompts that got no response at all, and why

An entry's name is a fingerprint of all that its rows depend on. What was changed between two runs is therefore done
again, and only that: another entry behind it, more retries or another address of a server throw nothing away.

A candidate's random stream is named by the run's seed, its entry's index in the recipe, its prompt's index and its own
number: no two candidates of a run share one. Two runs with one seed do, as the policies of an evaluation: they
answer a prompt with the same numbers, so that their differences are the policies' and not the draw's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rrhf_peft.data import TEMPLATES, read_groups
from rrhf_peft.files import (
    check_output,
    is_finished,
    read_mark,
    refuse_finished,
    remove_work_folder,
    work_folder,
    write_files,
)
from rrhf_peft.jobs import Processes, ShardedOutput, exclusive, fingerprint_of, launched_processes, whole_models
from rrhf_peft.progress import Advance, progress
from rrhf_peft.recipe import CandidatesSection, Recipe, SamplingSection
from rrhf_peft.records import PER_RESPONSE, RankedGroup, UserError
from rrhf_peft.sample.policies import (
    Policy,
    PolicyLoader,
    Stage,
    check_adapters,
    decoding_of,
    describe_entry,
    make_stages,
    source_of,
)
from rrhf_peft.sample.report import SampleReport, make_report


@dataclass(frozen=True)
class SampleOutcome:
    """What sampling leaves.

    Attributes:
        output: The file of candidates.
        report: What they came to.
        halvings: How often memory ran out on the way (this process).
        failures: The file of prompts without any response, where there are some.
    """

    output: Path
    report: SampleReport
    halvings: int
    failures: Path | None = None


def sample_recipe(
    recipe: Recipe, *, overwrite: bool = False, console: Console | None = None, keep_all: bool = False
) -> SampleOutcome:
    """Sample candidates as the recipe's `sampling:` says, or finish what an earlier run began.

    Args:
        recipe: With the section `sampling`, and `model` unless every entry names its own.
        overwrite: Replace an output that this program made, and everything unfinished of it.
        console: Where progress goes; None keeps silent.
        keep_all: Keep empty and repeated responses, and prompts without a response, which measure a policy and are
            nothing to train on.

    Raises:
        UserError: the output is another's or made otherwise, the prompts or a policy cannot be read, a backend is not
            installed or does not answer, or no prompt got a response.
    """
    sampling = recipe.sampling
    assert sampling is not None
    output = Path(sampling.output)
    if output.suffix != ".jsonl":
        raise UserError(f"sampling.output: {output} must end with .jsonl, which is what is written.")
    folder, failures = output.with_name(f"{output.name}.stages"), output.with_suffix(".failures.jsonl")
    with launched_processes() as processes, whole_models(), exclusive(output, processes):
        told = console if processes.is_main else None
        prompts = _read_prompts(sampling)
        stages = make_stages(recipe)
        check_adapters(stages)
        refuse_several_vllm(stages, processes)
        read = ("tools", "chat_template_kwargs")  # what a template reads beside the prompt
        texts = _digest([prompt.prompt, *map(prompt.columns.get, read)] for prompt in prompts)
        works = [
            [_EntryWork(stage, index, prompts, texts, sampling, folder, processes) for index in stage.entries]
            for stage in stages
        ]
        by_entry = {work.index: work for group in works for work in group}
        named = [[index, work.shards.fingerprint, work.source] for index, work in sorted(by_entry.items())]
        records = _digest([prompt.row(), prompt.columns, prompt.origin] for prompt in prompts)
        fingerprint = fingerprint_of(named, sampling.keep_provided, keep_all, sampling.template, records)
        loader = PolicyLoader(sampling)
        if processes.on_main(lambda: _open(sampling, output, failures, folder, fingerprint, overwrite)):
            if told is not None:
                told.print(f"finished before: {output}", highlight=False, soft_wrap=True)
        else:
            for number, stage in enumerate(stages):
                _sample_stage(stage, works[number], loader, told, f"{stage.name} ({number + 1}/{len(stages)})")
            rows = _Rows(prompts, by_entry, sampling, keep_all)
            processes.on_main(
                lambda: write_files(
                    output,
                    {output: rows.lines()},
                    verb="sample",
                    fingerprint=fingerprint,
                    beside=lambda: {failures: rows.failed or None},
                )
            )
            processes.on_main(lambda: remove_work_folder(folder))
        with output.open(encoding="utf-8") as lines, contextlib.ExitStack() as stack:
            failed = stack.enter_context(failures.open(encoding="utf-8")) if failures.exists() else ()
            report = make_report(map(json.loads, lines), map(json.loads, failed))
        return SampleOutcome(output, report, loader.budget.halvings, failures if failures.exists() else None)


def _read_prompts(sampling: SamplingSection) -> list[RankedGroup]:
    try:
        return read_groups(
            sampling.prompts,
            format=sampling.format,
            split=sampling.split,
            max_groups=sampling.max_prompts,
            needs="prompt",
        )
    except UserError as error:
        raise UserError(f"sampling.prompts: {error}") from None


def _digest(values: Iterable[Any]) -> str:
    """Of JSON values one by one, so that no second copy of all prompts is held."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, default=str).encode() + b"\n")
    return digest.hexdigest()


def refuse_several_vllm(stages: Sequence[Stage], processes: Processes) -> None:
    """Raise `UserError` where each process of a launch would make a vLLM engine of its own."""
    if processes.count > 1 and any(stage.backend == "vllm" for stage in stages):
        raise UserError(
            "backend vllm runs inside one process: every process of a launch would take the same GPU. Start it without "
            "a launcher, or serve the model (vllm serve MODEL --data-parallel-size N) and set backend: endpoint."
        )


def _open(
    sampling: SamplingSection, output: Path, failures: Path, folder: Path, fingerprint: str, overwrite: bool
) -> bool:
    """Start, continue, or see that the same work was finished before; the main process alone."""
    if not overwrite and is_finished(output, fingerprint, [failures]):
        remove_work_folder(folder)  # also what a kill left of removing it
        return True
    prompts = [sampling.prompts] if isinstance(sampling.prompts, str) else sampling.prompts
    check_output(output, key="sampling.output", reads=prompts, overwrite=overwrite, continues=True, beside=[failures])
    if not overwrite and not ((held := read_mark(folder)) and held.may_replace):
        refuse_finished(output, fingerprint)
    work_folder(folder, verb="sample", writes=["*.jsonl", "*.jsonl.parts/*"], overwrite=overwrite)
    return False


class _EntryWork:
    """One entry's candidates for all prompts, as units of consecutive prompts."""

    def __init__(
        self,
        stage: Stage,
        index: int,
        prompts: Sequence[RankedGroup],
        texts: str,
        sampling: SamplingSection,
        folder: Path,
        processes: Processes,
    ) -> None:
        self.index, self.entry, self.sampling = index, stage.entries[index], sampling
        self.policy, self.source = stage.name, source_of(stage, self.entry)
        # Whole batches where there are many prompts; what is paid for one by one is saved more often.
        usual = 128 if stage.backend != "endpoint" and len(prompts) >= 512 else 32
        size = sampling.unit_prompts or usual
        self.units = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        settings = sampling.model_dump(include={"template", "stop", "max_prompt_tokens", "seed", "unit_prompts"})
        fingerprint = fingerprint_of(stage.describe(), index, describe_entry(self.entry), settings, texts)
        self.shards = ShardedOutput(
            folder / f"{fingerprint[:24]}.jsonl",
            verb="sample",
            fingerprint=fingerprint,
            units=len(self.units),
            processes=processes,
        )

    @property
    def has_begun(self) -> bool:
        """Whether an earlier run has finished some of this process's units."""
        count = self.shards.processes.count
        return len(self.shards.pending()) < len(range(self.shards.processes.index, len(self.units), count))

    def run(self, policy: Policy, advance: Advance) -> None:
        """Do this process's part of what is missing; a unit is written as soon as all of its prompts are answered."""
        pending = self.shards.pending()
        for units in [pending] if policy.across_units else [[unit] for unit in pending]:
            self._answer(units, policy, advance)

    def _answer(self, units: Sequence[int], policy: Policy, advance: Advance) -> None:
        decoding = decoding_of(self.entry, self.sampling)
        unit_of = [unit for unit in units for _ in self.units[unit]]
        prompts = [prompt for unit in units for prompt in self.units[unit]]
        keys = [f"{self.sampling.seed}/{self.index}/{prompt.index}" for prompt in prompts]
        rows: dict[int, dict[int, dict[str, Any]]] = {unit: {} for unit in units}
        answers = policy.respond(prompts, keys, decoding, lambda groups, tokens: advance(groups, tokens=tokens))
        for index, answer in answers:
            unit = unit_of[index]
            rows[unit][index] = {
                "prompt_index": prompts[index].index,
                "candidates": [asdict(candidate) for candidate in answer.candidates],
                "failures": answer.failures,
                "tokenizer": policy.tokenizer_fingerprint,
            }
            if len(rows[unit]) == len(self.units[unit]):
                self.shards.write(unit, [row for _, row in sorted(rows.pop(unit).items())])


def _sample_stage(
    stage: Stage, works: Sequence[_EntryWork], loader: PolicyLoader, console: Console | None, title: str
) -> None:
    """Every entry of one policy, which is loaded where any process has something left to do."""
    left = [work for work in works if not work.shards.open(console=console, title=f"{title}, {work.source}")]
    if any(work.shards.is_work_left for work in left):
        pending = {work.index: sum(len(work.units[unit]) for unit in work.shards.pending()) for work in left}
        known = len(left) < len(works) or any(work.has_begun for work in left)
        policy = loader.load(stage, known_to_answer=known)
        with progress(console, title, sum(pending.values())) as advance:
            for work in left:
                work.run(policy, advance)
    for work in left:
        work.shards.merge()


class _Rows:
    """The output's lines from the entries' files, all read side by side."""

    def __init__(
        self, prompts: Sequence[RankedGroup], works: dict[int, _EntryWork], sampling: SamplingSection, keep_all: bool
    ) -> None:
        self.prompts, self.works, self.sampling, self.keep_all = prompts, works, sampling, keep_all
        #: Lines of the prompts that got no response; complete when `lines` has ended.
        self.failed: list[str] = []

    def lines(self) -> Iterator[str]:
        """One for each prompt with a response.

        Raises:
            UserError: no prompt has one.
        """
        reasons: Counter[str] = Counter()
        as_trained = TEMPLATES[self.sampling.template].response
        responses = 0
        with contextlib.ExitStack() as stack:
            files = {
                index: stack.enter_context(work.shards.output.open(encoding="utf-8"))
                for index, work in sorted(self.works.items())
            }
            for prompt in self.prompts:
                read = {index: json.loads(next(file)) for index, file in files.items()}
                sampled = [
                    Sampled(
                        work.entry,
                        work.source,
                        work.policy,
                        read[index]["candidates"],
                        read[index]["failures"],
                        read[index]["tokenizer"],
                    )
                    for index, work in sorted(self.works.items())
                ]
                row = joined_row(
                    prompt,
                    sampled,
                    keep_provided=self.sampling.keep_provided,
                    as_trained=as_trained,
                    keep_all=self.keep_all,
                )
                line = json.dumps(row, ensure_ascii=False, default=str) + "\n"  # a table may hold dates
                responses += len(row["responses"])
                if not row["responses"]:
                    reasons.update(item.get("why", item["reason"]) for item in row["meta"]["removed"])
                if row["responses"] or self.keep_all:
                    yield line
                else:
                    self.failed.append(line)
        if not responses:
            said = "; ".join(f"{count} times {reason}" for reason, count in reasons.most_common(3)) or "nothing to keep"
            raise UserError(
                f"{self.sampling.output}: not written, because none of {len(self.prompts)} prompts has a response "
                f"({said}). Change the settings or the model; what was sampled is done again only where they differ."
            )


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one entry gave for one prompt, as it was read from the stage's file.

    Attributes:
        entry: Its section.
        source: Its name in the sources column.
        policy: The name of the model or adapter.
        candidates: Fields of `Candidate`.
        failures: Why others are missing.
        tokenizer: Fingerprint of what the candidates' token ids belong to; None without ids.
    """

    entry: CandidatesSection
    source: str
    policy: str
    candidates: Sequence[dict[str, Any]]
    failures: Sequence[str] = ()
    tokenizer: str | None = None


def joined_row(
    prompt: RankedGroup,
    sampled: Sequence[Sampled],
    *,
    keep_provided: bool,
    as_trained: Callable[[str], str],
    keep_all: bool = False,
) -> dict[str, Any]:
    """All candidates of a prompt in one row: provided responses first, then entry by entry, each text once.

    The row has the columns of `RankedGroup`, without scores, and the prompt's own ones. `meta.candidates` says for
    each response how it was made, with the same keys for all; `meta.removed` names what was left out and why;
    `meta.prompt_index` is the prompt's index. Who measures a policy, instead of training one, keeps empty texts and
    repeated ones too.

    Args:
        prompt: With the responses it came with.
        sampled: Of every entry, in the recipe's order.
        keep_provided: Whether those responses stay.
        as_trained: The template's response text; two responses equal after it are duplicates.
        keep_all: Whether empty texts and duplicates stay.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("responses", "sources", *PER_RESPONSE)}
    details, removed, seen = list[dict[str, Any]](), list[dict[str, str]](), set[str]()

    def add(text: str, source: str, detail: dict[str, Any], known: Mapping[str, Any]) -> None:
        key = as_trained(text)
        if not keep_all and (not text.strip() or key in seen):
            removed.append({"source": source, "reason": "duplicate" if text.strip() else "empty"})
            return
        seen.add(key)
        details.append(detail)
        for name, value in {"responses": text, "sources": source, **known}.items():
            columns[name].append(value)

    if keep_provided:
        for index, (text, source) in enumerate(zip(prompt.responses, prompt.sources, strict=True)):
            detail = _detail("provided", source, provided_score=prompt.scores[index])
            add(text, source, detail, {name: getattr(prompt, name)[index] for name in PER_RESPONSE})
    for item in sampled:
        entry = item.entry
        temperature = None if entry.strategy == "beam" else entry.temperature
        for candidate in item.candidates:
            told = {name: candidate[name] for name in ("num_tokens", "log_prob", "finish_reason")}
            known = {
                "finish_reasons": told["finish_reason"],
                "num_tokens": told["num_tokens"],
                "token_ids": candidate["token_ids"],
                "tokenizers": None if candidate["token_ids"] is None else item.tokenizer,
            }
            add(candidate["text"], item.source, _detail(entry.strategy, item.policy, temperature, **told), known)
        for number in range(entry.k - len(item.candidates)):
            why = {"why": item.failures[min(number, len(item.failures) - 1)]} if item.failures else {}
            removed.append({"source": item.source, "reason": "missing", **why})
    told_of = {
        name: values
        for name, values in columns.items()
        if name not in PER_RESPONSE or any(value is not None for value in values)
    }
    rest = {name: value for name, value in prompt.columns.items() if name not in ("meta", "scores", *columns)}
    meta = {**prompt.origin, "prompt_index": prompt.index, "candidates": details, "removed": removed}
    return {"prompt": prompt.prompt, **told_of, **rest, "meta": meta}


def _detail(
    strategy: str,
    policy: str,
    temperature: float | None = None,
    *,
    num_tokens: int | None = None,
    log_prob: float | None = None,
    finish_reason: str | None = None,
    provided_score: float | None = None,
) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "policy": policy,
        "temperature": temperature,
        "num_tokens": num_tokens,
        "log_prob": log_prob,
        "finish_reason": finish_reason,
        "provided_score": provided_score,
    }
