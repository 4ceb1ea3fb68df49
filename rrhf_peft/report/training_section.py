"""What the report says of training runs: how long, how well, and every curve, several runs in the same axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rrhf_peft.plotting import Style
from rrhf_peft.report.blocks import Folded, Paragraph, Picture, Pictures, Section, Table, TableRow, picture
from rrhf_peft.report.numbers import MISSING, count, duration, is_number, memory, number
from rrhf_peft.report.plots import Curve, curves_figure, smoothing_window, sources_figure
from rrhf_peft.report.training_run import TrainingRun

_SOURCE = "logps/"
#: More sources than this are drawn run by run.
_MOST_SOURCE_PANELS = 9
#: Logged beside the metrics: no course worth a plot, or one that the recipe has set.
_NO_CURVE = {"step", "epoch", "learning_rate", "grad_norm", "total_flos", "tokens_saved"}
_NO_CURVE |= {"tokens_per_second", "groups_per_second"}
_NO_CURVE |= {"peak_memory_gib", "runtime", "samples_per_second", "steps_per_second"}
#: These come first, under these names; what other objectives log follows under its own.
_TITLES = {
    "loss": "Loss",
    "rank_loss": "Ranking loss",
    "sft_loss": "Fine-tuning loss",
    "pair_accuracy": "Pairs ordered right, share",
    "best_hit_rate": "Best response likeliest, share of groups",
    "active_pairs": "Pairs with a gradient, share",
}
#: What online training logs at each refresh.
_ONLINE_TITLES = {
    "rewards/mean": "Reward of the policy's answers",
    "rewards/max": "Reward of each group's best",
    "kl/response": "KL to the adapter-off policy, nats per answer",
    "response_tokens": "Tokens of an answer",
    "groups_without_pairs": "Groups without an ordered pair, share",
}


def training_section(runs: Mapping[str, TrainingRun], look: Mapping[str, Style], anchor: str) -> Section:
    """All runs: a table, the curves, what online training sampled, and log-probs by source."""
    blocks = _tables(runs, look)
    panels = _panels(runs)
    if panels:
        said = "; ".join(f"{name}: {_course(run)}" for name, run in runs.items())
        blocks.append(
            Pictures([picture(curves_figure(panels, look), f"Training curves. {said}.", _how_drawn(runs), wide=True)])
        )
    pictures = [*_online_pictures(runs, look), *_source_pictures(runs, look)]
    if pictures:
        blocks.append(Pictures(pictures))
    return Section("Training", anchor, blocks)


def recipes_section(runs: Mapping[str, TrainingRun], anchor: str) -> Section:
    """The resolved recipe of every run, folded."""
    return Section("Recipes", anchor, [Folded(f"Recipe of {name}", run.recipe_text) for name, run in runs.items()])


def in_words(runs: Mapping[str, TrainingRun]) -> list[str]:
    """What training did to the share of pairs ordered right."""
    said = []
    for name, run in runs.items():
        _, values = run.series("pair_accuracy")
        if len(values) >= 10:
            first, last = _ends(values)
            said.append(
                f"{name} orders {100 * last:.0f}% of its training pairs right at the end, {100 * first:.0f}% at first"
            )
    return ["; ".join(said) + "."] if said else []


def _tables(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> list[Any]:
    """What all runs have in common in a sentence, and what differs, or was measured, in a table."""
    described = {
        "objective": [_objective(run) for run in runs.values()],
        "model": [_model(run) for run in runs.values()],
        "groups": [count(run.data.get("train", {}).get("groups_kept")) for run in runs.values()],
        "steps": [f"{run.last_step():,}" for run in runs.values()],
    }
    shared = [title for title, cells in described.items() if len(set(cells)) == 1]
    measured = {
        "loss": [_change(run.series("loss")[1], "{:.3f}") for run in runs.values()],
        "pairs right": [_change(run.series("pair_accuracy")[1], "{:.0%}") for run in runs.values()],
        "held out": [_first_last(run.series("pair_accuracy", held_out=True)[1]) for run in runs.values()],
        "groups/s": [_median(run.series("groups_per_second")[1]) for run in runs.values()],
        "time": [_time(run) for run in runs.values()],
        "peak memory": [memory(run.peak_memory_gib()) for run in runs.values()],
    }
    columns = {title: cells for title, cells in (described | measured).items() if title not in shared}
    kept = {title: cells for title, cells in columns.items() if any(cell != MISSING for cell in cells)}
    meanings = {
        "loss": "means of the first and the last tenth of the logged steps",
        "pairs right": "share of training pairs ordered right, the same means",
        "held out": "share of held-out pairs ordered right, at the first and the last evaluation",
        "time": "wall time; of a resumed run, since it was resumed",
    }
    rows = [
        TableRow([name, *(cells[place] for cells in kept.values())], look[name].color)
        for place, name in enumerate(runs)
    ]
    legend = [(title, meaning) for title, meaning in meanings.items() if title in kept]
    said = "; ".join(f"{title} {described[title][0]}" for title in shared if described[title][0] != MISSING)
    opening = "The same in all runs: " if len(runs) > 1 else f"{next(iter(runs))}: "
    return [*([Paragraph(f"{opening}{said}.")] if said else []), Table(["run", *kept], rows, legend)]


def _time(run: TrainingRun) -> str:
    seconds = run.closing.get("train_runtime")
    return duration(seconds) if is_number(seconds) else "not ended"


def _objective(run: TrainingRun) -> str:
    objective = run.recipe.get("objective")
    if not isinstance(objective, dict):
        return MISSING
    words = [str(objective.get("name", "rrhf"))]
    if objective.get("variant"):
        words.append(str(objective["variant"]))
    weights = (objective.get("rank_weight"), objective.get("sft_weight"))
    if any(is_number(weight) and weight != 1 for weight in weights):
        words.append("weights " + ":".join("?" if weight is None else f"{weight:g}" for weight in weights))
    return ", ".join(words)


def _model(run: TrainingRun) -> str:
    model = run.recipe.get("model")
    if not isinstance(model, dict):
        return MISSING
    kind = model.get("quantization")
    tuned = "LoRA" if run.recipe.get("adapter") is not None or model.get("init_adapter") else "all weights"
    return f"{model.get('name')}, {tuned}" + (f" on {kind}" if kind not in (None, "none") else "")


def _panels(runs: Mapping[str, TrainingRun]) -> dict[str, dict[str, Curve]]:
    """Title -> run -> curve of every metric that some run logged twice at least, or that changes on held-out data."""
    logged = [name for run in runs.values() for entry in [*run.steps, *run.held_out] for name in entry]
    metrics = dict.fromkeys([*(name for name in _TITLES if name in set(logged)), *sorted(set(logged) - _TITLES.keys())])
    panels: dict[str, dict[str, Curve]] = {}
    for metric in metrics:
        if metric in _NO_CURVE or metric.startswith(_SOURCE):
            continue
        curves = {name: Curve(*run.series(metric), *run.series(metric, held_out=True)) for name, run in runs.items()}
        drawn = {name: curve for name, curve in curves.items() if len(curve.values) + len(curve.held_out_values) > 0}
        if any(len(curve.values) > 1 or len(curve.held_out_values) > 1 for curve in drawn.values()):
            panels[_TITLES.get(metric, metric)] = drawn
    return panels


def _online_pictures(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> list[Picture]:
    """What the policy answered while it was trained, refresh by refresh; nothing without online training."""
    panels = {
        title: {
            name: Curve(*series) for name, run in runs.items() if len((series := run.series(metric, refreshes=True))[0])
        }
        for metric, title in _ONLINE_TITLES.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return []
    rewards = next(iter(panels.values()))
    said = "; ".join(f"{name}: {curve.values[0]:.3f} to {curve.values[-1]:.3f}" for name, curve in rewards.items())
    what = "The policy's own answers while it was trained, at each refresh"
    description = f"{what}. {next(iter(panels))}: {said}."
    return [picture(curves_figure(panels, look), description, f"{what}.", wide=len(panels) > 1)]


def _source_pictures(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> list[Picture]:
    """Mean log-probs by source: several runs in a panel for each source, while there are few of these."""
    found = {name: sources for name, run in runs.items() if (sources := _sources(run))}
    names = sorted({source for sources in found.values() for source in sources})
    what = "Mean log-prob per token of each source's responses, in nats"
    said = {
        run: "; ".join(f"{source}: {y[0]:.3f} to {y[-1]:.3f}" for source, (_, y) in sources.items())
        for run, sources in found.items()
    }
    if len(found) > 1 and len(names) <= _MOST_SOURCE_PANELS:
        panels = {
            source: {run: Curve(*sources[source]) for run, sources in found.items() if source in sources}
            for source in names
        }
        described = " ".join(f"{run}: {words}." for run, words in said.items())
        return [picture(curves_figure(panels, look), f"{what}. {described}", f"{what}.", wide=len(panels) > 1)]
    return [
        picture(sources_figure(sources), f"{what}, {run}. {said[run]}.", f"{run}: {what[0].lower()}{what[1:]}.")
        for run, sources in found.items()
    ]


def _sources(run: TrainingRun) -> dict[str, tuple[list[float], list[float]]]:
    names = dict.fromkeys(name for entry in run.steps for name in entry if name.startswith(_SOURCE))
    found = {name.removeprefix(_SOURCE): run.series(name) for name in names}
    return {name: series for name, series in found.items() if len(series[0]) > 1}


def _how_drawn(runs: Mapping[str, TrainingRun]) -> str:
    window = max(smoothing_window(len(run.steps)) for run in runs.values())
    said = f"Lines are running means over up to {window} logged steps" if window > 1 else "Lines are logged steps"
    if window > 1 and len(runs) <= 3:
        said += ", faint lines single ones"
    return said + ("; markers are held-out values." if any(run.held_out for run in runs.values()) else ".")


def _course(run: TrainingRun) -> str:
    parts = []
    for metric in ("loss", "pair_accuracy"):
        _, values = run.series(metric)
        if values:
            first, last = _ends(values)
            parts.append(f"{metric} from {first:.3f} to {last:.3f}")
    return ", ".join(parts) or "nothing logged"


def _ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and the last tenth: single steps are noise."""
    tenth = max(1, len(values) // 10)
    return math.fsum(values[:tenth]) / tenth, math.fsum(values[-tenth:]) / tenth


def _change(values: list[float], form: str) -> str:
    if not values:
        return MISSING
    first, last = _ends(values)
    return f"{form.format(first)} → {form.format(last)}"


def _first_last(values: list[float]) -> str:
    if not values:
        return MISSING
    return f"{values[0]:.0%} → {values[-1]:.0%}" if len(values) > 1 else f"{values[0]:.0%}"


def _median(values: list[float]) -> str:
    return number(sorted(values)[len(values) // 2], ",.0f") if values else MISSING
