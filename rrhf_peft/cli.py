"""The `rrhf-peft` command: the verbs with their arguments, their help and one call each.

`python -m rrhf_peft.VERB` and `accelerate launch -m rrhf_peft.VERB` are the same commands. Heavy imports stand
inside the verbs, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rrhf_peft import __version__
from rrhf_peft.console import AsJson, print_json, process_index, say, terminal, verb

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, and start from nothing.")]


def _overrides(examples: str) -> Any:
    help = f"Changes to the recipe, for example {examples}."
    return typer.Argument(metavar="KEY=VALUE", help=help, show_default=False)


app = typer.Typer(
    name="rrhf-peft",
    help="Align a language model with ranked responses through LoRA and QLoRA adapters.\n\n"
    "New here? [bold]rrhf-peft demo[/bold] shows the whole way in a few minutes, without a network or a GPU. "
    "Then: inspect your data, plan the memory, train, merge.",
    epilog="Exit codes: 0 done, 1 an error, with its remedy, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rrhf-peft {__version__}")
        raise typer.Exit


def _is_main_at_the_end() -> bool:
    """Whether this process speaks, after work for which transformers' trainer has opened a process group."""
    from accelerate import PartialState

    PartialState().destroy_process_group()  # left open, its threads can abort the interpreter's exit
    return process_index() == 0


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@verb
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Make a small model, rank its own samples, train on the ranks, compare, merge. Needs no network.

    [bold]Example[/bold]

      rrhf-peft demo --output runs/demo

    Afterwards recipes/quickstart.yaml trains on what it left in runs/demo.
    """
    from rrhf_peft.demo.run import run_demo

    run_demo(output, console=terminal(stderr=as_json))
    if as_json:
        print_json({"output": str(output)})


@app.command()
@verb
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
    overwrite: Overwrite = False,
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
        terminal().print(report)


@app.command()
@verb
def sample(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("sampling.seed=1 or sampling.max_prompts=100")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
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
    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.sample.run import sample_recipe

    checked = load_recipe(recipe, overrides or [], needs=["sampling"])
    outcome = sample_recipe(checked, overwrite=overwrite, console=terminal(stderr=True))
    if process_index() != 0:
        return
    if as_json:
        figures = {"output": str(outcome.output), "halvings": outcome.halvings, **outcome.report.to_dict()}
        print_json(figures)
        return
    terminal().print(outcome.report.table())
    if outcome.halvings:
        say(f"Memory ran out {outcome.halvings} times and the batches were made smaller: lower batch_tokens.")
    if outcome.failures is not None:
        say(f"Prompts without a response, and why: {outcome.failures}")
    say(f"Done: {outcome.output}")


@app.command()
@verb
def score(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("scoring.input=my.jsonl or scoring.max_groups=100")] = None,
    overwrite: Overwrite = False,
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
    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.score.run import score_recipe

    outcome = score_recipe(load_recipe(recipe, overrides or [], needs=["scoring"]), overwrite=overwrite)
    if process_index() != 0:
        return
    if as_json:
        paths = {name: str(path) for name in ("output", "failures", "sheet") if (path := getattr(outcome, name))}
        report = outcome.report.to_dict() if outcome.report else None
        print_json({**paths, "report": report})
    elif outcome.sheet is not None:
        say(f"Sheet: {outcome.sheet}")
        say("Next: give everyone a copy to fill (1 is best, ties allowed); keep the .key.jsonl beside the sheet.")
        say("Then: name the filled copies in scoring.scorer.annotations and run the same command.")
    else:
        terminal().print(outcome.report)
        if outcome.failures is not None:
            say(f"Failures: {outcome.failures}")
        say(f"Done: {outcome.output}")


@app.command()
@verb
def rank(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="CANDIDATES...", help="What sampling wrote, or ranked data.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the ranking.")] = Path("runs/ranking"),
    annotator: Annotated[
        list[str] | None, typer.Option(help="A name for a link; give it once for each person.", show_default="me")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Compare two sources, or files by their name without suffix: win, tie, lose."),
    ] = None,
    shared: Annotated[int, typer.Option(min=0, help="So many groups are ranked by everyone, for agreement.")] = 30,
    per_group: Annotated[int, typer.Option(min=1, help="People for each of the other groups.")] = 1,
    guidelines: Annotated[Path | None, typer.Option(help="A Markdown file that the page's help shows.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine; 0 is any free one.")] = 8642,
    export: Annotated[bool, typer.Option("--export", help="Serve nothing: write the results so far.")] = False,
    data_format: Annotated[str, typer.Option("--format", help="Format of the data.")] = "auto",
    split: Annotated[str, typer.Option(help="Split to read from folders and hub ids.")] = "train",
    max_groups: Annotated[int | None, typer.Option(min=1, help="Rank only the first this many groups.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let people rank candidates in a browser, blind and shuffled; their ranks train.

    Every annotator has a link; the overview shows progress and agreement. Only
    this machine is served. Interrupted or killed, the same command goes on with
    the same links. At the end (Ctrl-C) the folder has a recipe for score, and
    the ranks for Argilla and Label Studio.

    [bold]Examples[/bold]

      rrhf-peft rank runs/candidates.jsonl --annotator ann --annotator bob
      rrhf-peft rank base.jsonl trained.jsonl --compare trained base
      rrhf-peft rank runs/candidates.jsonl --export
    """
    from rrhf_peft.rank.run import Ranking, rank_candidates

    def ready(ranking: Ranking) -> None:
        if as_json:
            print_json({"output": str(output), "overview": ranking.overview, "annotators": ranking.links})
        else:
            left_out = f", {ranking.left_out} left out" if ranking.left_out else ""
            say(f"{ranking.groups} groups to rank{left_out}. Answers are kept in {output}; Ctrl-C ends.")
            say(f"Overview: {ranking.overview}")
            for name, link in ranking.links.items():
                say(f"{name}: {link}")
        sys.stdout.flush()

    ranking = rank_candidates(
        candidates,
        output,
        annotators=annotator or [],
        compare=compare,
        shared=shared,
        per_group=per_group,
        guidelines=guidelines,
        port=None if export else port,
        on_ready=ready,
        format=data_format,
        split=split,
        max_groups=max_groups,
    )
    if not export and as_json:
        return
    if as_json:
        print_json({"output": str(output), "files": ranking.files, **ranking.figures})
        return
    say(f"Done: {', '.join(ranking.files)} in {output}")
    if any(one["ranked"] for one in ranking.figures["annotators"]):
        say(f"Next: rrhf-peft score {output / 'score.yaml'}")


@app.command()
@verb
def inspect(
    source: Annotated[
        Path,
        typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe (.yaml) or a ranked data file.", show_default=False),
    ],
    overrides: Annotated[list[str] | None, _overrides("data.template=hh or data.max_tokens=64")] = None,
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
    from rrhf_peft.data import plot_scores, prompt_overlap, ranked_statistics, render_example
    from rrhf_peft.modeling import tokenizer_of
    from rrhf_peft.records import UserError
    from rrhf_peft.train.run import read_splits, tokenize_splits

    recipe = _recipe_to_inspect(source, overrides or [], tokenizer)
    is_data = source.suffix not in (".yaml", ".yml")
    console = terminal()
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
    if not as_json:
        for note in prompt_overlap(groups["train"], groups.get("eval", ())).notes():
            console.print(note, highlight=False)
    if is_data and tokenizer is None:
        return
    loaded = tokenizer_of(recipe.model, recipe.data.template)
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


@app.command()
@verb
def plan(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("engine.chunk_tokens=4096 or adapter.r=64")] = None,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="Plan for a GPU that computes in bfloat16, or for a CPU.")
    ] = "cuda",
    processes: Annotated[
        int, typer.Option(min=1, help="Shard weights, gradients and optimizer over this many processes (FSDP).")
    ] = 1,
    responses: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Responses per prompt, all as long as data.max_tokens allows. Unset: the longest groups of the data "
            "where it is on this machine, else 8.",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        float | None,
        typer.Option(min=1, help="GiB of the device: also say which changes make the recipe fit.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a recipe before it runs: the data's lengths and arithmetic, no weights, no GPU.

    [bold]Examples[/bold]

      rrhf-peft plan recipes/qlora_7b.yaml
      rrhf-peft plan recipes/qlora_7b.yaml engine.chunk_tokens=4096
      rrhf-peft plan recipes/qlora_7b.yaml --fit 24
      rrhf-peft plan recipes/full_8xa100.yaml --processes 8
    """
    from rrhf_peft.plan.run import fit_memory, plan_memory
    from rrhf_peft.recipe import load_recipe

    def make(changes: list[str]) -> Recipe:
        return load_recipe(recipe, [*(overrides or []), *changes])

    changes: list[str] | None = None
    if fit is None:
        result = plan_memory(make([]), device=device, processes=processes, responses=responses)
    else:
        result, changes = fit_memory(make, fit, device=device, processes=processes, responses=responses)
    if as_json:
        print_json(result.to_dict() | ({} if changes is None else {"changes": changes}))
        return
    terminal().print(result)
    if changes is not None:
        told = f"fits with these changes: {' '.join(changes)}" if changes else "fits as it is"
        terminal().print(f"{fit:g} GiB: {told}", highlight=False, soft_wrap=True)


@app.command()
@verb
def train(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("training.learning_rate=1e-4 or adapter=null")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")] = False,
    overwrite: Overwrite = False,
    ignore_changes: Annotated[
        bool, typer.Option("--ignore-changes", help="Resume although the recipe or the data is not what it was.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only try: the data, steps on the longest groups, memory, time.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter (or all weights) on ranked responses.

    [bold]Examples[/bold]

      rrhf-peft train recipes/quickstart.yaml --dry-run
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

    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.train.run import train_recipe

    checked = load_recipe(recipe, overrides or [])
    if dry_run:
        _say_dry_run(checked, as_json)
        return
    outcome = train_recipe(checked, resume=resume, overwrite=overwrite, ignore_changes=ignore_changes)
    if not _is_main_at_the_end():
        return
    folder = outcome.run_folder
    if as_json:
        reports = {name: report.to_dict() for name, report in outcome.reports.items()}
        print_json({"output": str(folder), "metrics": outcome.metrics, "data": reports})
        return
    say(f"{'Finished before' if outcome.was_finished else 'Done'}: {folder}")
    say(f"Next: rrhf-peft chat {folder}")
    if checked.adapter is not None:
        say(f"Then: rrhf-peft merge {folder} --output {folder}-merged")


def _say_dry_run(recipe: Recipe, as_json: bool) -> None:
    from rrhf_peft.train.dry_run import dry_run

    tried = dry_run(recipe, terminal(stderr=True))
    if as_json:
        print_json(tried.to_dict())
        return
    for line in tried.lines():
        say(line)
    say("Nothing was written. Without --dry-run the same command trains.")


@app.command()
@verb
def evaluate(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("evaluation.max_prompts=100 or evaluation.decoding.k=8")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare policies on held-out prompts: rewards, perplexity, pair accuracy, best-of-n, wins.

    [bold]Examples[/bold]

      rrhf-peft evaluate recipes/paper/paper/table.yaml
      rrhf-peft evaluate recipes/paper/paper/table.yaml evaluation.max_prompts=100

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.evaluate recipes/paper/paper/table.yaml

    The folder evaluation.output gets evaluation.json, table.md, plots and every
    response with its rewards. An evaluation that was killed continues when the
    same command is given again; so does one whose recipe has got another policy.
    """
    from rrhf_peft.evaluate.run import evaluate_recipe
    from rrhf_peft.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [], needs=["evaluation"])
    outcome = evaluate_recipe(checked, overwrite=overwrite, console=terminal(stderr=True))
    if process_index() != 0:
        return
    if as_json:
        print_json(outcome.to_dict())
        return
    terminal().print(outcome)
    say(f"{'Finished before' if outcome.was_finished else 'Done'}: {outcome.folder}")


@app.command()
@verb
def rounds(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("rounds.count=5 or sampling.max_prompts=100")] = None,
    overwrite: Overwrite = False,
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
    from rrhf_peft.recipe import load_recipe
    from rrhf_peft.rounds.run import run_rounds
    from rrhf_peft.rounds.table import rows_table

    needs = ["rounds", "model", "sampling", "scoring"]
    outcome = run_rounds(load_recipe(recipe, overrides or [], needs=needs), overwrite=overwrite)
    if not _is_main_at_the_end():
        return
    if as_json:
        print_json({"output": str(outcome.output), "rounds": [row.to_dict() for row in outcome.rows]})
        return
    terminal().print(rows_table(outcome.rows))
    say(f"{'Finished before' if outcome.was_finished else 'Done'}: {outcome.output}")


@app.command()
@verb
def compare(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, _overrides("compare.only=[rrhf, dpo] or data.train=mine.jsonl")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train several objectives on the same data, and evaluate them all in one table.

    [bold]Examples[/bold]

      rrhf-peft compare recipes/compare/compare.yaml
      rrhf-peft compare recipes/compare/compare.yaml 'compare.only=[rrhf, dpo]'

    On several GPUs, with the same options:

      accelerate launch --config_file recipes/accelerate/ddp.yaml
          -m rrhf_peft.compare recipes/compare/compare.yaml

    Each objective has a run folder in compare.output, beside the folder
    evaluation. A comparison that was killed continues when the same command
    is given again; objectives that are trained are not trained again.
    """
    from rrhf_peft.compare.run import compare_recipe
    from rrhf_peft.recipe import load_recipe

    needs = ["compare", "model", "data", "training", "evaluation"]
    outcome = compare_recipe(load_recipe(recipe, overrides or [], needs=needs), overwrite=overwrite)
    if not _is_main_at_the_end():
        return
    if as_json:
        print_json(outcome.to_dict())
        return
    terminal().print(outcome)
    say(f"Done: {outcome.folder}")


@app.command()
@verb
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Folders of training runs, evaluations, rounds or merged models.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The HTML file. Unset: report.html in the first folder.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show runs in one HTML file: results, curves, rewards before and after, examples side by side.

    The file needs no network and no server. Several training runs are
    drawn into the same axes. An earlier report is replaced; any other
    file is not.

    [bold]Examples[/bold]

      rrhf-peft report runs/quickstart
      rrhf-peft report runs/evaluation runs/quickstart -o report.html
    """
    from rrhf_peft.report.run import write_report

    page = write_report(runs, output)
    if as_json:
        print_json({"output": str(page)})
    else:
        say(f"Done: {page}")


@app.command()
@verb
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
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run model code that comes with the base model, having read it."),
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 500MB.")] = "5GB",
    overwrite: Overwrite = False,
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
    from rrhf_peft.merge.run import merge_adapter, merge_progress

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
            trust_remote_code=trust_remote_code,
            verify=verify,
            tolerance=tolerance,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        terminal().print(report)


@app.command()
@verb
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
    from rrhf_peft.new import write_schema
    from rrhf_peft.recipe import json_schema

    if output is None:
        print_json(json_schema())
    else:
        write_schema(output)


@app.command()
@verb
def recipes(
    action: Annotated[Literal["list", "copy"], typer.Argument(metavar="list|copy", show_default=False)],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="What to copy: a name in the list, a folder, or all.")
    ] = None,
    to: Annotated[Path, typer.Argument(metavar="TO", help="The folder that gets the copy.")] = Path("recipes"),
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with rrhf-peft, or copy one, with what it extends, to change it.

    [bold]Examples[/bold]

      rrhf-peft recipes list
      rrhf-peft recipes copy qlora_7b
      rrhf-peft recipes copy sampling experiments
    """
    from rich.table import Table

    from rrhf_peft.recipe.shipped import copy_recipes, shipped_recipes

    if (action == "copy") is (name is None):
        raise typer.BadParameter("copy needs the NAME of a recipe or a folder; list takes none", param_hint="NAME")
    if name is None:
        listed = shipped_recipes()
        if as_json:
            print_json(listed)
            return
        table = Table("recipe", "what it does", box=None, pad_edge=False)
        for recipe, sentence in listed.items():
            table.add_row(recipe, sentence)
        terminal().print(table)
        return
    copies = [str(path) for path in copy_recipes(name, to)]
    if as_json:
        print_json({"copied": copies})
        return
    for path in copies:
        say(f"Copied: {path}")


@app.command()
@verb
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: packages, devices, quantisation, extras, disk, hub; and say what to do.

    The exit code is 1 where something will fail; what is only missing is a note.

    [bold]Example[/bold]

      rrhf-peft doctor
    """
    from rich.table import Table

    from rrhf_peft.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        table = Table("", "subject", "here", "what to do", box=None, pad_edge=False)
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
        for finding in findings:
            table.add_row(marks[finding.state], finding.subject, finding.detail, finding.remedy)
        terminal().print(table)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
@verb
def new(
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id or folder of the base model.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Ranked data: a file, a folder or a hub id.")],
    fit: Annotated[
        float | None, typer.Option(min=1, help="GiB of the GPU to fit into. Unset: of the one here, else 24.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe for this model and data that fits the memory, and what was seen on the way.

    The template, k and the lengths come from the data and the tokenizer, quantisation and chunks from the plan.
    Beside the recipe its schema is written, with which editors complete and check keys.

    [bold]Examples[/bold]

      rrhf-peft new --model Qwen/Qwen2.5-7B-Instruct --data my_ranked.jsonl
      rrhf-peft new --model runs/demo/base --data my_ranked.jsonl --fit 8 -o mine.yaml
    """
    from rrhf_peft.new import new_recipe, write_recipe
    from rrhf_peft.records import UserError

    if not output.stem or output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output: {output} is no name of a recipe. Let it end in .yaml.")
    made = new_recipe(model, data, output.stem, fit_gib=fit)
    write_recipe(made, output)
    if as_json:
        print_json({"output": str(output), "notes": made.notes, "plan": made.plan.to_dict()})
        return
    terminal().print(made.plan)
    for note in made.notes:
        say(f"Note: {note}")
    say(f"Done: {output}")
    say(f"Next: rrhf-peft train {output} --dry-run")


@app.command()
@verb
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a merged one.", show_default=False)],
    alone: Annotated[bool, typer.Option("--alone", help="Without the base model beside it.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the probability to draw from.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk to what was trained, with the model that it was trained from beside it.

    Answers appear as they are written. Prompts come from stdin, one on each line; /new forgets the conversation,
    /quit leaves.

    [bold]Examples[/bold]

      rrhf-peft chat runs/quickstart
      rrhf-peft chat runs/quickstart --temperature 0 < prompts.txt
    """
    from rrhf_peft.chat import HELP, Decoding, converse, open_chat

    opened = open_chat(run, alone=alone)
    decoding = Decoding(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    asks = sys.stdin.isatty()
    if asks:
        say(HELP)
    lines = iter(lambda: terminal().input("[bold]> [/]"), None) if asks else sys.stdin
    with contextlib.suppress(EOFError):
        converse(opened, lines, decoding, terminal(), seed=seed, as_json=as_json)


@app.command()
@verb
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a merged one.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where on the hub.", show_default=False)],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Evaluation folders whose tables and plots go onto the card.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="For everybody; else only for you.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without this, only show what would be sent.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what of a run or a merged model would go to the hub, with its card; send it with --yes.

    [bold]Examples[/bold]

      rrhf-peft push runs/quickstart me/my-adapter --evaluation runs/evaluation
      rrhf-peft push runs/quickstart-merged me/my-model --yes
    """
    from rrhf_peft.progress import size_text
    from rrhf_peft.push import prepare, send

    upload = prepare(run, repository, evaluation or [])
    address = send(upload, public=public) if yes else None
    if as_json:
        sizes = {name: path.stat().st_size for name, path in upload.files.items()}
        print_json({"sent": address, "files": sizes, "figures": list(upload.figures), "card": upload.card})
        return
    if address is None:
        say(upload.card)
        for name, path in upload.files.items():
            say(f"{size_text(path.stat().st_size):>10}  {name}")
        for name, content in upload.figures.items():
            say(f"{size_text(len(content)):>10}  {name}")
    for note in upload.notes:
        say(f"Note: {note}")
    say(f"Done: {address}" if address else f"Nothing was sent. With --yes this goes to {repository}.")


def main() -> None:
    """The console command."""
    app(prog_name="rrhf-peft")


def run_module(name: str) -> None:
    """What `python -m rrhf_peft.VERB` runs: that verb, with the arguments of the command line."""
    app([name, *sys.argv[1:]], prog_name="python -m rrhf_peft")


if __name__ == "__main__":
    main()
