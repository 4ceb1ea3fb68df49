"""The run's numbers, one for each seed: from the folders of finished rows to `results.json`.

Left to others: what they mean (`reproduce_claims`), how they are shown (`reproduce_document`, `reproduce_figures`).
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reproduce_rows import ROWS
from reproduce_work import Setup

from rrhf_peft.evaluate.numbers import read_evaluation
from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

SCORER = "vader"
#: Rows that train on candidates of their own, whose mean of max the learned reward is compared with.
CANDIDATES = {"bp": "bp", "sp": "sp", "dp": "dp", "d": "d", "p": "provided"}
ONLINE = ("op_8", "op_8_kl")
ROUNDS = 3
DIGITS = 4


def collect_results(setup: Setup, seeds: Sequence[int], prompts: Mapping[str, int], hardware: str) -> dict[str, Any]:
    """Everything that the document says of a run; lists have one entry for each seed, in order.

    Raises:
        UserError: a row is not finished, or its recipe was changed since.
    """
    evaluations = {
        name: [_evaluation(folder, policy) for folder in folders]
        for name, folders, policy in _evaluation_folders(setup, seeds)
    }
    rows = {
        name: {key: _rounded([own[key] for own in found]) for key in found[0]} for name, found in evaluations.items()
    }
    best = [best_of_4(setup.folder(seed, "best_of_4") / "evaluation") for seed in seeds]
    rows["best_of_4"] = {key: _rounded([own[key] for own in best]) for key in best[0]}
    return {
        "seeds": list(seeds),
        "prompts": dict(prompts),
        "hardware": hardware,
        "seconds": {name: [_seconds(setup, name, seed) for seed in seeds] for name in ROWS},
        "rows": rows,
        "candidates": {
            name: _by_key([_candidates(setup.folder(seed, source) / "scored.jsonl") for seed in seeds])
            for name, source in CANDIDATES.items()
        },
        "provided": _by_key([_sources(setup.folder(seed, "provided") / "scored.jsonl") for seed in seeds]),
        "online": {name: [_refreshes(setup.folder(seed, name) / "run") for seed in seeds] for name in ONLINE},
    }


def _seconds(setup: Setup, name: str, seed: int) -> float:
    """The processor's seconds for all verbs of a row together.

    Raises:
        UserError: the row is not finished, or its recipe was changed since.
    """
    done = setup.done(ROWS[name], seed)
    if done is None:
        raise UserError(f"row {name}, seed {seed}: its recipe was changed while it ran. Run the same command again.")
    return float(done["processor_seconds"])


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, one line for each list."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    replace_text(path, text + "\n")


def machine() -> str:
    """The processor and how many cores of it there are."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not say
    return f"{os.cpu_count()} cores ({name})"


def _evaluation_folders(setup: Setup, seeds: Sequence[int]) -> list[tuple[str, list[Path], str]]:
    """Row in the tables, its evaluation's folder by seed, and the policy's name in it."""
    trained = [name for name in ROWS if name not in ("provided", "pairs", "best_of_4", "ip")]
    found = [(name, [setup.folder(seed, name) / "evaluation" for seed in seeds], name) for name in trained]
    for number in range(1, ROUNDS + 1):
        policy = f"round-{number}"
        folders = [setup.folder(seed, "ip") / "rounds" / policy / "evaluation" for seed in seeds]
        found.append((f"ip_{number}", folders, policy))
    return found


def _evaluation(folder: Path, policy: str) -> dict[str, float]:
    """The numbers of one policy."""
    numbers: Any = read_evaluation(folder).numbers.policies[policy]
    return {
        "reward": numbers.rewards[SCORER].mean,
        "perplexity": numbers.perplexity,
        "pair_accuracy": numbers.preference.pair_accuracy.mean,
        "distinct_2": numbers.distinct_2,
        "tokens": numbers.tokens,
    }


def best_of_4(folder: Path) -> dict[str, float]:
    """The best of the base's four answers to each prompt: its reward, and its perplexity."""
    rewards, total, tokens = [], 0.0, 0
    scored = {row["meta"]["prompt_index"]: row for row in _rows(folder / "scored" / f"best_of_4.{SCORER}.jsonl")}
    judged = _rows(folder / "perplexity" / "best_of_4.jsonl")
    samples = _rows(folder / "samples" / "best_of_4.jsonl")
    for sample, judgement in zip(samples, judged, strict=True):
        row = scored[sample["meta"]["prompt_index"]]
        best = max(range(len(row["scores"])), key=row["scores"].__getitem__)
        rewards.append(row["scores"][best])
        log_prob = judgement["log_probs"][sample["responses"].index(row["responses"][best])]
        if log_prob is not None:  # no text, no perplexity
            total, tokens = total + log_prob[0], tokens + log_prob[1]
    return {"reward": math.fsum(rewards) / len(rewards), "perplexity": math.exp(-total / tokens)}


def _candidates(path: Path) -> dict[str, float]:
    """Of a training file: mean and standard deviation of its scores, and the mean of its groups' maximum."""
    groups = [row["scores"] for row in _rows(path)]
    flat = [score for scores in groups for score in scores]
    mean = math.fsum(flat) / len(flat)
    return {
        "mean": mean,
        "std": math.sqrt(math.fsum((score - mean) ** 2 for score in flat) / len(flat)),
        "mean_of_max": math.fsum(max(scores) for scores in groups) / len(groups),
    }


def _sources(path: Path) -> dict[str, float]:
    """Mean score of each source."""
    scores: dict[str, list[float]] = {}
    for row in _rows(path):
        for source, score in zip(row["sources"], row["scores"], strict=True):
            scores.setdefault(source, []).append(score)
    return {source: math.fsum(own) / len(own) for source, own in scores.items()}


def _refreshes(run: Path) -> dict[str, list[float]]:
    """What online training logged each time the policy answered anew."""
    found = [row for row in _rows(run / "metrics.jsonl") if "refresh" in row]
    keys = {"step": "refresh", "reward": "rewards/mean", "kl": "kl/token"}
    return {name: _rounded([row[key] for row in found]) for name, key in keys.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _by_key(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: _rounded([own[key] for own in found]) for key in found[0]}


def _rounded(values: Sequence[float]) -> list[float]:
    """Four digits after the point, or four in all: enough for every table, and easy to compare."""
    return [round(value, DIGITS) if abs(value) < 1000 else float(f"{value:.{DIGITS}g}") for value in values]
