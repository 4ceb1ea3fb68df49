"""The `rrhf-peft` command: one thin function per verb.

Heavy imports stand inside the verbs, so that help comes at once. Left to others: what a verb does
(the package it names), `sample`, `score`, `train`, `evaluate` and `report` (modules of these names), `rounds`
(`rrhf_peft.rounds.command`), `convert` and `inspect` (`rrhf_peft.data_verbs`), errors and exit codes
(`rrhf_peft.console`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from rrhf_peft import __version__
from rrhf_peft.console import AsJson, plain_errors, print_json
from rrhf_peft.data_verbs import convert, inspect
from rrhf_peft.evaluate import evaluate
from rrhf_peft.report import report
from rrhf_peft.rounds.command import rounds
from rrhf_peft.sample import sample
from rrhf_peft.score import score
from rrhf_peft.train import Overrides, RecipeFile, train

app = typer.Typer(
    name="rrhf-peft",
    help="Align a language model with ranked responses through LoRA and QLoRA adapters.\n\n"
    "New here? [bold]rrhf-peft demo[/bold] shows the whole way in a few minutes, without a network or a GPU. "
    "Then: inspect your data, plan the memory, train, merge.",
    epilog="Exit codes: 0 done, 1 an error that you can mend, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rrhf-peft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@plain_errors()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Make a small model, rank its own samples, train on the ranks, compare, merge. Needs no network.

    [bold]Example[/bold]

      rrhf-peft demo --output runs/demo

    Afterwards recipes/quickstart.yaml trains on what it left in runs/demo.
    """
    from rrhf_peft.quickstart import run_demo

    run_demo(output)


app.command()(convert)
app.command()(sample)
app.command()(score)
app.command()(inspect)


@app.command()
@plain_errors()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="Plan for a GPU that computes in bfloat16, or for a CPU.")
    ] = "cuda",
    processes: Annotated[
        int, typer.Option(min=1, help="Shard weights, gradients and optimizer over this many processes (FSDP).")
    ] = 1,
    responses: Annotated[int, typer.Option(min=1, help="Responses per prompt: how long a group may be.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a recipe before it runs: arithmetic only, no weights, no GPU.

    [bold]Examples[/bold]

      rrhf-peft plan recipes/qlora_7b.yaml
      rrhf-peft plan recipes/qlora_7b.yaml engine.chunk_tokens=4096
      rrhf-peft plan recipes/full_8xa100.yaml --processes 8
    """
    from rrhf_peft.memory_plan import plan_memory
    from rrhf_peft.recipe import load_recipe

    result = plan_memory(load_recipe(recipe, overrides or []), device=device, processes=processes, responses=responses)
    if as_json:
        print_json(result.to_dict())
    else:
        Console().print(result)


app.command()(train)
app.command()(evaluate)
app.command()(rounds)
app.command()(report)


@app.command()
@plain_errors()
def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A run folder, or any PEFT LoRA folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.", show_default=False)],
    base: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(
            help="Add the adapter to the weights as training quantised them (the default after quantised training), "
            "or to the original ones."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model, when it is not where the adapter says.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type on disk; auto keeps the base's.")
    ] = "auto",
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"] | None,
        typer.Option(help="How training held the base, where the adapter's folder has no recipe.yaml to say so."),
    ] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="With --quantization nf4 or fp4: whether the scales were quantised as well.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output at the very end.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare the merged model with the adapter's before the output appears.")
    ] = True,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest logit difference, as a share of the largest logit; by default that of the dtype."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn an adapter into standalone weights, with a report that proves they compute the same.

    The result loads with AutoModelForCausalLM, without PEFT and bitsandbytes.
    If it differs from the adapter's model, or not at all from the base, there is
    no output and the exit code is 1.

    [bold]Examples[/bold]

      rrhf-peft merge runs/quickstart --output runs/quickstart-merged
      rrhf-peft merge runs/quickstart -o merged --base original --dtype bfloat16
    """
    from rrhf_peft.export import merge_adapter, merge_progress, render_report

    with merge_progress() as on_progress:
        report = merge_adapter(
            adapter,
            output,
            base=base,
            dtype=dtype,
            shard_size=shard_size,
            overwrite=overwrite,
            base_model=base_model,
            quantization=quantization,
            double_quant=double_quant,
            verify=verify,
            tolerance=tolerance,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        Console().print(render_report(report))


@app.command()
@plain_errors()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to a file instead of stdout.")] = None,
) -> None:
    """Print the recipe's JSON schema: every key, its type and what it means. Editors complete recipes with it.

    [bold]Examples[/bold]

      rrhf-peft schema --output recipe.schema.json

    Then, as the first line of a recipe:

      # yaml-language-server: $schema=recipe.schema.json

    The schema is that of the installed peft and transformers, whose field names it has.
    """
    from rrhf_peft.files import replace_text
    from rrhf_peft.recipe import json_schema

    if output is None:
        print_json(json_schema())
    else:
        replace_text(output, json.dumps(json_schema(), indent=2) + "\n")


def main() -> None:
    """The console command."""
    app(prog_name="rrhf-peft")


if __name__ == "__main__":
    main()
