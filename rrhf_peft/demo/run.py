"""The whole way in a few minutes: base, samples, scores, QLoRA with RRHF, before and after, merge.

Everything runs through the same functions as a real run; only the text, the base model and the reward are the demo's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from transformers import AutoModelForCausalLM

from rrhf_peft import __version__
from rrhf_peft.console import terminal
from rrhf_peft.data import tokenize_groups, write_ranked
from rrhf_peft.demo.base import BaseSize, cached_base, make_base, one_thread, quiet_libraries
from rrhf_peft.demo.comparison import Measured, comparison_table, measure, save_figure, side_by_side
from rrhf_peft.demo.stories import make_prompts
from rrhf_peft.files import replace_text, staged_folder
from rrhf_peft.merge.run import MergeReport, merge_adapter
from rrhf_peft.modeling import load_base_model, load_tokenizer
from rrhf_peft.progress import progress
from rrhf_peft.recipe import Recipe, make_recipe, recipe_text
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.transformers_policy import sample_top_p
from rrhf_peft.score.rule import load_rule
from rrhf_peft.train.run import train_recipe

RULE = "rrhf_peft.demo.stories:cheerfulness"
TOP_P = 0.95
SEED = 0
_MADE_BY = "rrhf-peft demo"
_STEPS = 5


@dataclass(frozen=True)
class DemoSize:
    """Sizes of every step of the demo.

    Attributes:
        base: The base model.
        train_prompts: Prompts whose samples are trained on.
        heldout_prompts: Prompts that only measure.
        k: Responses per training prompt.
        heldout_k: Responses per held-out prompt, before and after.
        max_new_tokens: Longest response in tokens.
        sampling_batch: Responses generated at the same time.
        rank: Of the LoRA matrices; lora_alpha is twice that.
        epochs: Passes over the ranked groups.
        groups_per_step: Prompts per optimizer step.
        learning_rate: At the peak of the cosine.
    """

    base: BaseSize = field(default_factory=BaseSize)
    train_prompts: int = 320
    heldout_prompts: int = 100
    k: int = 6
    heldout_k: int = 4
    max_new_tokens: int = 96
    sampling_batch: int = 240
    rank: int = 16
    epochs: int = 4
    groups_per_step: int = 8
    learning_rate: float = 2e-3


#: What `rrhf-peft demo` does.
FULL = DemoSize()

#: The same base model and less of everything else: for the walkthrough.
BRIEF = DemoSize(train_prompts=160, heldout_prompts=60, heldout_k=2)

#: Seconds instead of minutes: a base model that has hardly learned to write.
TINY = DemoSize(
    base=BaseSize(stories=800, epochs=2, hidden_size=64, heads=4, vocab_size=512),
    train_prompts=24,
    heldout_prompts=12,
    k=4,
    heldout_k=2,
    max_new_tokens=64,
    epochs=1,
)


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo measured; the same numbers are in report.json.

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
    steps = _Steps(output, size, console)
    with quiet_libraries(), one_thread():
        steps.make_base()
        steps.sample_and_score()
        steps.train()
        merge_report = steps.merge()
        before, after = steps.measure()
    outcome = DemoOutcome(output, before, after, steps.mean_of_max, steps.seconds)
    report = {
        "made_by": _MADE_BY,
        "version": __version__,
        "finished": True,
        "seconds": {name: round(value, 1) for name, value in outcome.seconds.items()},
        "mean_of_group_max": outcome.mean_of_max,
        "before": asdict(before),
        "after": asdict(after),
        "merge": merge_report.to_dict(),
    }
    replace_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    has_picture = importlib.util.find_spec("matplotlib") is not None
    if has_picture:
        save_figure(output / "before_after.png", before, after, outcome.mean_of_max, output / "run")
    _show(outcome, draw_prompts(size)[1], console, has_picture=has_picture)
    return outcome


class _Steps:
    """The five steps in order; each leaves in `self` what later ones need, and its seconds in `seconds`."""

    def __init__(self, output: Path, size: DemoSize, console: Console) -> None:
        self.output, self.size, self.console = output, size, console
        self.rule = load_rule(RULE)
        self.prompts, self.heldout = draw_prompts(size)
        self.seconds: dict[str, float] = {}

    def make_base(self) -> None:
        """A copy of the cached base model, which is made first where there is none."""
        with self._step(
            "base",
            "A base model",
            "A small Llama that writes little stories, made on this machine from text that this project generates. "
            "The same beginning may turn out cheerful, plain or sad.",
        ):
            cached = cached_base(self.size.base, seed=SEED)
            if cached.is_dir():
                _note(self.console, f"made before: {cached}")
            else:
                with _bar(self.console, "training steps", self.size.base.steps, unit="steps") as advance:
                    make_base(self.size.base, seed=SEED, progress=lambda step, loss: advance(1))
            with staged_folder(self.output / "base", overwrite=True) as staging:
                shutil.copytree(cached, staging, dirs_exist_ok=True)

    def sample_and_score(self) -> None:
        """Ranked groups of the base's samples, to train on and held out."""
        with self._step(
            "sampling",
            "Candidates and their scores",
            f"The base, held in 4 bits (NF4), continues {len(self.prompts)} beginnings {self.size.k} times each. A "
            "rule scores how cheerful each continuation is: it stands in for your reward model, judge or annotators.",
        ):
            self.tokenizer = load_tokenizer(self.output / "base")
            self.base = load_base_model(self.output / "base", quantization="nf4")
            train = self._ranked(self.prompts, self.size.k, "training samples", SEED)
            self.heldout_groups = self._ranked(self.heldout, self.size.heldout_k, "held-out samples", SEED + 1)
            write_ranked(self.output / "ranked.jsonl", train)
            write_ranked(self.output / "heldout.jsonl", self.heldout_groups)
            self.mean_of_max = sum(max(group.known_scores) for group in train) / len(train)

    def train(self) -> None:
        """As a user would, from a recipe."""
        with self._step(
            "training",
            "QLoRA with RRHF",
            "A LoRA adapter learns from the ranked groups: better responses should be likelier than worse ones "
            "(ranking loss), and the best one is imitated (fine-tuning loss). Just as "
            f"`rrhf-peft train {self.output}/recipe.yaml`.",
        ):
            recipe = demo_recipe(self.output, self.size)
            replace_text(self.output / "recipe.yaml", recipe_text(recipe))
            train_recipe(recipe, console=self.console)

    def merge(self) -> MergeReport:
        """Standalone weights, loaded back without PEFT."""
        with self._step(
            "merging",
            "Standalone weights",
            "The adapter is added to the dequantised base, and the result is compared with what was trained. It loads "
            "without PEFT or bitsandbytes.",
        ):
            report = merge_adapter(self.output / "run", self.output / "merged", overwrite=True)
            self.merged = AutoModelForCausalLM.from_pretrained(self.output / "merged")
        self.console.print(report)
        return report

    def measure(self) -> tuple[Measured, Measured]:
        """The base and the merged model on the held-out prompts."""
        with self._step(
            "measuring",
            "Before and after",
            f"The base and the merged model on {len(self.heldout)} beginnings that training never saw, "
            f"{self.size.heldout_k} samples each.",
        ):
            texts = self._sampled(self.merged, self.heldout, self.size.heldout_k, "samples after training", SEED + 2)
            ranked, _ = tokenize_groups(self.heldout_groups, self.tokenizer, max_tokens=self.size.base.context)
            policies = ((self.base, [group.responses for group in self.heldout_groups]), (self.merged, texts))
            shared: dict[str, Any] = {
                "rule": self.rule,
                "judge": self.base,
                "tokenizer": self.tokenizer,
                "ranked": ranked,
            }
            before, after = (measure(policy, said, prompts=self.heldout, **shared) for policy, said in policies)
        return before, after

    def _sampled(self, model: Any, prompts: list[str], k: int, title: str, seed: int) -> list[list[str]]:
        with _bar(self.console, title, len(prompts) * k, unit="responses") as advance:
            return sample_top_p(
                model,
                self.tokenizer,
                prompts,
                k=k,
                top_p=TOP_P,
                max_new_tokens=self.size.max_new_tokens,
                batch_size=self.size.sampling_batch,
                seed=seed,
                progress=advance,
            )

    def _ranked(self, prompts: list[str], k: int, title: str, seed: int) -> list[RankedGroup]:
        pairs = zip(prompts, self._sampled(self.base, prompts, k, title, seed), strict=True)
        return [RankedGroup(prompt, texts, self.rule(prompt, texts), ["top_p:base"] * k) for prompt, texts in pairs]

    @contextlib.contextmanager
    def _step(self, name: str, title: str, explanation: str) -> Iterator[None]:
        """Print a step's heading, with a sentence or two on what happens and why, and take its time."""
        self.console.print()
        self.console.print(Text.assemble((f"{len(self.seconds) + 1}/{_STEPS} ", "cyan"), (title, "bold")))
        self.console.print(Padding(Text(explanation, style="dim"), (0, 0, 0, 4), expand=False))
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


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


# ---- What the terminal shows ----


def _show(outcome: DemoOutcome, heldout: list[str], console: Console, *, has_picture: bool) -> None:
    """The numbers, a few texts side by side, and what to type next."""
    output = outcome.output
    console.print(comparison_table(outcome.before, outcome.after, outcome.mean_of_max))
    _note(
        console,
        "More reward is worth something only while the texts stay language: collapsed ones would show as a "
        "perplexity many times the base's, or as few different word pairs.",
    )
    console.print()
    for part in side_by_side(heldout, outcome.before, outcome.after, count=3):
        console.print(part)
    console.print()
    console.print(_next_steps(output), soft_wrap=True)  # commands stay whole for copying
    console.print()
    picture = f", a picture in {output}/before_after.png" if has_picture else ""
    _note(console, f"{sum(outcome.seconds.values()):.0f} s in all. Every number is in {output}/report.json{picture}.")


@contextlib.contextmanager
def _bar(console: Console, title: str, total: int, *, unit: str) -> Iterator[Callable[[int], None]]:
    started = time.monotonic()
    with progress(console, f"    {title}", total, unit=unit) as advance:
        yield advance
    if console.is_terminal:  # the bar is gone; a log has its last line
        _note(console, f"{title}: {total} in {time.monotonic() - started:.0f} s")


def _note(console: Console, text: str) -> None:
    """A line under a heading."""
    console.print(Padding(Text(text), (0, 0, 0, 4), expand=False), highlight=False)


def _next_steps(output: Path) -> Text:
    """What to type next."""
    recipe = output / "recipe.yaml"
    lines = (
        ("what training saw", f"rrhf-peft inspect {recipe}"),
        (
            "the paper's own weighting",
            f"rrhf-peft train {recipe} objective.variant=paper training.output_dir={output}-paper",
        ),
        ("the merged model", f"AutoModelForCausalLM.from_pretrained('{output}/merged')"),
        ("your own data, with the columns of ranked.jsonl", "rrhf-peft recipes copy qlora_7b"),
    )
    text = Text("Where to go next", style="bold")
    for title, command in lines:
        text.append(f"\n  {title}\n", style="not bold dim")
        text.append(f"    {command}", style="not bold")
    return text
