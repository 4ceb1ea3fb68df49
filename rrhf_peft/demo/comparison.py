"""Before and after: the same measures of a policy's texts, in numbers, texts side by side, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import HORIZONTALS, SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rrhf_peft.evaluate.measure import mean_log_probs, perplexity
from rrhf_peft.evaluate.statistics import Interval, distinct_n, mean_reward, mean_words, pair_accuracy
from rrhf_peft.files import replace_text
from rrhf_peft.plotting import BASELINE, HUES, WIDE, figure_bytes, new_figure, running_mean, styled
from rrhf_peft.records import TokenizedGroup
from rrhf_peft.score.rule import Rule
from rrhf_peft.train.run_folder import METRICS, read_metrics

BEFORE, AFTER, TARGET = BASELINE, HUES[2], HUES[1]


@dataclass(frozen=True)
class Measured:
    """What was measured of one policy on the held-out prompts.

    Attributes:
        reward: Mean reward of its responses, with a 95 % interval over prompts.
        perplexity: Of its responses under the untouched base: how far it has moved.
        pair_accuracy: How often it orders two scored responses of the base as their scores do.
        distinct_2: Different word pairs over all word pairs.
        words: Mean words per response.
        responses: Its responses to each prompt.
        rewards: Their rewards.
    """

    reward: Interval
    perplexity: float
    pair_accuracy: float
    distinct_2: float
    words: float
    responses: list[list[str]]
    rewards: list[list[float]]


def measure(
    policy: Any,
    responses: list[list[str]],
    *,
    prompts: Sequence[str],
    rule: Rule,
    judge: Any,
    tokenizer: PreTrainedTokenizerBase,
    ranked: Sequence[TokenizedGroup],
) -> Measured:
    """Measure a policy by its `responses`, and by how it orders the `ranked` groups of the base.

    Args:
        policy: The model before or after training.
        responses: Its responses to each prompt.
        prompts: The held-out prompts.
        rule: The reward.
        judge: The untouched base model.
        tokenizer: Of both models.
        ranked: Held-out groups with scores, for the pair accuracy.
    """
    rewards = [rule(prompt, texts) for prompt, texts in zip(prompts, responses, strict=True)]
    pairs = [(prompt, text) for prompt, texts in zip(prompts, responses, strict=True) for text in texts]
    texts = [text for _, text in pairs]
    return Measured(
        reward=mean_reward(rewards),
        perplexity=perplexity(judge, tokenizer, [prompt for prompt, _ in pairs], texts),
        pair_accuracy=pair_accuracy(mean_log_probs(policy, ranked), [group.scores for group in ranked]),
        distinct_2=distinct_n(texts, 2),
        words=mean_words(texts),
        responses=responses,
        rewards=rewards,
    )


def comparison_table(before: Measured, after: Measured, mean_of_max: float) -> Table:
    """The table that says whether it worked."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("after RRHF", justify="right", style="green")
    table.add_row("mean reward [95 % interval]", str(before.reward), str(after.reward))
    table.add_row("perplexity under the base", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
    table.add_row("pairs ordered right", f"{before.pair_accuracy:.1%}", f"{after.pair_accuracy:.1%}")
    table.add_row("different word pairs", f"{before.distinct_2:.1%}", f"{after.distinct_2:.1%}")
    table.add_row("words per text", f"{before.words:.0f}", f"{after.words:.0f}")
    table.add_section()
    table.add_row("mean of training groups' best", f"{mean_of_max:.2f}", "")
    return table


def side_by_side(prompts: Sequence[str], before: Measured, after: Measured, count: int) -> Iterator[Text | Table]:
    """The first samples to the first held-out prompts, not chosen ones."""
    for index, prompt in enumerate(prompts[:count]):
        yield Text(prompt, style="bold")
        table = Table(box=HORIZONTALS, pad_edge=False, show_header=True, header_style="dim")
        table.add_column(f"base, reward {before.rewards[index][0]:+.2f}", ratio=1)
        table.add_column(f"after RRHF, reward {after.rewards[index][0]:+.2f}", ratio=1)
        table.add_row(*(Text(_printable(policy.responses[index][0].strip())) for policy in (before, after)))
        yield table


def _printable(text: str) -> str:
    """What a model writes may hold control characters; terminals obey them."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


# ---- Pictures ----


def draw_rewards(axes: Any, before: Measured, after: Measured, mean_of_max: float) -> None:
    """Histogram of the rewards on held-out prompts, with means and the mean of the group maximum."""
    for measured, color, label in ((before, BEFORE, "base"), (after, AFTER, "after RRHF")):
        rewards = np.concatenate(measured.rewards)
        weights = np.full(len(rewards), 100 / len(rewards))
        label = f"{label}, mean {rewards.mean():.2f}"
        axes.hist(rewards, bins=np.linspace(-1, 1, 21), weights=weights, color=color, alpha=0.6, label=label)
    axes.axvline(mean_of_max, color=TARGET, linestyle="--", label=f"mean of training groups' best {mean_of_max:.2f}")
    axes.set(xlabel="reward of a sample", ylabel="samples, %", title="Rewards on held-out prompts")
    axes.legend(loc="upper left", frameon=False)


def draw_training(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    """Ranking loss and fine-tuning loss against the step, with the pair accuracy on a second axis."""
    steps = [entry["step"] for entry in metrics]
    lines = []
    for name, color, label in (("rank_loss", TARGET, "ranking loss"), ("sft_loss", HUES[0], "fine-tuning loss")):
        values = [entry[name] for entry in metrics]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        lines += axes.plot(steps, running_mean(values, 9), color=color, label=label)
    accuracy = axes.twinx()
    accuracy.grid(visible=False)
    percent = running_mean([100 * entry["pair_accuracy"] for entry in metrics], 9)
    lines += accuracy.plot(steps, percent, color=AFTER, label="right pairs")
    accuracy.set(ylabel="pairs ordered right, %", ylim=(0, 100))
    axes.set(xlabel="optimizer step", ylabel="loss", title="Training", ylim=(0, None))
    axes.legend(handles=lines, loc="center right", bbox_to_anchor=(1, 0.36), frameon=False)


@styled
def save_figure(path: Path, before: Measured, after: Measured, mean_of_max: float, run_folder: Path) -> None:
    """Draw both into a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = new_figure(WIDE, 4.4)
    left, right = figure.subplots(1, 2)
    draw_rewards(left, before, after, mean_of_max)
    draw_training(right, [entry for entry in read_metrics(run_folder / METRICS) if "loss" in entry])
    replace_text(path, figure_bytes(figure, "png"))
