"""`rrhf-peft evaluate`: policies answer the held-out prompts, and everything is measured on their answers.

    policies --sample--> samples/ --score--> scored/ ---\\
                            |---judge model--> perplexity/ ---> evaluation.json, table.md, plots/
    labelled pairs, references --p_i--> pairs/, references/ ---/

Every file is made by all processes of the launch, unit by unit, so that an evaluation that was killed
continues, and another policy in the recipe costs its own share only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json

from rich.console import Console

from rrhf_peft.evaluate.folder import RECIPE, TABLE, OutputFolder
from rrhf_peft.evaluate.inputs import Plan, make_plan, sampling_recipe, scoring_recipe, settings_of, told_of
from rrhf_peft.evaluate.measure import judge_perplexity, judge_wins, policy_log_probs
from rrhf_peft.evaluate.numbers import EVALUATION, Evaluation, make_numbers, read_evaluation
from rrhf_peft.files import replace_text
from rrhf_peft.jobs import exclusive, launched_processes, whole_models
from rrhf_peft.recipe import Recipe, recipe_text
from rrhf_peft.recipe.stages import JudgeScorer
from rrhf_peft.sample.run import sample_recipe
from rrhf_peft.score.run import score_recipe


def evaluate_recipe(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> Evaluation:
    """Evaluate the policies that the recipe's `evaluation:` names; under a launcher every process calls it.

    The same evaluation, once finished, is read back.

    Args:
        recipe: with the section `evaluation`.
        overwrite: replace what an earlier evaluation left in the output folder, once there is something to replace
            it with.
        console: where progress goes; None keeps silent.

    Raises:
        UserError: anything the user can fix, told before the work where it can be known then.
    """
    assert recipe.evaluation is not None
    output = recipe.evaluation.output
    with launched_processes() as processes, whole_models(), exclusive(output, processes), contextlib.ExitStack() as end:
        console = console if console is not None and processes.is_main else Console(quiet=True)
        plan = make_plan(recipe)
        folder = OutputFolder(output, settings_of(plan))

        def begin() -> bool:
            is_finished = folder.open(reads=plan.reads, overwrite=overwrite, end=end)
            if not is_finished:
                replace_text(folder.path / RECIPE, recipe_text(recipe))
            return is_finished

        if processes.on_main(begin):
            return read_evaluation(folder.path, was_finished=True)
        for number, name in enumerate(plan.policies, start=1):
            console.print(f"policy {name} ({number} of {len(plan.policies)})", highlight=False, style="bold")
            with told_of(f"evaluation.policies.{name}"):
                _answer(plan, folder, name, console)
                policy_log_probs(plan, folder, name, processes, console)
        if plan.section.perplexity is not None:
            with told_of("evaluation.perplexity"):
                judge_perplexity(plan, folder, processes, console)
        if plan.section.wins is not None and isinstance(plan.section.wins.by, JudgeScorer):
            with told_of("evaluation.wins.by"):
                judge_wins(plan, folder, processes, console)
        processes.wait_for_all()
        processes.on_main(lambda: _finish(plan, folder))
    return read_evaluation(folder.path)


def _answer(plan: Plan, folder: OutputFolder, name: str, console: Console) -> None:
    """The policy's responses and their rewards; what is finished is passed over by sampling and scoring."""
    samples = folder.file("samples", name)
    sample_recipe(sampling_recipe(plan, name, samples), console=console, keep_all=True)
    folder.keep()
    for label in plan.section.scorers:
        with told_of(f"scorer {label}"):
            recipe = scoring_recipe(plan, label, samples, folder.file("scored", name, label))
            score_recipe(recipe, console=console, least_responses=1)


def _finish(plan: Plan, folder: OutputFolder) -> None:
    """Numbers, plots and table from the files; the table last, which says that all is there."""
    numbers = make_numbers(plan, folder)
    (folder.path / TABLE).unlink(missing_ok=True)
    text = json.dumps(numbers.model_dump(), indent=2, ensure_ascii=False)
    replace_text(folder.path / EVALUATION, text + "\n")
    evaluation = read_evaluation(folder.path)
    if importlib.util.find_spec("matplotlib") is not None:
        from rrhf_peft.evaluate.plots import write_plots

        write_plots(evaluation)
    replace_text(folder.path / TABLE, evaluation.markdown())
