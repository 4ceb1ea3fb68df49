"""The marked parts of README.md, from `results.json` and `paper_numbers.yaml`.

A part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; everything else is written by hand and stays. The
paper's tables stand row by row beside the rows of this run that they name; a dash means that there is no such figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from reproduce_claims import all_claims, interval_of, share_of_the_way, without_ranking
from reproduce_rows import ROWS

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

NONE = "–"
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
    """Claim by claim: the verdict, the control, the numbers that it comes from, and what they are without ranking."""
    head = ["claim of the paper", "at small scale", "number", "control", "by seed", "mean [interval]", "must be"]
    rows = [[*head, "part", "at rank_weight 0"]]
    for claim, unranked in zip(all_claims(results), all_claims(without_ranking(results)), strict=True):
        for index, (part, then) in enumerate(zip(claim.parts, unranked.parts, strict=True)):
            rows.append(
                [
                    claim.says if index == 0 else "",
                    f"**{claim.verdict}**" if index == 0 else "",
                    part.measure,
                    part.control or NONE,
                    " ".join(f"{value:.2f}" for value in part.values),
                    f"{part.interval:.2f}",
                    part.range,
                    part.verdict,
                    then.verdict if then.values != part.values else "the same",
                ]
            )
    return _markdown(rows, "llllrrrll")


def main_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """The paper's table 2 and ours, side by side; then the rows that only we have."""
    provided = results["provided"]
    data = {"Good responses": ("the story's own", "own"), "Bad responses": ("the other model's", "foreign")}
    rows = [["rho", "setting", *_HEAD]]
    for row in paper["tables"]["2_hh"]:
        if row["rho"] in data:
            title, key = data[row["rho"]]
            ours = [title, *_mean_and_seeds(provided[key]), *[NONE] * 3]
        else:
            ours = _ours(row.get("row"), results)
        rows.append([row["rho"], row["setting"] or NONE, *_theirs(row), *ours])
    rows += [[NONE, NONE, NONE, NONE, *_ours(name, results)] for name in ("p", "bp", "d")]
    return _markdown(rows, "llrrlrrrrr")


def settings_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Table 6: what the candidates are worth, and what is learnt from them, in the paper and here."""
    head = ["rho", "setting", "paper: mean", "std", "max", "reward", "perplexity", "share of the way"]
    rows = [[*head, "here: mean", "std", "max", "reward", "share of the way"]]
    for row in paper["tables"]["6_sampling"]:
        way = NONE if row["max"] is None else f"{(row['reward'] - row['mean']) / (row['max'] - row['mean']):.2f}"
        theirs = [*(_number(row[key]) for key in ("mean", "std", "max", "reward", "perplexity")), way]
        rows.append([row["rho"], row["setting"], *theirs, *_candidates_of(row.get("row"), results)])
    sp = _candidates_of("sp", results)
    return _markdown([*rows, [NONE, "SP", *[NONE] * 6, *sp]], "ll" + "r" * 11)


def _candidates_of(name: str | None, results: dict[str, Any]) -> list[str]:
    if name not in results["rows"]:
        return [NONE] * 5
    learned = _spread(results["rows"][name]["reward"])
    if name not in results["candidates"]:
        return [NONE, NONE, NONE, learned, NONE]
    own = results["candidates"][name]
    means = [_mean(own[key]) for key in ("mean", "std", "mean_of_max")]
    return [*means, learned, _spread(share_of_the_way(results, name, name), 2)]


def losses_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Ablations and variants of the loss, all on DP's data; table 7 beside the two that it has."""
    rows = [["paper's row", *_HEAD]]
    rows += [
        [f"{row['rho']} {row['setting']}", *_theirs(row), *_ours(row["row"], results)]
        for row in paper["tables"]["7_without_rank"]
    ]
    rows += [[NONE] * 3 + _ours(name, results) for name in ("without_ft", "variant_paper", "variant_released")]
    return _markdown(rows, "lrrlrrrrr")


def variants_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Which arithmetic the paper's own figures look like: how much of RRHF's gain L_rank adds to fine-tuning alone."""
    rows = results["rows"]
    theirs = {row["setting"]: row["reward"] for row in paper["tables"]["7_without_rank"]}
    base = next(row["reward"] for row in paper["tables"]["2_hh"] if row.get("row") == "base")
    ranked, alone = theirs["BP"], theirs["BP without L_rank"]
    shown = [["loss", "reward that L_rank adds", "of the whole gain over the base", "perplexity, times the base's"]]
    shown.append(["the paper, BP", f"{ranked - alone:.2f}", f"{(ranked - alone) / (ranked - base):.0%}", "1.00"])
    for name in ("variant_paper", "dp", "variant_released"):
        ours = zip(*(rows[one]["reward"] for one in (name, "without_rank", "base")), strict=True)
        added = [(reward - without, reward - start) for reward, without, start in ours]
        times = [own / start for own, start in zip(rows[name]["perplexity"], rows["base"]["perplexity"], strict=True)]
        share = _percent([gain / whole for gain, whole in added])
        shown.append([TITLES[name], _spread([gain for gain, _ in added]), share, _mean(times)])
    return _markdown(shown, "lrrr")


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
    return _of_table_6(("base", "ip_1", "ip_2", "ip_3"), results, paper)


def online_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """OP-k with and without KL."""
    return _of_table_6(("base", "dp", "op_8", "op_8_kl"), results, paper)


def _of_table_6(names: Sequence[str], results: dict[str, Any], paper: dict[str, Any]) -> str:
    known = {row["row"]: row for row in paper["tables"]["2_hh"] + paper["tables"]["6_sampling"] if "row" in row}
    rows = [["paper's row", *_HEAD]]
    for name in names:
        title = f"{known[name]['rho']} {known[name]['setting'] or ''}".strip()
        rows.append([title, *_theirs(known[name]), *_ours(name, results)])
    return _markdown(rows, "lrrlrrrrr")


def reward_model_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Table 5: shares of pairs that policies order right."""
    rows = [["paper's row", "paper", "here", "pairs ordered right", "by seed"]]
    shown = set()
    for row in paper["tables"]["5_reward_model_accuracy"]:
        ours = _accuracy(row["row"], results) if "row" in row else [NONE] * 3
        if row["model"].endswith("gptj-rm-static"):
            ours = ["the reward model itself", "100%, by definition", NONE]
        rows.append([row["model"], f"{row['accuracy']:.2f}%", *ours])
        shown.add(row.get("row"))
    names = ("sft", "without_rank", "ip_3", "op_8", "op_8_kl")
    rows += [[NONE, NONE, *_accuracy(name, results)] for name in names if name not in shown]
    return _markdown(rows, "lrlrr")


def _accuracy(name: str, results: dict[str, Any]) -> list[str]:
    values = results["rows"][name]["pair_accuracy"]
    return [f"p_i of {TITLES[name]}", _percent(values), " ".join(f"{100 * value:.1f}" for value in values)]


def imdb_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """The appendix on IMDB, which this run is modelled on."""
    rows = [["paper's row", *_HEAD]]
    for row in paper["tables"]["imdb"]:
        title = row["method"] + (f", {row['setting']}" if row["setting"] else "")
        rows.append([title, *_theirs(row, 3), *_ours(row.get("row"), results)])
    return _markdown(rows, "lrrlrrrrr")


def people_part(results: dict[str, Any], paper: dict[str, Any]) -> str:
    """Tables 3 and 8 and Wombat's: people, samples, another judge. Nothing of them is repeated here."""
    tables, protocol = paper["tables"], paper["human_protocol"]
    people = [["people compare", "with", "win", "tie", "lose"]]
    people += [[row["a"], row["b"], *(str(row[key]) for key in ("win", "tie", "lose"))] for row in tables["3_people"]]
    judged = [["ChatGPT judges", "score", "score", "of"]]
    judged += [[row["a"], str(row["score_a"]), str(row["score_b"]), row["b"]] for row in tables["wombat"]]
    samples = [["method", "samples in training", "at inference"]]
    samples += [[row["method"], row["training"] or NONE, row["inference"]] for row in tables["8_samples_per_query"]]
    said = (
        f"{protocol['comparisons']} pairs were compared, {protocol['pairs_per_worker']} by each worker; of those that "
        f"several saw, {protocol['same_annotation']}% have the same annotation and {protocol['no_contradiction']}% no "
        "contradiction."
    )
    return "\n\n".join([_markdown(people, "llrrr"), said, _markdown(judged, "lrrl"), _markdown(samples, "lrr")])


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
    "variants": variants_part,
    "sweep": sweep_part,
    "iterations": iterations_part,
    "online": online_part,
    "reward model": reward_model_part,
    "imdb": imdb_part,
    "people": people_part,
    "seconds": seconds_part,
}


# ---- Cells ----


#: The paper's two figures, then those of `_ours`.
_HEAD = (
    *("paper: reward", "paper: perplexity"),
    *("here", "reward", "by seed", "perplexity", "distinct-2", "tokens"),
)


def _theirs(row: dict[str, Any], digits: int = 2) -> list[str]:
    return [_number(row["reward"], digits), _number(row["perplexity"], digits)]


def _ours(name: str | None, results: dict[str, Any]) -> list[str]:
    """Title and numbers of one of our rows; dashes where there is none."""
    if name not in results["rows"]:
        return [NONE] * 6
    row = results["rows"][name]
    further = [_mean(row[key], digits) if key in row else NONE for key, digits in (("distinct_2", 2), ("tokens", 0))]
    return [TITLES[name], *_mean_and_seeds(row["reward"]), _range(row["perplexity"]), *further]


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{interval_of(values).mean:.{digits}f}"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half of the 95% interval over seeds."""
    estimate = interval_of(values)
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


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


def _markdown(rows: Table, align: str) -> str:
    rule = ["---" if side == "l" else "---:" for side in align]
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    assert all(line.count(" | ") == len(align) - 1 for line in lines), "a row of another width"
    return "\n".join(lines)
