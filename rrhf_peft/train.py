"""Train a recipe: `rrhf-peft train`, `python -m rrhf_peft.train` and `accelerate launch -m rrhf_peft.train`.

One implementation behind the three, with the same options and the same errors. Left to others: the
run itself (`training`), and every other verb (`cli`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rrhf_peft.console import plain_errors, process_index

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, for example training.learning_rate=1e-4 or adapter=null.",
        show_default=False,
    ),
]


@plain_errors()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    ignore_changes: Annotated[
        bool, typer.Option("--ignore-changes", help="Resume although the recipe or the data is not what it was.")
    ] = False,
) -> None:
    """Train an adapter (or all weights) on ranked responses.

    [bold]Examples[/bold]

      rrhf-peft train recipes/quickstart.yaml
      rrhf-peft train recipes/quickstart.yaml training.learning_rate=1e-4
      rrhf-peft train recipes/quickstart.yaml --resume

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.train recipes/lora_7b.yaml

    The run folder (training.output_dir) gets the adapter in PEFT format, the
    resolved recipe.yaml, data_report.json, metrics.jsonl and checkpoints.
    """
    if resume and overwrite:
        raise typer.BadParameter(
            "continues the run that --overwrite would remove; give one of the two", param_hint="--resume"
        )
    if ignore_changes and not resume:
        raise typer.BadParameter("only means something with --resume", param_hint="--ignore-changes")

    from accelerate import PartialState

    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.training import train_recipe

    checked = load_recipe(recipe, overrides or [])
    outcome = train_recipe(checked, resume=resume, overwrite=overwrite, ignore_changes=ignore_changes)
    PartialState().destroy_process_group()  # left open, its threads can abort the interpreter's exit
    if process_index() == 0:
        folder = outcome.run_folder
        typer.echo(f"Done: {folder}")
        if checked.adapter is not None:
            typer.echo(f"Next: rrhf-peft merge {folder} --output {folder}-merged")


def main() -> None:
    """The entry of `python -m rrhf_peft.train`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(train)
    app(prog_name="python -m rrhf_peft.train")


if __name__ == "__main__":
    main()
