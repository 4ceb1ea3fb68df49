"""The run folder's README: what was trained, on what, how it went, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rrhf_peft import __version__
from rrhf_peft.data import DataReport
from rrhf_peft.files import replace_text
from rrhf_peft.modeling.model_card import markdown_table, model_card
from rrhf_peft.recipe import Recipe, recipe_text
from rrhf_peft.train.splits import PromptReport

_CURVE = ("rewards/mean", "kl/response", "loss", "rank_loss", "sft_loss", "pair_accuracy", "best_hit_rate")


def write_model_card(
    folder: Path, recipe: Recipe, report: DataReport | PromptReport, history: list[dict[str, Any]]
) -> None:
    """Write README.md with Hugging Face metadata, in place of PEFT's empty form.

    Args:
        folder: the run folder.
        recipe: what was run.
        report: of the training data.
        history: `TrainerState.log_history`.
    """
    library = "transformers" if recipe.adapter is None and not recipe.model.init_adapter else "peft"
    intro = (
        f"`{recipe.model.name}` aligned with ranked responses by the `{recipe.objective.name}` objective, "
        f"with rrhf-peft {__version__}. {_of_objective(recipe)}"
    )
    after = "The curve is in `metrics.jsonl`, the data report in `data_report.json`. Standalone weights:"
    merge = f"```sh\nrrhf-peft merge {folder} --output {folder}-merged\n```"
    sections = {
        "Data": "\n".join(_data_lines(report)),
        "Training": f"{_curve_table(history)}\n\n{after}\n\n{merge}",
        "Recipe": f"```yaml\n{recipe_text(recipe).rstrip()}\n```",
    }
    tags = [recipe.objective.name, "ranked-responses"]
    card = model_card(folder.name, intro, sections, base=recipe.model.name, library=library, tags=tags)
    replace_text(folder / "README.md", card)


def _of_objective(recipe: Recipe) -> str:
    """The first line that its section of the recipe says of itself: name, paper, equation."""
    return str(type(recipe.objective).__doc__).splitlines()[0]


def _data_lines(report: DataReport | PromptReport) -> list[str]:
    """What a reader of the card asks first; the paper expects the policy's reward to approach the mean of max."""
    if isinstance(report, PromptReport):
        return [
            f"- {report.prompts_kept:,} prompts, answered by the policy itself while it was trained",
            f"- {report.provided_responses:,} responses that came with them, ranked together with its own",
        ]
    most, least = max(report.k_histogram), min(report.k_histogram)
    return [
        f"- {report.groups_kept:,} groups, {report.responses_kept:,} responses "
        f"({least if least == most else f'{least} to {most}'} per group)",
        f"- scores: mean {report.score_mean:.3f}, mean of each group's maximum {report.score_mean_of_max:.3f}, "
        f"{report.tie_rate:.0%} of pairs tied",
        f"- sources: {', '.join(list(report.sources)[:12])}{' ...' if len(report.sources) > 12 else ''}",
    ]


def _curve_table(history: list[dict[str, Any]]) -> str:
    """First and last tenth of the steps, averaged: single steps are noise."""
    if not any("loss" in entry for entry in history):
        return "No step was logged."
    rows = []
    for name in _CURVE:
        values = [entry[name] for entry in history if name in entry]
        tenth = max(1, len(values) // 10)
        first, last = values[:tenth], values[-tenth:]
        if values:
            rows.append((name, f"{sum(first) / len(first):.4f}", f"{sum(last) / len(last):.4f}"))
    return markdown_table(("", "first steps", "last steps"), rows)
