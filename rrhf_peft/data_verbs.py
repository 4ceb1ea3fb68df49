"""The verbs that look at data: `rrhf-peft convert` and `rrhf-peft inspect`.

Heavy imports stand inside the verbs, so that help comes at once. Left to others: what they show
(`rrhf_peft.data`), and the command that they belong to (`rrhf_peft.cli`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rrhf_peft.console import AsJson, plain_errors, print_json
from rrhf_peft.train import Overrides

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe


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
        print_json(report.to_dict())
    else:
        Console().print(report)


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
    plot: Annotated[
        Path | None, typer.Option(help="Draw the scores by source and by length into this picture (.png, .svg).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show ranked data and what training will see of it.

    A data file: its scores, sources, length bias, ties and repetition, in any format
    that recipes read. A recipe, or a data file with --tokenizer: the data report,
    and one group with its tokens, roles and mask.

    [bold]Examples[/bold]

      rrhf-peft inspect my_ranked.jsonl --plot scores.png
      rrhf-peft inspect recipes/quickstart.yaml
      rrhf-peft inspect recipes/quickstart.yaml data.max_tokens=64 --group 7
      rrhf-peft inspect my_ranked.jsonl --tokenizer runs/demo/base

    A data file takes the same changes as a recipe, for example data.template=hh.
    """
    from rrhf_peft.data import plot_scores, ranked_statistics, render_example
    from rrhf_peft.modeling import load_tokenizer
    from rrhf_peft.records import UserError
    from rrhf_peft.training.splits import read_splits, tokenize_splits

    recipe = _recipe_to_inspect(source, overrides or [], tokenizer)
    is_data = source.suffix not in (".yaml", ".yml")
    console = Console()
    if is_data and tokenizer is None and group is not None:
        raise UserError("--group shows a group as tokens, so say whose: add --tokenizer NAME (a hub id or a folder).")
    groups = read_splits(recipe)
    if plot is not None:
        plot_scores(groups["train"], plot)
    if is_data and not (as_json and tokenizer):
        statistics = ranked_statistics(groups["train"])
        if as_json:
            print_json(statistics.to_dict())
        else:
            console.print(statistics)
    if is_data and tokenizer is None:
        return
    loaded = load_tokenizer(
        recipe.model.tokenizer or recipe.model.name,
        revision=recipe.model.revision if recipe.model.tokenizer is None else None,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    splits, reports = tokenize_splits(recipe, groups, loaded)
    if as_json:
        print_json({name: report.to_dict() for name, report in reports.items()})
        return
    for name, report in reports.items():
        console.rule(name)
        console.print(report)
    if recipe.online is not None:
        return  # the responses are not written yet
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

    if source.suffix in (".yaml", ".yml"):
        if tokenizer is not None:
            overrides = [*overrides, f"model.tokenizer={json.dumps(tokenizer)}"]
        return load_recipe(source, overrides)
    bare = {
        "model": {"name": tokenizer or "none"},
        "data": {"train": str(source)},
        "training": {"output_dir": "runs/inspect"},
    }
    return make_recipe(bare, where=str(source), overrides=overrides)
