"""Sections in order, a template around them, and one HTML file at the end.

The file asks for nothing outside itself: styles and pictures are in it, there are no scripts, and a
Content-Security-Policy forbids what somebody might smuggle into a model's answer.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrhf_peft import __version__
from rrhf_peft.files import REPORT, replace_text
from rrhf_peft.plotting import Style, styles
from rrhf_peft.records import UserError
from rrhf_peft.report.folders import Runs, read_runs, run_names
from rrhf_peft.report.sections import (
    data_section,
    evaluation_section,
    listed,
    merge_section,
    recipes_section,
    rounds_section,
    training_in_words,
    training_section,
)

#: By this the page is known as a report, and only a report is replaced by the next one.
GENERATOR = '<meta name="generator" content="rrhf-peft report">'
_GENERATOR_WITHIN = 2000
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "matplotlib")


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Report on any number of folders of training, evaluation, rounds and merges in one HTML file.

    Args:
        paths: The folders, at least one.
        output: The file; by default report.html in the first folder. An existing report there is replaced, as
            it can be made again from the folders; any other file is not.

    Returns:
        The file written.

    Raises:
        UserError: a folder is none of these kinds or damaged, matplotlib is not installed, or the file is there
            and no report, or cannot be written.
    """
    target = output if output is not None else paths[0] / REPORT
    runs = read_runs(paths)  # first: a wrong folder is what a user would want to hear of
    _refuse_other_files(target)
    # What training alone shows opens the page where no section says the result first.
    opening = [] if runs.evaluations or runs.rounds else training_in_words(runs.training)
    title = "Report on " + listed(run_names(paths), 4)
    replace_text(target, render(title=title, opening=opening, sections=sections(runs), made_with=versions(runs)))
    return target


def sections(runs: Runs) -> list[dict[str, Any]]:
    """What there is to show, the result first."""
    look = _styles(runs)
    shown: list[dict[str, Any] | None] = []
    for index, (name, rounds) in enumerate(runs.rounds.items(), 1):
        shown.append(rounds_section(name, rounds, f"rounds-{index}"))
        if rounds.evaluation is not None:
            anchor, title = f"rounds-evaluation-{index}", f"All policies of {name}"
            shown.append(evaluation_section(rounds.evaluation, look, anchor, title=title))
    for index, (name, evaluation) in enumerate(runs.evaluations.items(), 1):
        title = "Evaluation" if len(runs.evaluations) == 1 else f"Evaluation: {name}"
        shown.append(evaluation_section(evaluation, look, f"evaluation-{index}", title=title))
    if runs.training:
        shown += [training_section(runs.training, look, "training"), data_section(runs.training, "data")]
    if runs.merges:
        shown.append(merge_section(runs.merges, "merge"))
    if runs.training:
        shown.append(recipes_section(runs.training, "recipes"))
    return [section for section in shown if section is not None]


def versions(runs: Runs) -> list[tuple[str, str]]:
    """What this page was made with, and by which peft the adapters were saved."""
    facts = [("rrhf-peft", __version__)]
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts.append((name, importlib.metadata.version(name)))
    saved_by = sorted({run.peft_version for run in runs.training.values() if run.peft_version is not None})
    if saved_by:
        facts.append(("adapters saved by", ", ".join(f"peft {version}" for version in saved_by)))
    return facts


def render(**page: Any) -> str:
    """The page as HTML out of what page.html names; every text in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rrhf_peft.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page)


def _styles(runs: Runs) -> dict[str, Style]:
    """One look for a name wherever it occurs; the policy that an evaluation starts from is grey."""
    evaluations = [*runs.evaluations.values(), *(one.evaluation for one in runs.rounds.values() if one.evaluation)]
    policies = [name for evaluation in evaluations for name in evaluation.numbers.policies]
    return styles([*policies, *runs.training], baseline=policies[0] if policies else None)


def _refuse_other_files(target: Path) -> None:
    if not target.exists():
        return
    try:
        with target.open(encoding="utf-8") as file:
            is_report = GENERATOR in file.read(_GENERATOR_WITHIN)
    except (OSError, UnicodeDecodeError):
        is_report = False
    if not is_report:
        raise UserError(
            f"{target}: is there already and is no report of rrhf-peft, so it is not replaced. Choose another --output."
        )
