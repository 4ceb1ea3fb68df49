"""The marked parts of README.md, from `results.json` and `paper_numbers.yaml`.

A part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; everything else is written by hand and stays.

Left to others: the numbers (`reproduce_results`), the verdicts (`reproduce_claims`), the plots (`reproduce_figures`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from reproduce_claims import SETTINGS, Part, all_claims, interval_of, part_verdict
from reproduce_rows import ROWS

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

NONE = "–"
#: Row -> the row of `paper_numbers.yaml` that it stands beside.
IN_PAPER = {"sp": "sp", "dp": "dp", "without_rank": "without_rank", "op_8": "op_32"}
TITLES = {
    **{name: row.title for name, row in ROWS.items()},
    **{f"ip_{number}": f"RRHF, IP-{number}" for number in (1, 2, 3)},
}
SWEEP = {"without_rank": "0", "rank_weight_0.03": "0.03", "dp": "0.1"} | {
    f"rank_weight_{weight}": weight for weight in ("0.3", "1", "3")
}

Table = Sequence[Sequence[str]]


def update_document(path: Path, template: str, results: dict[str, Any], numbers: str) -> None:
    """Write the document with its marked parts made anew.

    Args:
        path: the document.
        template: its text until now, whose unmarked parts are kept.
        results: the contents of `results.json`.
        numbers: the text of `paper_numbers.yaml`.

    Raises:
        UserError: the template lacks a marked part, or has one that nobody writes.
    """
    replace_text(path, document(template, results, numbers))


def document(template: str, results: dict[str, Any], numbers: str) -> str:
    """The whole text; the same arguments give the same text."""
    paper = yaml.safe_load(numbers)
    marked = re.findall(r"<!-- begin: (.+?) -->", template)
    if sorted(marked) != sorted(PARTS):
        raise UserError(f"README.md: has the marked parts {', '.join(marked)}, and not {', '.join(PARTS)}. Fix it.")
    for name, part in PARTS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if template.count(end) != 1:
            raise UserError(f"README.md: needs the line {end} once. Fix it.")
        before, _, rest = template.partition(begin)
        _, _, after = rest.partition(end)
        template = f"{before}{begin}\n{part(results, paper)}\n{end}{after}"
    return template


# ---- Parts ----


def run_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """What was run on what, and how long it took."""
    seeds, prompts = results["seeds"], results["prompts"]
    seconds = sum(sum(own) for own in results["seconds"].values())
    return (
        f"Measured with {len(seeds)} seed{'s' * (len(seeds) > 1)} ({', '.join(map(str, seeds))}), "
        f"{prompts['train']} training prompts and {prompts['held_out']} held-out prompts with 4 answers each, on "
        f"{results['hardware']}: {seconds / 60:.0f} minutes of one core's work for all rows, about "
        f"{seconds / 120:.0f} minutes with two workers."
    )


def claims_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Claim by claim: the verdict, and the numbers that it comes from."""
    rows = [["claim of the paper", "at small scale", "from", "by seed", "mean [95% interval]", "must be"]]
    for claim in all_claims(results):
        for number, part in enumerate(claim.parts):
            first = number == 0
            rows.append(
                [
                    claim.says if first else "",
                    f"**{claim.verdict}**" if first else "",
                    f"{part.what}: {part_verdict(part)}" if len(claim.parts) > 1 else part.what,
                    " ".join(f"{value:.2f}" for value in part.values),
                    _interval(part),
                    part.range,
                ]
            )
    return _markdown(rows, "lllrrr")


def main_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """The paper's table and ours, side by side."""
    names = ("base", "best_of_4", "sft", "p", "bp", "sp", "d", "dp")
    head = ["setting", "paper: reward", "paper: perplexity", "reward", "by seed", "perplexity", "distinct-2", "tokens"]
    own, good, ppo = results["provided"], paper["rows"]["good"], paper["rows"]["ppo"]
    rows = [
        head,
        ["better response of the data", _number(good["reward"]), _number(good["perplexity"]), *[NONE] * 5],
        ["the story's own continuation", NONE, NONE, *_mean_and_seeds(own["own"]), *[NONE] * 3],
        ["the other model's continuation", NONE, NONE, *_mean_and_seeds(own["foreign"]), *[NONE] * 3],
        ["PPO", _number(ppo["reward"]), _number(ppo["perplexity"]), *[NONE] * 5],
        *(_row(name, results, paper) for name in names),
    ]
    return _markdown(rows, "lrrrrrrr")


def settings_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """What the candidates are worth, and what is learnt from them."""
    rows = [["setting", "candidates: mean", "std", "mean of max", "learned reward", "share of the way"]]
    for name in SETTINGS:
        own, learned = results["candidates"][name], results["rows"][name]["reward"]
        ways = [
            (reward - mean) / (best - mean)
            for reward, mean, best in zip(learned, own["mean"], own["mean_of_max"], strict=True)
        ]
        columns = [*(_mean(own[key]) for key in ("mean", "std", "mean_of_max")), _spread(learned), _spread(ways, 2)]
        rows.append([TITLES[name], *columns])
    return _markdown(rows, "lrrrrr")


def losses_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Ablations and variants of the loss, all on DP's data."""
    names = ("dp", "without_rank", "without_ft", "variant_paper", "variant_released")
    head = ["loss", "paper: reward", "paper: perplexity", "reward", "by seed", "perplexity", "distinct-2", "tokens"]
    return _markdown([head, *(_row(name, results, paper) for name in names)], "lrrrrrrr")


def sweep_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """The frontier's points."""
    rows = [["rank_weight", "reward", "by seed", "perplexity", "distinct-2", "pairs ordered right"]]
    for name, weight in SWEEP.items():
        own = results["rows"][name]
        accuracy = _percent(own["pair_accuracy"])
        rows.append(
            [weight, *_mean_and_seeds(own["reward"]), _range(own["perplexity"]), _mean(own["distinct_2"]), accuracy]
        )
    return _markdown(rows, "rrrrrr")


def iterations_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """IP-n, round by round."""
    names = ("base", "ip_1", "ip_2", "ip_3")
    head = ["policy", "paper: reward", "paper: perplexity", "reward", "by seed", "perplexity", "distinct-2", "tokens"]
    return _markdown([head, *(_row(name, results, paper) for name in names)], "lrrrrrrr")


def online_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """OP-k with and without KL."""
    names = ("base", "dp", "op_8", "op_8_kl")
    head = ["policy", "paper: reward", "paper: perplexity", "reward", "by seed", "perplexity", "distinct-2", "tokens"]
    return _markdown([head, *(_row(name, results, paper) for name in names)], "lrrrrrrr")


def reward_model_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Shares of pairs that policies order right."""
    known = paper["reward_model_accuracy"]
    rows = [["judge", "paper", "pairs ordered right", "by seed"]]
    rows.append(["the reward model itself", f"{known['gptj_rm_static']['accuracy']:.2f}%", "100%, by definition", NONE])
    for name in ("base", "sft", "without_rank", "dp", "ip_3", "op_8", "op_8_kl"):
        own = results["rows"][name]["pair_accuracy"]
        said = f"about {known['rrhf']['accuracy']:.2f}%" if name == "dp" else NONE
        rows.append([f"p_i of {TITLES[name]}", said, _percent(own), " ".join(f"{100 * value:.1f}" for value in own)])
    return _markdown(rows, "lrrr")


def seconds_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """How long each row took, sampling, scoring, training and evaluation together."""
    rows = [["row", "seconds of one core, by seed"]]
    rows += [
        [f"[{name}](small/{name}.yaml)", " ".join(f"{own:.0f}" for own in results["seconds"][name])] for name in ROWS
    ]
    return _markdown(rows, "lr")


PARTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
    "run": run_part,
    "claims": claims_part,
    "main": main_part,
    "settings": settings_part,
    "losses": losses_part,
    "sweep": sweep_part,
    "iterations": iterations_part,
    "online": online_part,
    "reward model": reward_model_part,
    "seconds": seconds_part,
}


# ---- Cells ----


def _row(name: str, results: dict[str, Any], paper: dict[str, Any]) -> list[str]:
    """Title, the paper's numbers, ours."""
    theirs = paper["rows"].get(IN_PAPER.get(name, ""), {})
    own = results["rows"][name]
    further = [_mean(own[key], digits) if key in own else NONE for key, digits in (("distinct_2", 2), ("tokens", 0))]
    return [
        TITLES[name],
        _number(theirs.get("reward")),
        _number(theirs.get("perplexity")),
        *_mean_and_seeds(own["reward"]),
        _range(own["perplexity"]),
        *further,
    ]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}".replace("-", "−")


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{interval_of(values).mean:.{digits}f}"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half of the 95% interval over seeds."""
    mean, low, high = interval_of(values)
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def _mean_and_seeds(values: Sequence[float]) -> list[str]:
    return [_spread(values), " ".join(f"{value:.3f}" for value in values)]


def _percent(values: Sequence[float]) -> str:
    return _spread([100 * value for value in values], 1).replace(" ±", "% ±") + ("%" if len(values) < 2 else "")


def _range(values: Sequence[float]) -> str:
    """Mean, least and most: perplexities of fallen text have no symmetric spread."""
    mean, low, high = (_short(value) for value in (interval_of(values).mean, min(values), max(values)))
    return mean if len(values) < 2 else f"{mean} ({low}–{high})"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _interval(part: Part) -> str:
    mean, low, high = interval_of(part.values)
    return f"{mean:.2f}" if len(part.values) < 2 else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _markdown(rows: Table, align: str) -> str:
    rule = ["---" if side == "l" else "---:" for side in align]
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    assert all(line.count(" | ") == len(align) - 1 for line in lines), "a row of another width"
    return "\n".join(lines)
