"""`rrhf-peft sample`: prompts and policies in, candidates.jsonl out, by any number of processes.

The work is cut into stages (one policy each) and these into units of consecutive prompts. Every process
appends its finished units to its own file, so that a run killed at any moment continues where it was,
with any number of processes, and comes to the same rows:

    OUTPUT.stages/<fingerprint>.jsonl.parts/   a stage at work (`rrhf_peft.jobs`)
    OUTPUT.stages/<fingerprint>.jsonl          a finished stage
    OUTPUT                                     all rows, only when all stages are finished

A stage's name is a fingerprint of all that its rows depend on. What was changed between two runs is
therefore done again, and only that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rrhf_peft.data import TEMPLATES, read_groups
from rrhf_peft.files import check_output, is_finished, read_mark, refuse_finished, remove, work_folder, write_files
from rrhf_peft.jobs import Processes, ShardedOutput, exclusive, fingerprint_of, launched_processes, whole_models
from rrhf_peft.recipe import Recipe, SamplingSection
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.join import Sampled, joined_row
from rrhf_peft.sample.policies import (
    PolicyLoader,
    Stage,
    check_adapters,
    decoding_of,
    make_stages,
    source_of,
)
from rrhf_peft.sample.progress import sample_progress
from rrhf_peft.sample.report import SampleReport, make_report


@dataclass(frozen=True)
class SampleOutcome:
    """Where the rows are, what they came to, and how often memory ran out on the way (this process)."""

    output: Path
    report: SampleReport
    halvings: int


def sample_recipe(
    recipe: Recipe, *, overwrite: bool = False, console: Console | None = None, keep_all: bool = False
) -> SampleOutcome:
    """Sample candidates as the recipe's `sampling:` says, or finish what an earlier run began.

    Args:
        recipe: With the section `sampling`, and `model` unless every entry names its own.
        overwrite: Replace the output and everything unfinished of it.
        console: Where progress goes; None keeps silent.
        keep_all: Keep empty and repeated responses, which measure a policy and are nothing to train on.

    Raises:
        UserError: the output exists, the prompts or a policy cannot be read, or a backend is not installed.
    """
    sampling = recipe.sampling
    assert sampling is not None
    output = Path(sampling.output)
    if output.suffix != ".jsonl":
        raise UserError(f"sampling.output: {output} must end with .jsonl, which is what is written.")
    folder = output.with_name(f"{output.name}.stages")
    with launched_processes() as processes, whole_models(), exclusive(output, processes):
        prompts = read_groups(
            sampling.prompts,
            format=sampling.format,
            split=sampling.split,
            max_groups=sampling.max_prompts,
            needs="prompt",
        )
        stages = make_stages(recipe)
        check_adapters(stages)
        loader = PolicyLoader(sampling)
        works = [_ShardedStage(stage, prompts, sampling, folder, processes) for stage in stages]
        joining = [sampling.keep_provided, keep_all, [asdict(prompt) for prompt in prompts]]
        entries = [[source_of(stage, entry) for entry in stage.entries.values()] for stage in stages]
        fingerprint = fingerprint_of([work.fingerprint for work in works], entries, joining)
        if processes.on_main(lambda: _open(sampling, output, folder, fingerprint, overwrite)):
            if console is not None and processes.is_main:
                console.print(f"finished before: {output}", highlight=False, soft_wrap=True)
        else:
            for number, work in enumerate(works, start=1):
                title = f"{work.stage.name} ({number}/{len(works)})"
                work.run(loader, console if processes.is_main else None, title)
            files = [work.output for work in works]
            processes.on_main(
                lambda: _write_rows(output, prompts, stages, files, sampling, keep_all, fingerprint=fingerprint)
            )
            processes.on_main(lambda: remove(folder))
        with output.open(encoding="utf-8") as lines:
            report = make_report(map(json.loads, lines))
        return SampleOutcome(output, report, loader.budget.halvings)


def _open(sampling: SamplingSection, output: Path, folder: Path, fingerprint: str, overwrite: bool) -> bool:
    """Start, continue, or see that the same work was finished before."""
    if not overwrite and is_finished(output, fingerprint):
        if folder.exists():
            work_folder(folder, verb="sample")
        remove(folder)
        return True
    prompts = [sampling.prompts] if isinstance(sampling.prompts, str) else sampling.prompts
    check_output(output, key="sampling.output", reads=prompts, overwrite=overwrite, continues=True)
    if not overwrite and not ((held := read_mark(folder)) and held.may_replace):
        refuse_finished(output, fingerprint)
    work_folder(folder, verb="sample", overwrite=overwrite)
    return False


class _ShardedStage:
    """One stage's work, as units of consecutive prompts."""

    def __init__(
        self,
        stage: Stage,
        prompts: Sequence[RankedGroup],
        sampling: SamplingSection,
        folder: Path,
        processes: Processes,
    ) -> None:
        self.stage, self.prompts, self.sampling, self.processes = stage, prompts, sampling, processes
        self.fingerprint = _fingerprint(stage, prompts, sampling)
        self.output = folder / f"{self.fingerprint[:24]}.jsonl"
        size = sampling.unit_prompts
        self.units = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        self.shards = ShardedOutput(
            self.output, verb="sample", fingerprint=self.fingerprint, units=len(self.units), processes=processes
        )

    def run(self, loader: PolicyLoader, console: Console | None, title: str) -> None:
        """Do this process's part, wait for the others, and leave the merged file."""
        if self.shards.open(console=console, title=title):
            return
        pending = self.shards.pending()
        if pending:
            policy = loader.load(self.stage)
            total = sum(len(self.units[unit]) for unit in pending)
            with sample_progress(console, title, total) as progress:
                for unit in pending:
                    self.shards.write(unit, self._rows(policy, self.units[unit], progress))
        self.shards.merge()

    def _rows(self, policy: Any, prompts: Sequence[RankedGroup], progress: Any) -> list[dict[str, Any]]:
        """For each prompt, every entry's candidates."""
        found = {}
        last = max(self.stage.entries)
        for place, entry in self.stage.entries.items():
            keys = [f"{self.sampling.seed}/{place}/{prompt.index}" for prompt in prompts]

            def advance(groups: int, tokens: int, is_last: bool = place == last) -> None:
                progress(groups if is_last else 0, tokens)  # a group is done when its last entry is

            answers = policy.respond(prompts, keys, decoding_of(entry, self.sampling), advance)
            found[str(place)] = [[asdict(candidate) for candidate in own] for own in answers]
        return [
            {"prompt_index": prompt.index, "candidates": {place: own[row] for place, own in found.items()}}
            for row, prompt in enumerate(prompts)
        ]


def _fingerprint(stage: Stage, prompts: Sequence[RankedGroup], sampling: SamplingSection) -> str:
    """Of everything that a stage's rows depend on; not of how the work is batched and where it is written."""
    settings = sampling.model_dump(include={"template", "stop", "max_prompt_tokens", "seed", "unit_prompts"})
    texts = hashlib.sha256()
    for prompt in prompts:
        texts.update(json.dumps(prompt.prompt).encode())
    everything = [stage.describe(), settings, texts.hexdigest()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _write_rows(
    output: Path,
    prompts: Sequence[RankedGroup],
    stages: Sequence[Stage],
    files: Sequence[Path],
    sampling: SamplingSection,
    keep_all: bool,
    *,
    fingerprint: str,
) -> None:
    by_entry: dict[int, tuple[Stage, list[list[dict[str, Any]]]]] = {}
    for stage, path in zip(stages, files, strict=True):
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line)["candidates"] for line in lines]
        for place in stage.entries:
            by_entry[place] = (stage, [row[str(place)] for row in rows])
    as_trained = TEMPLATES[sampling.template].response
    lines_out = []
    for number, prompt in enumerate(prompts):
        sampled = [
            Sampled(entry, source_of(by_entry[place][0], entry), by_entry[place][0].name, by_entry[place][1][number])
            for place, entry in enumerate(sampling.candidates)
        ]
        row = joined_row(
            prompt, sampled, keep_provided=sampling.keep_provided, as_trained=as_trained, keep_all=keep_all
        )
        lines_out.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_files(output, {output: lines_out}, verb="sample", fingerprint=fingerprint)
