"""Records into numbers, verdicts, one picture and the document: gold reward compared at matched KL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rrhf_peft.files import replace_text
from rrhf_peft.plotting import WIDE, figure_bytes, new_figure, styled, styles

Record = dict[str, Any]


def at_matched_kl(base: Record, record: Record, metric: str, target: float) -> tuple[np.ndarray, bool]:
    """A metric of each prompt where the policy is `target` nats per response from the base, and whether it gets there.

    The policy's points, its adapter scaled from 0 (the base) to 1, are taken in the order of their mean KL, and the two
    around the target are weighed linearly. A policy that stays below is taken at its farthest point.
    """
    points = sorted([*base["points"], *record["points"]], key=lambda point: float(np.mean(point["kl"])))
    kl = [float(np.mean(point["kl"])) for point in points]
    values = [np.array(point[metric]) for point in points]
    for i in range(1, len(points)):
        if kl[i] >= target:
            share = (target - kl[i - 1]) / (kl[i] - kl[i - 1])
            return (1 - share) * values[i - 1] + share * values[i], True
    return values[-1], False


def difference(
    one: np.ndarray, other: np.ndarray, *, level: float, resamples: int, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of one - other and its interval, from values [seeds, prompts] of the same prompts.

    Seeds and prompts are drawn with replacement, each prompt with both of its values: what varies is the training, the
    sampling and which prompts the test happens to hold.
    """
    rng = np.random.default_rng(seed)
    gaps = one - other
    seeds, prompts = gaps.shape
    by_seed = rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples) / seeds
    by_prompt = rng.multinomial(prompts, [1 / prompts] * prompts, size=resamples) / prompts
    means = ((by_seed @ gaps) * by_prompt).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(gaps.mean()), float(low), float(high)


def results(
    protocol: dict[str, Any], about: dict[str, Any], bases: Sequence[Record], records: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """All numbers of the document; `bases` and every loss's records are in the order of the seeds."""
    rules = protocol["rules"]
    gold, reached = {}, {}
    for name, runs in records.items():
        pairs = [
            at_matched_kl(base, run, rules["compare"], rules["matched_kl"])
            for base, run in zip(bases, runs, strict=True)
        ]
        gold[name] = np.stack([values for values, _ in pairs])
        reached[name] = all(comes for _, comes in pairs)
    against = [name for name in records if name != rules["reference"]]
    level = 1 - (1 - rules["confidence"]) / (len(against) + len(protocol["claims"]))  # Bonferroni

    def compared(one: str, other: str) -> tuple[float, float, float]:
        return difference(gold[one], gold[other], level=level, resamples=rules["resamples"])

    return {
        "protocol": protocol,
        **about,
        "level": level,
        "base": summary(bases, None),
        "losses": {
            name: {
                **summary(runs, -1),
                "at_matched_kl": float(gold[name].mean()),
                "reaches": reached[name],
                "less_reference": compared(name, rules["reference"]) if name in against else None,
                "line": [
                    [float(np.mean([np.mean(run["points"][i][key]) for run in runs])) for key in ("kl", "gold")]
                    for i in range(len(runs[0]["points"]))
                ],
            }
            for name, runs in records.items()
        },
        "claims": [
            {
                **claim,
                **verdict(claim, claim["one"], compared, reached),
                "if_ranking_did_nothing": _without_ranking(claim, records, compared, reached),
            }
            for claim in protocol["claims"]
        ],
    }


def _without_ranking(
    claim: dict[str, Any], records: Mapping[str, Any], compared: Callable[..., Any], reached: Mapping[str, bool]
) -> str | None:
    """The verdict with RRHF of rank_weight 0 in the place of RRHF, where both were trained on the same groups."""
    if claim["one"] != "rrhf" or "rank_weight_0" not in records:
        return None
    text: str = verdict(claim, "rank_weight_0", compared, reached)["verdict"]
    return text


def verdict(
    claim: dict[str, Any], one: str, compared: Callable[..., tuple[float, float, float]], reached: Mapping[str, bool]
) -> dict[str, Any]:
    """holds: the corrected interval of (one - control) is above the margin; refuted: below it; else does not hold."""
    mean, low, high = compared(one, claim["control"])
    margin = claim.get("margin", 0.0)
    if not (reached[one] and reached[claim["control"]]):
        text = "not compared: one does not reach the KL"
    else:
        text = "holds" if low > margin else "refuted" if high < margin else "does not hold"
    return {"difference": [mean, low, high], "verdict": text}


def summary(runs: Sequence[Record], point: int | None) -> dict[str, float]:
    """Means over seeds and prompts at one point of a policy's line: -1 its own strength; None the base."""
    points = [run["points"][-1 if point is None else point] for run in runs]
    means = {name: float(np.mean([np.mean(p[name]) for p in points])) for name in ("kl", "gold", "vader", "tokens")}
    return {
        **means,
        "judge_perplexity": math.exp(float(np.mean([np.mean(p["judge_nats"]) for p in points]))),
        "distinct_2": float(np.mean([p["distinct_2"] for p in points])),
        "pair_accuracy": float(np.mean([run["pair_accuracy"] for run in runs])),
        "train_seconds": float(np.mean([run["train_seconds"] for run in runs])),
    }


def write_report(
    folder: Path,
    protocol: dict[str, Any],
    about: dict[str, Any],
    bases: Sequence[Record],
    records: Mapping[str, Sequence[Record]],
) -> None:
    """results.json, README.md and gold_against_kl.png."""
    numbers = results(protocol, about, bases, records)
    replace_text(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    replace_text(folder / "README.md", document(numbers))
    (folder / "gold_against_kl.png").write_bytes(draw(numbers))


def document(numbers: dict[str, Any]) -> str:
    """The study in Markdown."""
    rules, data = numbers["protocol"]["rules"], numbers["protocol"]["data"]
    seeds = len(numbers["protocol"]["seeds"])
    lines = [
        "# What each loss is worth at the same distance from the base",
        "",
        f"{data['train']} prompts to train on, {data['dev']} to tune on, {data['test']} to test on, {seeds} new seeds.",
        "Every loss was tuned over as many settings. Gold is P(positive) of a classifier of SST-2 that training never",
        f"saw (right on {numbers['gold']:.1%} of SST-2's dev set). Policies are compared where KL(policy || base) is",
        f"{rules['matched_kl']:g} nats per response, with intervals over seeds and prompts that hold together at",
        f"{rules['confidence']:.0%} (each at {numbers['level']:.3%}). Rules: protocol.yaml.",
        "",
        "![gold reward against KL](gold_against_kl.png)",
        "",
        f"| loss | gold at KL {rules['matched_kl']:g} | less {rules['reference']} | settings | KL | gold | "
        "VADER | judge's perplexity | distinct-2 | tokens | pair accuracy | train s |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        _row("base", numbers["base"], "", "", ""),
    ]
    ordered = sorted(numbers["losses"].items(), key=lambda item: -item[1]["at_matched_kl"])
    for name, loss in ordered:
        gap = "" if loss["less_reference"] is None else _interval(loss["less_reference"])
        settings = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in numbers["settings"][name].items()
        )
        value = f"{loss['at_matched_kl']:.3f}" + ("" if loss["reaches"] else " *")
        lines.append(_row(name, loss, value, gap if loss["reaches"] else "", settings))
    lines += [
        "",
        "The columns from KL on are of the policy as trained. * does not come as far from the base as that: "
        "its farthest point, and no comparison.",
        "",
        "| claim | against | difference | verdict | if ranking did nothing |",
        "|---|---|---:|---|---|",
    ]
    for claim in numbers["claims"]:
        lines.append(
            f"| {claim['claim']} | {claim['one']} less {claim['control']} | {_interval(claim['difference'])} "
            f"| {claim['verdict']} | {claim['if_ranking_did_nothing'] or ''} |"
        )
    changed = numbers["protocol"]["changed_after_the_first_test_run"]
    lines += ["", "Changed after the first test run: " + ("; ".join(changed) if changed else "nothing") + ".", ""]
    return "\n".join(lines)


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.3f} ({low:+.3f}, {high:+.3f})"


def _row(name: str, loss: Mapping[str, float], *first: str) -> str:
    cells = [name, *first, f"{loss['kl']:.2f}", f"{loss['gold']:.3f}", f"{loss['vader']:.3f}"]
    cells += [f"{loss['judge_perplexity']:.1f}", f"{loss['distinct_2']:.3f}", f"{loss['tokens']:.1f}"]
    return "| " + " | ".join([*cells, f"{loss['pair_accuracy']:.1%}", f"{loss['train_seconds']:.0f}"]) + " |"


@styled
def draw(numbers: dict[str, Any]) -> bytes:
    """Gold reward against KL, a line per loss from the base to the policy as trained."""
    figure = new_figure(WIDE, 6.0)
    axis = figure.subplots()
    base = numbers["base"]
    look = styles(list(numbers["losses"]))
    for name, loss in numbers["losses"].items():
        kl, gold = zip((0.0, base["gold"]), *loss["line"], strict=True)
        axis.plot(kl, gold, label=name, color=look[name].color, marker=look[name].marker, linestyle=look[name].dashes)
    axis.axvline(numbers["protocol"]["rules"]["matched_kl"], color="#999999", linewidth=0.8)
    axis.set(title="Gold reward against distance from the base", xlabel="KL(policy || base), nats per response")
    axis.set_ylabel("gold reward: P(positive)")
    axis.legend(ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure_bytes(figure, "png")
