"""Score a recipe's candidates: `rrhf-peft score`, `python -m rrhf_peft.score`, `accelerate launch -m rrhf_peft.score`.

One implementation behind the three, with the same options and the same errors. Left to others: the
scoring itself (`collecting.score`), and every other verb (`cli`).
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
        help="Changes to the recipe, for example scoring.input=my.jsonl or scoring.max_groups=100.",
        show_default=False,
    ),
]


@plain_errors()
def score(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output, and start again where one was begun.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score candidate responses: by a reward model, a judge, a rule, a policy, people, or several of these.

    [bold]Examples[/bold]

      rrhf-peft score recipes/scoring/rule.yaml
      rrhf-peft score recipes/scoring/reward_model.yaml scoring.max_groups=100

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.score recipes/scoring/reward_model.yaml

    The output (scoring.output) trains as it is. A run that was killed
    continues when the same command is given again.
    """
    from rich.console import Console

    from rrhf_peft.collecting.score import score_recipe
    from rrhf_peft.recipe import load_recipe

    outcome = score_recipe(load_recipe(recipe, overrides or [], needs=["scoring"]), overwrite=overwrite)
    if process_index() != 0:
        return
    if as_json:
        paths = {name: str(path) for name in ("output", "failures", "sheet") if (path := getattr(outcome, name))}
        report = outcome.report.to_dict() if outcome.report else None
        print_json({**paths, "report": report})
    elif outcome.sheet is not None:
        typer.echo(f"Sheet: {outcome.sheet}")
        typer.echo(
            "Next: give everyone a copy to fill (1 is best, ties allowed); keep the .key.jsonl beside the sheet."
        )
        typer.echo("Then: name the filled copies in scoring.scorer.annotations and run the same command.")
    else:
        Console().print(outcome.report)
        if outcome.failures is not None:
            typer.echo(f"Failures: {outcome.failures}")
        typer.echo(f"Done: {outcome.output}")


def main() -> None:
    """The entry of `python -m rrhf_peft.score`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(score)
    app(prog_name="python -m rrhf_peft.score")


if __name__ == "__main__":
    main()
