"""Evaluate policies: `rrhf-peft evaluate`, `python -m rrhf_peft.evaluate`, `accelerate launch -m rrhf_peft.evaluate`.

One implementation behind the three, with the same options and the same errors. Left to others: the
evaluation itself (`rrhf_peft.evaluation`), and every other verb (`cli`).
"""

from __future__ import annotations

from typing import Annotated

import typer

from rrhf_peft.console import AsJson, plain_errors, print_json, process_index
from rrhf_peft.train import RecipeFile

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, for example evaluation.max_prompts=100 or evaluation.decoding.k=8.",
        show_default=False,
    ),
]


@plain_errors()
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing evaluation, and start from nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare policies on held-out prompts: rewards, perplexity, pair accuracy, best-of-n, wins.

    [bold]Examples[/bold]

      rrhf-peft evaluate recipes/compare/evaluate.yaml
      rrhf-peft evaluate recipes/compare/evaluate.yaml evaluation.max_prompts=100

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.evaluate recipes/compare/evaluate.yaml

    The folder evaluation.output gets evaluation.json, table.md, plots and every
    response with its rewards. An evaluation that was killed continues when the
    same command is given again; so does one whose recipe has got another policy.
    """
    from rich.console import Console

    from rrhf_peft.evaluation.run import evaluate_recipe
    from rrhf_peft.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [], needs=["evaluation"])
    outcome = evaluate_recipe(checked, overwrite=overwrite, console=Console(stderr=True))
    if process_index() != 0:
        return
    if as_json:
        print_json(outcome.to_dict())
        return
    Console().print(outcome)
    typer.echo(f"Done: {outcome.folder}")


def main() -> None:
    """The entry of `python -m rrhf_peft.evaluate`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(evaluate)
    app(prog_name="python -m rrhf_peft.evaluate")


if __name__ == "__main__":
    main()
