"""The `rrhf-peft` command: one thin function per verb.

Heavy imports stand inside the verbs, so that help comes at once. Left to others: what a verb does
(the package it names), `train` (`rrhf_peft.train`), errors and exit codes (`rrhf_peft.console`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from rrhf_peft import __version__
from rrhf_peft.console import plain_errors
from rrhf_peft.train import Overrides, RecipeFile, train

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe

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

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


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


@app.command()
@plain_errors()
def convert(
    source: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Files, folders of them, or hub ids.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The ranked file to write (.jsonl).", show_default=False)
    ],
    data_format: Annotated[
        str, typer.Option("--format", help="Format of the data; auto recognises the columns.")
    ] = "auto",
    split: Annotated[str, typer.Option(help="Split to read from folders and hub ids.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    max_groups: Annotated[int | None, typer.Option(min=1, help="Read only the first this many groups.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn public preference data of many formats into one ranked file: prompt, responses, scores, sources.

    Other columns are not kept, and responses without a rating are left out; both are reported.
    Recipes read the same formats directly (data.format), so converting is for looking, mixing and editing.

    [bold]Examples[/bold]

      rrhf-peft convert berkeley-nest/Nectar --output nectar.jsonl --max-groups 5000
      rrhf-peft convert ready.trees.jsonl.gz --format oasst -o oasst.jsonl
      rrhf-peft convert PKU-Alignment/PKU-SafeRLHF --format pku_saferlhf:safer -o safer.jsonl
    """
    from rrhf_peft.data import convert as convert_data

    report = convert_data(
        source,
        output=output,
        format=data_format,
        split=split,
        revision=revision,
        max_groups=max_groups,
        overwrite=overwrite,
    )
    if as_json:
        _print_json(report.to_dict())
    else:
        Console().print(report)


@app.command()
@plain_errors()
def inspect(
    source: Annotated[
        Path,
        typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe (.yaml) or a ranked data file.", show_default=False),
    ],
    overrides: Overrides = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "--model", help="With a data file: the model or tokenizer to count tokens with."),
    ] = None,
    group: Annotated[int | None, typer.Option(help="Show the group with this index instead of the first kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what training will see: the data report, and one group with its tokens, roles and mask.

    [bold]Examples[/bold]

      rrhf-peft inspect recipes/quickstart.yaml
      rrhf-peft inspect recipes/quickstart.yaml data.max_tokens=64 --group 7
      rrhf-peft inspect my_ranked.jsonl --tokenizer runs/demo/base

    A data file takes the same changes as a recipe, for example data.template=hh.
    """
    from rrhf_peft.data import render_example
    from rrhf_peft.modeling import load_tokenizer
    from rrhf_peft.records import UserError
    from rrhf_peft.training.splits import read_splits, tokenize_splits

    recipe = _recipe_to_inspect(source, overrides or [], tokenizer)
    loaded = load_tokenizer(
        recipe.model.tokenizer or recipe.model.name,
        revision=recipe.model.revision if recipe.model.tokenizer is None else None,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    groups = read_splits(recipe)
    splits, reports = tokenize_splits(recipe, groups, loaded)
    if as_json:
        _print_json({name: report.to_dict() for name, report in reports.items()})
        return
    console = Console()
    for name, report in reports.items():
        console.rule(name)
        console.print(report)
    kept = splits["train"]
    shown = next((item for item in kept if group in (None, item.index)), None)
    if shown is None:
        raise UserError(
            f"--group {group}: no such group among those kept for training. Kept are {len(kept)}, with indices from "
            f"{kept[0].index} to {kept[-1].index}; the report above says why others were dropped."
        )
    console.rule("example")
    console.print(render_example(groups["train"][shown.index], shown, loaded))


def _recipe_to_inspect(source: Path, overrides: list[str], tokenizer: str | None) -> Recipe:
    from rrhf_peft.recipe import load_recipe, make_recipe
    from rrhf_peft.records import UserError

    if source.suffix in (".yaml", ".yml"):
        if tokenizer is not None:
            overrides = [*overrides, f"model.tokenizer={json.dumps(tokenizer)}"]
        return load_recipe(source, overrides)
    if tokenizer is None:
        raise UserError(
            f"{source}: to inspect a data file by itself, say whose tokens to count: --tokenizer NAME (a hub id or a "
            "folder). To inspect a recipe, give its .yaml file."
        )
    bare = {
        "model": {"name": tokenizer},
        "data": {"train": str(source)},
        "training": {"output_dir": "runs/inspect"},
    }
    return make_recipe(bare, where=str(source), overrides=overrides)


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
    responses: Annotated[
        int | None, typer.Option(min=1, help="Responses per prompt, for a closer bound on activations.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a recipe before it runs: arithmetic only, no weights, no GPU.

    [bold]Examples[/bold]

      rrhf-peft plan recipes/qlora_7b.yaml
      rrhf-peft plan recipes/qlora_7b.yaml engine.chunk_tokens=4096 --responses 2
      rrhf-peft plan recipes/full_8xa100.yaml --processes 8
    """
    from rrhf_peft.memory_plan import plan_memory
    from rrhf_peft.recipe import load_recipe

    result = plan_memory(load_recipe(recipe, overrides or []), device=device, processes=processes, responses=responses)
    if as_json:
        _print_json(result.to_dict())
    else:
        Console().print(result)


app.command()(train)


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
    shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output at the very end.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare the merged model with the adapter's before the output appears.")
    ] = True,
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
            verify=verify,
            on_progress=on_progress,
        )
    if as_json:
        _print_json(report.to_dict())
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
        _print_json(json_schema())
    else:
        replace_text(output, json.dumps(json_schema(), indent=2) + "\n")


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False))


def main() -> None:
    """The console command."""
    app(prog_name="rrhf-peft")


if __name__ == "__main__":
    main()
