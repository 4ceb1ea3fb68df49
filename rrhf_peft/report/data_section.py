"""What the report says of the data, the merge and the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rrhf_peft.report.blocks import Facts, Pictures, Section, Table, TableRow, picture
from rrhf_peft.report.numbers import MISSING, count, is_number, number
from rrhf_peft.report.plots import k_figure
from rrhf_peft.report.training_run import TrainingRun

_SOURCES_SHOWN = 24


def data_section(runs: Mapping[str, TrainingRun], anchor: str) -> Section | None:
    """The data of every run; the same data once, under all runs that read it."""
    readers: dict[tuple[str, str], list[str]] = {}
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    for name, run in runs.items():
        for part, report in run.data.items():
            key = (part, str(report.get("fingerprint", name)))
            readers.setdefault(key, []).append(name)
            reports[key] = report
    blocks: list[Any] = []
    for key, names in readers.items():
        what = "Training data" if key[0] == "train" else "Held-out data"
        blocks += _one_data_set(reports[key], f"{what} of {_listed(names)}", is_training=key[0] == "train")
    return Section("Data", anchor, blocks) if blocks else None


def merge_section(merges: Mapping[str, Mapping[str, Any]], anchor: str) -> Section:
    """What merging the adapters into standalone weights did, and how faithful it was."""
    blocks = []
    for name, merge in merges.items():
        facts = [
            ("base model", str(merge.get("base_model", MISSING))),
            ("merged into", f"{merge.get('base', MISSING)} weights"),
            ("written", f"{merge.get('tensors', MISSING)} tensors, {merge.get('dtype', MISSING)}"),
            (
                "changed",
                f"{merge.get('changed_tensors', MISSING)} tensors, sum of ‖Δ‖ {_of(merge, 'delta_norm', '.4g')}",
            ),
        ]
        fidelity = merge.get("fidelity")
        if isinstance(fidelity, Mapping):
            facts += [
                ("largest logit difference", _of(fidelity, "max_abs_difference", ".3g")),
                ("mean KL divergence", f"{_of(fidelity, 'mean_kl', '.3g')} nats"),
                ("same most likely token", _of(fidelity, "top1_agreement", ".1%")),
            ]
        else:
            facts.append(("fidelity", "not verified"))
        blocks.append(Facts(facts, name))
    return Section("Merge", anchor, blocks)


def _one_data_set(report: Mapping[str, Any], title: str, *, is_training: bool) -> list[Any]:
    dropped = report.get("groups_dropped") or {}
    correlation = report.get("score_length_correlation")
    facts = [
        ("groups", f"{_count(report, 'groups_kept')} kept of {_count(report, 'groups_read')} read"),
        *((f"dropped: {str(reason).replace('_', ' ')}", count(n)) for reason, n in dropped.items()),
        ("responses", f"{_count(report, 'responses_kept')} kept of {_count(report, 'responses_read')} read"),
        ("k, responses of a group", _k_in_words(_histogram(report))),
        ("score", f"mean {_of(report, 'score_mean', '.3g')}, std {_of(report, 'score_std', '.3g')}"),
        (
            "mean of each group's best",
            _of(report, "score_mean_of_max", ".3g")
            + (", which the policy's reward is expected to approach" if is_training else ""),
        ),
        ("pairs", f"{_count(report, 'pairs')}, {_count(report, 'ordered_pairs')} ordered"),
        ("ties", f"{_of(report, 'tie_rate', '.1%')} of pairs"),
        (
            "score and length",
            f"rank correlation {number(correlation, '+.2f')}" if is_number(correlation) else "no correlation defined",
        ),
        ("response tokens", _percentiles(report.get("response_tokens"))),
        ("prompt tokens", _percentiles(report.get("prompt_tokens"))),
        (
            "truncated",
            f"{_count(report, 'prompts_truncated')} prompts, {_count(report, 'responses_truncated')} responses",
        ),
        ("sharing the prompt saves", f"{_of(report, 'sharing_saves', '.0%')} of the tokens"),
    ]
    blocks: list[Any] = [Facts([(name, value) for name, value in facts if MISSING not in value], title)]
    histogram = _histogram(report)
    if len(histogram) > 1:
        said = "; ".join(f"k={k}: {n:,} groups" for k, n in sorted(histogram.items()))
        blocks.append(Pictures([picture(k_figure(histogram), f"Groups by their number of responses. {said}.")]))
    sources = report.get("sources") or {}
    if len(sources) > 1:
        rows = [
            TableRow([str(name), _count(own, "count"), _of(own, "mean_score", ".3g")])
            for name, own in list(sources.items())[:_SOURCES_SHOWN]
        ]
        if len(sources) > _SOURCES_SHOWN:
            rows.append(TableRow([f"and {len(sources) - _SOURCES_SHOWN:,} more", "", ""]))
        blocks.append(Table(["source", "responses", "mean score"], rows))
    return blocks


def _histogram(report: Mapping[str, Any]) -> dict[int, int]:
    return {int(k): int(n) for k, n in (report.get("k_histogram") or {}).items()}


def _k_in_words(histogram: Mapping[int, int]) -> str:
    if not histogram:
        return MISSING
    if len(histogram) == 1:
        return f"{next(iter(histogram))} in all"
    return f"{min(histogram)} to {max(histogram)}"


def _percentiles(values: Any) -> str:
    if not isinstance(values, Mapping):
        return MISSING
    names = {"p50": "median", "p90": "90% up to", "max": "longest"}
    return ", ".join(f"{word} {_count(values, name)}" for name, word in names.items())


def _count(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return f"{value:,}" if is_number(value) else MISSING


def _of(values: Mapping[str, Any], key: str, form: str) -> str:
    value = values.get(key)
    return number(value, form) if is_number(value) else MISSING


def _listed(names: list[str]) -> str:
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
