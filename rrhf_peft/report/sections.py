"""The page's sections: rounds, an evaluation, training, data, merges, recipes.

A section is a dict of `title`, `anchor` and `parts`. A part is a dict of those that it has of `heading`, `text`
(paragraphs), `facts` (names and values), `table`, `pictures`, `note`, `examples` and `folded`; page.html shows them in
this order. Everything is plain text, which the template escapes.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rrhf_peft.evaluate.numbers import Evaluation
from rrhf_peft.evaluate.plots import evaluation_plots
from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.evaluate.table import Column, columns, duration, note
from rrhf_peft.plotting import WIDTH, Style, figure_bytes, styles
from rrhf_peft.report.folders import RoundsRun, TrainingRun, is_number
from rrhf_peft.report.plots import Curve, curves_figure, k_figure, rounds_figure, smoothing_window
from rrhf_peft.train.run_folder import flat_items

MISSING = "–"
_EXAMPLES = 8
#: Longer texts of an example are cut, and say so.
_MOST_CHARACTERS = 3000
_SOURCES_SHOWN = 24
_SOURCE = "logps/"
#: More sources than this are drawn run by run.
_MOST_SOURCE_PANELS = 9
#: Logged beside the metrics: no course worth a plot, or one that the recipe has set.
_NO_CURVE = {
    "step",
    "epoch",
    "learning_rate",
    "grad_norm",
    "total_flos",
    "tokens_saved",
    "tokens_per_second",
    "runtime",
}
_NO_CURVE |= {"groups_per_second", "peak_memory_gib", "samples_per_second", "steps_per_second"}
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
_CAPTIONS = {
    "reward": "Mean over prompts; the line is the bootstrap interval.",
    "reward_perplexity": "Up is better rewarded, left is more fluent. Reward that is bought with perplexity "
    "is over-optimisation.",
    "best_of_n": "Mean over prompts of the best of n responses' reward.",
    "wins": "Of answer pairs: response i to a prompt against the other's response i; every prompt weighs the same.",
    "reward_histogram": "Rewards of single responses; dashed lines are means.",
}


# ---- Numbers, tables and pictures ----


def number(value: object, form: str = ".2f", unit: str = "") -> str:
    """A number with few digits and its unit; a dash for what was not measured or is not finite."""
    return format(value, form) + unit if is_number(value) else MISSING


def listed(names: Sequence[str], most: int) -> str:
    """a, b and c; of more than `most`, how many more."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table(
    first: str, names: Sequence[str], shown: Sequence[Column], look: Mapping[str, Style] | None = None
) -> dict[str, Any] | None:
    """A row for each name, in its colour; columns without a single number are left out, and None if none is left."""
    kept = [column for column in shown if any(cell not in (MISSING, "") for cell in column.cells.values())]
    if not kept:
        return None
    return {
        "columns": [first, *(column.title for column in kept)],
        "rows": [
            (look[name].color if look else None, [name, *(column.cells.get(name, MISSING) for column in kept)])
            for name in names
        ],
        "legend": [(column.title, column.meaning) for column in kept if column.meaning],
    }


def picture(figure: Any, description: str, caption: str = "", *, wide: bool = False) -> dict[str, Any]:
    """Draw a figure; it is kept as an SVG in a data URI, in which nothing can be run."""
    source = "data:image/svg+xml;base64," + base64.b64encode(figure_bytes(figure, "svg")).decode("ascii")
    return {"source": source, "description": description, "caption": caption, "wide": wide}


# ---- Rounds ----


def rounds_section(name: str, rounds: RoundsRun, anchor: str) -> dict[str, Any]:
    """IP-n: reward from round to round, and every round's candidates."""
    rows = rounds.rows
    policies = [str(row["policy"]) for row in rows]
    rewards = [_reward_of(row) for row in rows]
    best = [row["mean_of_max"] if is_number(row.get("mean_of_max")) else None for row in rows]
    measured = [(policy, value) for policy, value in zip(policies, rewards, strict=True) if value is not None]
    text = []
    if len(measured) > 1:
        (first, then), (last, now) = measured[0], measured[-1]
        rises = sum(b.mean > a.mean for (_, a), (_, b) in itertools.pairwise(measured))
        text.append(
            f"Held-out reward went from {then} ({first}) to {now} ({last}); it rose in {rises} of "
            f"{len(measured) - 1} rounds."
        )

    def column(title: str, key: str, form: str, meaning: str = "") -> Column:
        return Column(title, meaning, {str(row["policy"]): number(row.get(key), form) for row in rows})

    shown = [
        column("groups", "groups", ",.0f"),
        column("candidates", "candidates", ".3f", "mean score of the responses that the policy was trained on"),
        column("the policy's candidates", "own", ".3f", "of those that the policy before it wrote"),
        column("mean of max", "mean_of_max", ".3f", "mean over groups of the best score"),
        Column("held-out reward", "", {name: format(value, ".3f") for name, value in measured}),
        column("perplexity", "perplexity", ".2f"),
    ]
    pictures = []
    if len(measured) + sum(value is not None for value in best) > 1:
        label = rounds.evaluation.numbers.headline if rounds.evaluation is not None else None
        described = "; ".join(f"{policy}: {value or MISSING}" for policy, value in zip(policies, rewards, strict=True))
        caption = (
            "Held-out reward with its interval. The dashed line is the mean of each training group's best candidate, "
            "which the trained policy's reward is expected to approach."
        )
        figure = rounds_figure(policies, rewards, best, label=label or "the scorer")
        pictures.append(picture(figure, f"Reward by round. {described}.", caption))
    part = {"text": text, "table": table("policy", policies, shown), "pictures": pictures}
    return {"title": f"Rounds: {name}", "anchor": anchor, "parts": [part]}


def _reward_of(row: Mapping[str, Any]) -> Interval | None:
    mean, low, high = (row[key] if is_number(row.get(key)) else math.nan for key in ("reward", "low", "high"))
    return None if math.isnan(mean) else Interval(mean, low, high)


# ---- An evaluation ----


def evaluation_section(
    evaluation: Evaluation, look: Mapping[str, Style], anchor: str, *, title: str
) -> dict[str, Any] | None:
    """One evaluation, or the joined ones of all rounds: in words, in the paper's table, plots and examples."""
    numbers = evaluation.numbers
    worth, more = columns(numbers)
    names = list(numbers.policies)
    pictures = [
        # A histogram of one or two policies is drawn for half of the page's width, one of several for all of it.
        picture(plot.figure, plot.description, _CAPTIONS.get(plot.name, ""), wide=plot.figure.get_figwidth() > WIDTH)
        for plot in evaluation_plots(evaluation, look)
    ]
    parts: list[dict[str, Any]] = []
    for heading, shown in (("", worth), ("More about texts and order", more)):
        if shown:
            parts.append({"table": table("policy", names, shown, look)} | ({"heading": heading} if heading else {}))
    if not parts and not pictures:
        return None
    parts[0]["text"] = _result(evaluation)
    if said := note(numbers):
        parts[-1]["note"] = said
    parts.append({"pictures": sorted(pictures, key=lambda one: one["wide"])})
    wanted = numbers.settings.get("examples", _EXAMPLES)
    examples = _examples(evaluation, look, wanted if isinstance(wanted, int) else _EXAMPLES)
    if examples:
        said = (
            f"Side by side: {len(examples)} prompts at even distances through the list, with the first response of "
            f"each policy and its reward by {numbers.headline}. They were not chosen by their looks."
        )
        parts.append({"note": said, "examples": examples})
    return {"title": title, "anchor": anchor, "parts": parts}


def _result(evaluation: Evaluation) -> list[str]:
    """The result in a few sentences, of what was measured only."""
    numbers = evaluation.numbers
    label = numbers.headline
    rewards = evaluation.rewards(label) if label is not None else {}
    if label is None or not rewards:
        return []
    share = numbers.settings.get("confidence")
    confidence = f"{100 * share:g}% " if is_number(share) else ""

    def reward_of(name: str) -> str:
        value = rewards[name]
        if not (is_number(value.low) and is_number(value.high)):
            return number(value.mean)
        return f"{number(value.mean)} ({confidence}interval {number(value.low)} to {number(value.high)})"

    first = next(iter(numbers.policies))
    best = max(rewards, key=lambda name: rewards[name].mean)
    prompts = len(evaluation.scored_rows(first, label))
    on = f"On {prompts:,} held-out prompts, " if prompts else ""
    if len(rewards) == 1:
        said = [f"{on}{best} has a mean reward of {reward_of(best)} by {label}."]
    elif best == first:
        said = [f"{on}no policy is rewarded higher by {label} than {first}, whose mean is {reward_of(best)}."]
    else:
        than = f", against {reward_of(first)} of {first}" if first in rewards else ""
        said = [f"{on}{best} has the highest mean reward by {label}: {reward_of(best)}{than}."]
        apart = evaluation.difference(best, first, label) if first in rewards else None
        if apart is not None and is_number(apart.low) and is_number(apart.high):
            by_chance = ": the difference may be chance" if apart.low <= 0 <= apart.high else ""
            said.append(
                f"On the same prompts it has {number(apart.mean)} more ({number(apart.low)} to {number(apart.high)})"
                f"{by_chance}."
            )
    for row in numbers.wins:
        if row.policy == best and any(row.shares):
            won, tied, lost = (f"{part:.0%}" for part in row.shares)
            by = "" if row.by == label else f" by {row.by}"
            said.append(f"It wins {won} of the answer pairs against {row.against}{by}, ties {tied} and loses {lost}.")
    one, other = (numbers.policies[name].perplexity for name in (best, first))
    if best != first and is_number(one) and is_number(other):
        said.append(f"The perplexity of its text is {number(one)}, that of {first}'s {number(other)}.")
    return [" ".join(said)]


def _examples(evaluation: Evaluation, look: Mapping[str, Style], wanted: int) -> list[dict[str, Any]]:
    """At most `wanted` prompts that every policy with a scored file answered, each policy's first response.

    Prompts are taken at even distances through the list and responses by their index, so that nobody picks the
    pretty ones.
    """
    numbers = evaluation.numbers
    if numbers.headline is None:
        return []
    rows = {
        name: by_prompt
        for name in numbers.policies
        if (by_prompt := _by_prompt(evaluation.scored_rows(name, numbers.headline)))
    }
    if not rows:
        return []
    first, *others = rows.values()
    shared = [key for key in first if all(key in other for other in others)]
    wanted = min(wanted, len(shared))
    return [
        {
            "prompt": _messages(first[key]["prompt"]),
            "answers": [
                {
                    "policy": name,
                    "color": look[name].color,
                    "reward": number(answered[key]["scores"][0], "+.2f"),
                    "text": _cut(str(answered[key]["responses"][0])),
                }
                for name, answered in rows.items()
            ],
        }
        for key in (shared[index * len(shared) // wanted] for index in range(wanted))
    ]


def _by_prompt(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by their prompt; a repeated one by how often it came before as well."""
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        text = json.dumps(row["prompt"], sort_keys=True)
        if row["responses"]:
            keyed[text, seen[text]] = row
        seen[text] += 1
    return keyed


def _messages(prompt: Any) -> list[tuple[str, str]]:
    """(role, text) of each message; a bare prompt has no role."""
    if not isinstance(prompt, list):
        return [("", _cut(str(prompt)))]
    messages = [message for message in prompt if isinstance(message, dict)]
    return [(str(message.get("role", "")), _cut(str(message.get("content", "")))) for message in messages]


def _cut(text: str) -> str:
    left_out = len(text) - _MOST_CHARACTERS
    return text.strip() if left_out <= 0 else f"{text[:_MOST_CHARACTERS]} … ({left_out:,} more characters)"


# ---- Training ----


def training_section(runs: Mapping[str, TrainingRun], look: Mapping[str, Style], anchor: str) -> dict[str, Any]:
    """All runs: a table, the curves, what online training sampled, and log-probs by source."""
    text, rows = _runs_table(runs, look)
    pictures = []
    if panels := _panels(runs):
        described = "; ".join(f"{name}: {_course(run)}" for name, run in runs.items())
        figure = curves_figure(panels, look)
        pictures.append(picture(figure, f"Training curves. {described}.", _how_drawn(runs), wide=True))
    pictures += [*_online_pictures(runs, look), *_source_pictures(runs, look)]
    return {"title": "Training", "anchor": anchor, "parts": [{"text": text, "table": rows, "pictures": pictures}]}


def recipes_section(runs: Mapping[str, TrainingRun], anchor: str) -> dict[str, Any]:
    """In what the recipes of several runs differ, and the resolved recipe of every run, folded."""
    flat = {name: dict(flat_items(run.recipe)) for name, run in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    different = {
        key: {name: str(values.get(key, MISSING)) for name, values in flat.items()}
        for key in keys
        if key != "training.output_dir" and len({str(values.get(key)) for values in flat.values()}) > 1
    }
    parts: list[dict[str, Any]] = []
    if different:
        shown = [Column(name, "", {key: cells[name] for key, cells in different.items()}) for name in runs]
        parts.append({"heading": "What differs", "table": table("key", list(different), shown)})
    parts += [{"folded": {"title": f"Recipe of {name}", "text": run.recipe_text}} for name, run in runs.items()]
    return {"title": "Recipes", "anchor": anchor, "parts": parts}


def training_in_words(runs: Mapping[str, TrainingRun]) -> list[str]:
    """What training did to the share of pairs ordered right."""
    said = []
    for name, run in runs.items():
        _, values = run.series("pair_accuracy")
        if len(values) >= 10:
            first, last = _ends(values)
            said.append(f"{name} orders {last:.0%} of its training pairs right at the end, {first:.0%} at first")
    return ["; ".join(said) + "."] if said else []


def _runs_table(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> tuple[list[str], dict[str, Any] | None]:
    """What all runs have in common in a sentence, and what differs, or was measured, in a table."""

    def column(title: str, cell: Callable[[TrainingRun], str], meaning: str = "") -> Column:
        return Column(title, meaning, {name: cell(run) for name, run in runs.items()})

    described = [
        column("objective", _objective),
        column("model", _model),
        column("groups", lambda run: number(run.data.get("train", {}).get("groups_kept"), ",")),
        column("steps", lambda run: f"{run.last_step():,}"),
    ]
    measured = [
        column(
            "loss",
            lambda run: _change(run.series("loss")[1], ".3f"),
            "means of the first and the last tenth of the logged steps",
        ),
        column(
            "pairs right",
            lambda run: _change(run.series("pair_accuracy")[1], ".0%"),
            "share of training pairs ordered right, the same means",
        ),
        column(
            "held out",
            lambda run: _first_last(run.series("pair_accuracy", held_out=True)[1]),
            "share of held-out pairs ordered right, at the first and the last evaluation",
        ),
        column("groups/s", lambda run: number(_median(run.series("groups_per_second")[1]), ",.0f")),
        column("time", _time, "wall time; of a resumed run, since it was resumed"),
        column("peak memory", lambda run: number(max(run.series("peak_memory_gib")[1], default=None), ".1f", " GiB")),
    ]
    shared = [column for column in described if len(set(column.cells.values())) == 1]
    values = {column.title: next(iter(column.cells.values())) for column in shared}
    said = "; ".join(f"{title} {value}" for title, value in values.items() if value != MISSING)
    opening = "The same in all runs" if len(runs) > 1 else next(iter(runs))
    shown = [column for column in [*described, *measured] if column not in shared]
    return [f"{opening}: {said}."] if said else [], table("run", list(runs), shown, look)


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


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
    logged = {name for run in runs.values() for entry in [*run.steps, *run.held_out] for name in entry}
    panels: dict[str, dict[str, Curve]] = {}
    for metric in [*(name for name in _TITLES if name in logged), *sorted(logged - _TITLES.keys())]:
        if metric in _NO_CURVE or metric.startswith(_SOURCE):
            continue
        curves = {name: Curve(*run.series(metric), *run.series(metric, held_out=True)) for name, run in runs.items()}
        drawn = {name: curve for name, curve in curves.items() if len(curve.values) + len(curve.held_out_values) > 0}
        if any(len(curve.values) > 1 or len(curve.held_out_values) > 1 for curve in drawn.values()):
            panels[_TITLES.get(metric, metric)] = drawn
    return panels


def _online_pictures(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> list[dict[str, Any]]:
    """What the policy answered while it was trained, refresh by refresh; nothing without online training."""
    panels = {}
    for metric, title in _ONLINE_TITLES.items():
        series = {name: run.series(metric, refreshes=True) for name, run in runs.items()}
        if curves := {name: Curve(steps, values) for name, (steps, values) in series.items() if steps}:
            panels[title] = curves
    if not panels:
        return []
    title, rewards = next(iter(panels.items()))
    said = "; ".join(f"{name}: {curve.values[0]:.3f} to {curve.values[-1]:.3f}" for name, curve in rewards.items())
    caption = "The policy's own answers while it was trained, at each refresh."
    return [picture(curves_figure(panels, look), f"{caption} {title}: {said}.", caption, wide=len(panels) > 1)]


def _source_pictures(runs: Mapping[str, TrainingRun], look: Mapping[str, Style]) -> list[dict[str, Any]]:
    """Mean log-probs by source: several runs in a panel for each source, while there are few of these."""
    logged = {name: sources for name, run in runs.items() if (sources := _sources(run))}
    names = sorted({source for sources in logged.values() for source in sources})
    title = "Mean log-prob per token of each source's responses, in nats"
    said = {
        run: "; ".join(f"{source}: {y[0]:.3f} to {y[-1]:.3f}" for source, (_, y) in sources.items())
        for run, sources in logged.items()
    }
    if len(logged) > 1 and len(names) <= _MOST_SOURCE_PANELS:
        panels = {
            source: {run: Curve(*sources[source]) for run, sources in logged.items() if source in sources}
            for source in names
        }
        described = " ".join(f"{run}: {words}." for run, words in said.items())
        return [picture(curves_figure(panels, look), f"{title}. {described}", f"{title}.", wide=len(panels) > 1)]
    panel = "Mean log-prob per token, nats"
    return [
        picture(
            curves_figure({panel: {source: Curve(*sources[source]) for source in sources}}, styles(list(sources))),
            f"{title}, {run}. {said[run]}.",
            f"{run}: {title[0].lower()}{title[1:]}.",
        )
        for run, sources in logged.items()
    ]


def _sources(run: TrainingRun) -> dict[str, tuple[list[float], list[float]]]:
    names = dict.fromkeys(name for entry in run.steps for name in entry if name.startswith(_SOURCE))
    series = {name.removeprefix(_SOURCE): run.series(name) for name in names}
    return {name: (steps, values) for name, (steps, values) in series.items() if len(steps) > 1}


def _how_drawn(runs: Mapping[str, TrainingRun]) -> str:
    window = max(smoothing_window(len(run.steps)) for run in runs.values())
    said = f"Lines are running means over up to {window} logged steps" if window > 1 else "Lines are logged steps"
    if window > 1 and len(runs) <= 3:
        said += ", faint lines single ones"
    return said + ("; markers are held-out values." if any(run.held_out for run in runs.values()) else ".")


def _course(run: TrainingRun) -> str:
    series = {metric: run.series(metric)[1] for metric in ("loss", "pair_accuracy")}
    ends = {metric: _ends(values) for metric, values in series.items() if values}
    parts = [f"{metric} from {first:.3f} to {last:.3f}" for metric, (first, last) in ends.items()]
    return ", ".join(parts) or "nothing logged"


def _ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and the last tenth: single steps are noise."""
    tenth = max(1, len(values) // 10)
    return math.fsum(values[:tenth]) / tenth, math.fsum(values[-tenth:]) / tenth


def _change(values: list[float], form: str) -> str:
    return " → ".join(format(value, form) for value in _ends(values)) if values else MISSING


def _first_last(values: list[float]) -> str:
    ends = [*values[:1], *values[1:][-1:]]
    return " → ".join(f"{value:.0%}" for value in ends) or MISSING


# ---- Data and merges ----


def data_section(runs: Mapping[str, TrainingRun], anchor: str) -> dict[str, Any] | None:
    """The data of every run; the same data once, under all runs that read it."""
    readers: dict[tuple[str, str], list[str]] = {}
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    for name, run in runs.items():
        for split, report in run.data.items():
            key = (split, str(report.get("fingerprint", name)))
            readers.setdefault(key, []).append(name)
            reports[key] = report
    parts = [
        {"heading": f"{'Training' if split == 'train' else 'Held-out'} data of {listed(names, 6)}"}
        | _data_part(reports[split, fingerprint], is_training=split == "train")
        for (split, fingerprint), names in readers.items()
    ]
    return {"title": "Data", "anchor": anchor, "parts": parts} if parts else None


def _data_part(report: Mapping[str, Any], *, is_training: bool) -> dict[str, Any]:
    def count(key: str) -> str:
        return number(report.get(key), ",")

    def share(key: str, form: str = ".3g") -> str:
        return number(report.get(key), form)

    histogram = {int(k): int(groups) for k, groups in (report.get("k_histogram") or {}).items()}
    correlation = share("score_length_correlation", "+.2f")
    facts = {
        "groups": f"{count('groups_kept')} kept of {count('groups_read')} read",
        **{
            f"dropped: {str(reason).replace('_', ' ')}": number(groups, ",")
            for reason, groups in (report.get("groups_dropped") or {}).items()
        },
        "responses": f"{count('responses_kept')} kept of {count('responses_read')} read",
        "k, responses of a group": MISSING
        if not histogram
        else f"{min(histogram)} to {max(histogram)}"
        if len(histogram) > 1
        else f"{next(iter(histogram))} in all",
        "score": f"mean {share('score_mean')}, std {share('score_std')}",
        "mean of each group's best": share("score_mean_of_max")
        + (", which the policy's reward is expected to approach" if is_training else ""),
        "pairs": f"{count('pairs')}, {count('ordered_pairs')} ordered",
        "ties": f"{share('tie_rate', '.1%')} of pairs",
        "score and length": "no correlation defined" if correlation == MISSING else f"rank correlation {correlation}",
        "response tokens": _percentiles(report.get("response_tokens")),
        "prompt tokens": _percentiles(report.get("prompt_tokens")),
        "truncated": f"{count('prompts_truncated')} prompts, {count('responses_truncated')} responses",
        "sharing the prompt saves": f"{share('sharing_saves', '.0%')} of the tokens",
    }
    part: dict[str, Any] = {"facts": [(name, value) for name, value in facts.items() if MISSING not in value]}
    if len(histogram) > 1:
        said = "; ".join(f"k={k}: {groups:,} groups" for k, groups in sorted(histogram.items()))
        part["pictures"] = [picture(k_figure(histogram), f"Groups by their number of responses. {said}.")]
    sources: dict[str, Any] = report.get("sources") or {}
    if len(sources) > 1:
        shown = dict(itertools.islice(sources.items(), _SOURCES_SHOWN))
        more = [f"and {len(sources) - len(shown):,} more"] if len(sources) > len(shown) else []
        counts = Column("responses", "", {name: number(one.get("count"), ",") for name, one in shown.items()})
        means = Column("mean score", "", {name: number(one.get("mean_score"), ".3g") for name, one in shown.items()})
        part["table"] = table("source", [*shown, *more], [counts, means])
    return part


def _percentiles(values: Any) -> str:
    if not isinstance(values, Mapping):
        return MISSING
    names = {"p50": "median", "p90": "90% up to", "max": "longest"}
    return ", ".join(f"{word} {number(values.get(name), ',')}" for name, word in names.items())


def merge_section(merges: Mapping[str, Mapping[str, Any]], anchor: str) -> dict[str, Any]:
    """What merging the adapters into standalone weights did, and how faithful it was."""
    parts = []
    for name, merge in merges.items():
        facts = {
            "base model": str(merge.get("base_model", MISSING)),
            "merged into": f"{merge.get('base', MISSING)} weights",
            "written": f"{merge.get('tensors', MISSING)} tensors, {merge.get('dtype', MISSING)}",
            "changed": f"{merge.get('changed_tensors', MISSING)} tensors, sum of ‖Δ‖ "
            + number(merge.get("delta_norm"), ".4g"),
        }
        fidelity = merge.get("fidelity")
        if isinstance(fidelity, Mapping):
            facts["largest logit difference"] = number(fidelity.get("max_abs_difference"), ".3g")
            facts["mean KL divergence"] = number(fidelity.get("mean_kl"), ".3g", " nats")
            facts["same most likely token"] = number(fidelity.get("top1_agreement"), ".1%")
        else:
            facts["fidelity"] = "not verified"
        parts.append({"heading": name, "facts": list(facts.items())})
    return {"title": "Merge", "anchor": anchor, "parts": parts}
