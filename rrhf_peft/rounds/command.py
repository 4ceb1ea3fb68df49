"""The verb: `rrhf-peft rounds`, `python -m rrhf_peft.rounds` and `accelerate launch -m rrhf_peft.rounds`.

One implementation behind the three, with the same options and the same errors. Left to others: the
rounds themselves (`rounds.run`), and every other verb (`rrhf_peft.cli`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rrhf_peft.console import AsJson, plain_errors, print_json, process_index

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, for example rounds.count=5 or sampling.max_prompts=100.",
        show_default=False,
    ),
]


@plain_errors()
def rounds(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an existing folder of rounds first, and start again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Sample, score, train, evaluate; and again from the trained policy, round after round (IP-n).

    [bold]Examples[/bold]

      rrhf-peft rounds recipes/rounds/ip.yaml
      rrhf-peft rounds recipes/rounds/ip.yaml rounds.count=5

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.rounds recipes/rounds/ip.yaml

    Each round has a folder in rounds.output; rounds.json and table.md
    there have one row for each. A run that was killed, in whatever stage,
    continues when the same command is given again.
    """
    from accelerate import PartialState
    from rich.console import Console

    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.rounds.run import run_rounds
    from rrhf_peft.rounds.table import rows_table

    needs = ["rounds", "model", "sampling", "scoring"]
    outcome = run_rounds(load_recipe(recipe, overrides or [], needs=needs), overwrite=overwrite)
    PartialState().destroy_process_group()  # left open, its threads can abort the interpreter's exit
    if process_index() != 0:
        return
    if as_json:
        print_json({"output": str(outcome.output), "rounds": [row.to_dict() for row in outcome.rows]})
        return
    Console().print(rows_table(outcome.rows))
    typer.echo(f"{'Finished before' if outcome.was_finished else 'Done'}: {outcome.output}")
