"""The whole way in a few minutes: base, samples, scores, QLoRA with RRHF, before and after, merge.

Everything runs through the same functions as a real run; only the text, the base model and the reward
are the quickstart's own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM

from rrhf_peft import __version__
from rrhf_peft.console import terminal
from rrhf_peft.data import tokenize_groups, write_ranked
from rrhf_peft.demo.base import cached_base, make_base
from rrhf_peft.demo.comparison import Measured, measure
from rrhf_peft.demo.corpus import make_prompts
from rrhf_peft.demo.plots import can_plot, save_figure
from rrhf_peft.demo.size import FULL, DemoSize
from rrhf_peft.demo.surroundings import Timer, one_thread, quiet_libraries
from rrhf_peft.demo.view import Heading, bar, closing, note
from rrhf_peft.files import replace_text, staged_folder
from rrhf_peft.merge.report import render_report
from rrhf_peft.merge.run import merge_adapter
from rrhf_peft.modeling import load_base_model, load_tokenizer
from rrhf_peft.recipe import Recipe, make_recipe, recipe_text
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.transformers_policy import sample_top_p
from rrhf_peft.score.rule import load_rule
from rrhf_peft.train.run import train_recipe

RULE = "rrhf_peft.demo.cheerfulness:cheerfulness"
TOP_P = 0.95
SEED = 0
_MADE_BY = "rrhf-peft demo"


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo found; the same numbers are in report.json.

    Attributes:
        output: The folder with everything it made.
        before: The base model, in 4 bits.
        after: The merged model.
        mean_of_max: Mean over training groups of the best score.
        seconds: Wall time by step.
    """

    output: Path
    before: Measured
    after: Measured
    mean_of_max: float
    seconds: dict[str, float]


def run_demo(output: Path | str, *, size: DemoSize = FULL, console: Console | None = None) -> DemoOutcome:
    """Run the demo into a folder: base/, ranked.jsonl, heldout.jsonl, recipe.yaml, run/, merged/, report.json.

    An earlier demo's results in that folder are replaced; a folder that holds anything else is refused.

    Args:
        output: The folder to write.
        size: How much of everything.
        console: Where to show it; standard output by default.

    Raises:
        UserError: the folder is something else's or cannot be written to.
    """
    output, console = Path(output), console or terminal()
    _claim(output)
    with quiet_libraries(), one_thread():
        outcome, merge_report = _run(output, size, console)
    _write_report(outcome, merge_report)
    if can_plot():
        save_figure(output / "before_after.png", outcome.before, outcome.after, outcome.mean_of_max, output / "run")
    closing(console, output, draw_prompts(size)[1], outcome.before, outcome.after, outcome.mean_of_max)
    picture = f", a picture in {output}/before_after.png" if can_plot() else ""
    note(console, f"{sum(outcome.seconds.values()):.0f} s in all. Every number is in {output}/report.json{picture}.")
    return outcome


def _run(output: Path, size: DemoSize, console: Console) -> tuple[DemoOutcome, dict[str, Any]]:
    """The five steps; returns the outcome and the merge report."""
    heading, timer, rule = Heading(console, 5), Timer(), load_rule(RULE)
    prompts, heldout = draw_prompts(size)

    heading(
        "A base model",
        "A small Llama that writes little stories, made on this machine from text that this project generates. "
        "The same beginning may turn out cheerful, plain or sad.",
    )
    with timer("base"):
        _place_base(output / "base", size, console)

    heading(
        "Candidates and their scores",
        f"The base, held in 4 bits (NF4), continues {len(prompts)} beginnings {size.k} times each. A rule scores how "
        "cheerful each continuation is: it stands in for your reward model, judge or annotators.",
    )

    def sampled(model: Any, prompts: list[str], k: int, what: str, seed: int) -> list[list[str]]:
        with bar(console, what, len(prompts) * k) as advance:
            return sample_top_p(
                model,
                tokenizer,
                prompts,
                k=k,
                top_p=TOP_P,
                max_new_tokens=size.max_new_tokens,
                batch_size=size.sampling_batch,
                seed=seed,
                progress=advance,
            )

    def ranked(prompts: list[str], k: int, what: str, seed: int) -> list[RankedGroup]:
        texts = sampled(base, prompts, k, what, seed)
        pairs = zip(prompts, texts, strict=True)
        return [RankedGroup(prompt, own, rule(prompt, own), ["top_p:base"] * k) for prompt, own in pairs]

    with timer("sampling"):
        tokenizer = load_tokenizer(output / "base")
        base = load_base_model(output / "base", quantization="nf4")
        train_groups = ranked(prompts, size.k, "training samples", SEED)
        heldout_groups = ranked(heldout, size.heldout_k, "held-out samples", SEED + 1)
        write_ranked(output / "ranked.jsonl", train_groups)
        write_ranked(output / "heldout.jsonl", heldout_groups)
        mean_of_max = sum(max(group.known_scores) for group in train_groups) / len(train_groups)

    heading(
        "QLoRA with RRHF",
        "A LoRA adapter learns from the ranked groups: better responses should be likelier than worse ones (ranking "
        f"loss), and the best one is imitated (fine-tuning loss). Just as `rrhf-peft train {output}/recipe.yaml`.",
    )
    recipe = demo_recipe(output, size)
    replace_text(output / "recipe.yaml", recipe_text(recipe))
    with timer("training"):
        train_recipe(recipe, console=console)

    heading(
        "Standalone weights",
        "The adapter is added to the dequantised base, and the result is compared with what was trained. It loads "
        "without PEFT or bitsandbytes.",
    )
    with timer("merging"):
        merge_report = merge_adapter(output / "run", output / "merged", overwrite=True)
        merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    console.print(render_report(merge_report))

    heading(
        "Before and after",
        f"The base and the merged model on {len(heldout)} beginnings that training never saw, {size.heldout_k} samples "
        "each.",
    )
    with timer("measuring"):
        after_texts = sampled(merged, heldout, size.heldout_k, "samples after training", SEED + 2)
        scored, _ = tokenize_groups(heldout_groups, tokenizer, max_tokens=size.base.context)
        before_texts = [group.responses for group in heldout_groups]
        before, after = (
            measure(policy, texts, prompts=heldout, rule=rule, judge=base, tokenizer=tokenizer, ranked=scored)
            for policy, texts in ((base, before_texts), (merged, after_texts))
        )
    return DemoOutcome(output, before, after, mean_of_max, timer.seconds), merge_report.to_dict()


def draw_prompts(size: DemoSize) -> tuple[list[str], list[str]]:
    """Story beginnings to train on and to measure with: all different, so none is in both."""
    prompts = make_prompts(size.train_prompts + size.heldout_prompts, SEED + 1)
    return prompts[: size.train_prompts], prompts[size.train_prompts :]


def demo_recipe(output: Path, size: DemoSize) -> Recipe:
    """The demo's training recipe: nothing in it that a recipe file could not say."""
    return make_recipe(
        {
            "model": {"name": str(output / "base"), "quantization": "nf4"},
            "adapter": {"r": size.rank, "lora_alpha": 2 * size.rank},
            "data": {"train": str(output / "ranked.jsonl"), "max_tokens": size.base.context},
            "objective": {"name": "rrhf"},
            "training": {
                "output_dir": str(output / "run"),
                "num_train_epochs": size.epochs,
                "per_device_train_batch_size": size.groups_per_step,
                "learning_rate": size.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 5,
                "save_strategy": "no",
                "seed": SEED,
            },
        },
        where="the demo's recipe",
    )


def _claim(output: Path) -> None:
    """Make the folder ours, or find that it already is; clear what cannot be replaced in one go."""
    report = output / "report.json"
    if output.is_dir() and any(output.iterdir()) and not _is_a_demo_report(report):
        raise UserError(
            f"{output}: this folder holds something other than an earlier demo. Choose another with --output."
        )
    replace_text(report, json.dumps({"made_by": _MADE_BY, "finished": False}) + "\n")
    shutil.rmtree(output / "run", ignore_errors=True)


def _is_a_demo_report(path: Path) -> bool:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("made_by") == _MADE_BY


def _place_base(folder: Path, size: DemoSize, console: Console) -> None:
    """A copy of the cached base model, which is made first where there is none."""
    cached = cached_base(size.base, seed=SEED)
    if cached.is_dir():
        note(console, f"made before: {cached}")
    else:
        with bar(console, "training steps", size.base.steps) as advance:
            make_base(size.base, seed=SEED, progress=lambda step, loss: advance(1))
    with staged_folder(folder, overwrite=True) as staging:
        shutil.copytree(cached, staging, dirs_exist_ok=True)


def _write_report(outcome: DemoOutcome, merge_report: dict[str, Any]) -> None:
    report = {
        "made_by": _MADE_BY,
        "version": __version__,
        "finished": True,
        "seconds": {name: round(value, 1) for name, value in outcome.seconds.items()},
        "mean_of_group_max": outcome.mean_of_max,
        "before": asdict(outcome.before),
        "after": asdict(outcome.after),
        "merge": merge_report,
    }
    replace_text(outcome.output / "report.json", json.dumps(report, indent=2) + "\n")
