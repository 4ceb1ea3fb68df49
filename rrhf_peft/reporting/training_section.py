"""What the report says of training runs: how long, how well, and every curve, several runs in the same axes.

Left to others: reading the logs (`training_run`) and drawing them (`training_plots`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rrhf_peft.evaluation.plots import Style
from rrhf_peft.reporting.blocks import Folded, Pictures, Section, Table, TableRow, picture
from rrhf_peft.reporting.numbers import MISSING, count, duration, is_number, memory, number
from rrhf_peft.reporting.training_plots import Curve, curves_figure, smoothing_window, sources_figure
from rrhf_peft.reporting.training_run import TrainingRun

_SOURCE = "logps/"
#: Logged beside the metrics: no course worth a plot, or one that the recipe has set.
_NO_CURVE = {"step", "epoch", "learning_rate", "grad_norm", "total_flos", "tokens_saved", "tokens_per_second"}
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


def training_section(runs: Mapping[str, TrainingRun], look: Mapping[str, Style], anchor: str) -> Section:
    """All runs: a table, the curves, and log-probs by source."""
    blocks: list[Any] = [_table(runs, look)]
    panels = _panels(runs)
    if panels:
        said = "; ".join(f"{name}: {_course(run)}" for name, run in runs.items())
        blocks.append(
            Pictures([picture(curves_figure(panels, look), f"Training curves. {said}.", _how_drawn(runs), wide=True)])
        )
    pictures = []
    for name, run in runs.items():
        sources = _sources(run)
        if sources:
            said = "; ".join(f"{source}: {y[0]:.3f} to {y[-1]:.3f}" for source, (_, y) in sources.items())
            pictures.append(
                picture(
                    sources_figure(sources),
                    f"Mean log-prob per token of each source's responses, {name}. {said}.",
                    f"{name}: mean log-prob per token of each source's responses. RRHF should raise those that "
                    "score high over those that score low.",
                )
            )
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


def _table(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> Table:
    columns = ["run", "objective", "model", "groups", "steps", "loss", "pairs right", "held out", "tokens/s", "time"]
    legend = [
        ("loss, pairs right", "means of the first and the last tenth of the steps"),
        ("held out", "pairs of held-out groups ordered right, at first and last"),
        ("time", "wall time; of a resumed run, since it was resumed"),
    ]
    rows = [
        TableRow(
            [
                name,
                _objective(run),
                _model(run),
                count(run.data.get("train", {}).get("groups_kept")),
                f"{run.steps[-1]['step']:,}" if run.steps else "0",
                _change(run.series("loss")[1], "{:.3f}"),
                _change(run.series("pair_accuracy")[1], "{:.0%}"),
                _first_last(run.series("pair_accuracy", held_out=True)[1]),
                _median(run.series("tokens_per_second")[1]),
                duration(run.closing["train_runtime"]) if is_number(run.closing.get("train_runtime")) else "not ended",
                memory(run.peak_memory_gib()),
            ],
            look[name].color,
        )
        for name, run in runs.items()
    ]
    empty = [place for place in range(1, len(columns)) if all(row.cells[place] == MISSING for row in rows)]
    kept = [place for place in range(len(columns) + 1) if place not in empty]
    return Table(
        [[*columns, "peak memory"][place] for place in kept],
        [TableRow([row.cells[place] for place in kept], row.color) for row in rows],
        [(title, meaning) for title, meaning in legend if title != "held out" or columns.index(title) in kept],
    )


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
