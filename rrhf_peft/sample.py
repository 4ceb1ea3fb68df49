"""Sample a recipe: `rrhf-peft sample`, `python -m rrhf_peft.sample` and `accelerate launch -m rrhf_peft.sample`.

One implementation behind the three, with the same options and the same errors. Left to others: the
work itself (`collecting.sample`), and every other verb (`cli`).
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rrhf_peft.console import plain_errors, process_index
from rrhf_peft.train import RecipeFile

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, for example sampling.seed=1 or sampling.max_prompts=100.",
        show_default=False,
    ),
]


@plain_errors()
def sample(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output and start from nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")] = False,
) -> None:
    """Sample candidate responses for a list of prompts, from one or more policies.

    [bold]Examples[/bold]

      rrhf-peft sample recipes/sampling/dp.yaml
      rrhf-peft sample recipes/sampling/dp.yaml sampling.max_prompts=100

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.sample recipes/sampling/dp.yaml

    A run that was killed continues when the same command is given again.
    """
    from rich.console import Console

    from rrhf_peft.collecting.sample import sample_recipe
    from rrhf_peft.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [], needs=["sampling"])
    outcome = sample_recipe(checked, overwrite=overwrite, console=Console(stderr=True))
    if process_index() != 0:
        return
    if as_json:
        figures = {"output": str(outcome.output), "halvings": outcome.halvings, **outcome.report.to_dict()}
        typer.echo(json.dumps(figures, ensure_ascii=False, indent=2))
        return
    Console().print(outcome.report.table())
    if outcome.halvings:
        typer.echo(f"Memory ran out {outcome.halvings} times and the batches were made smaller: lower batch_tokens.")
    typer.echo(f"Done: {outcome.output}")


def main() -> None:
    """The entry of `python -m rrhf_peft.sample`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(sample)
    app(prog_name="python -m rrhf_peft.sample")


if __name__ == "__main__":
    main()
