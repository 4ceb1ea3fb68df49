"""The frontier study: every loss tuned alike on dev, then fresh seeds on test, gold reward compared at matched KL.

    make study MODEL=path/to/TinyStories-656K STORIES=stories.json SENTIMENT=folder

`protocol.yaml` says what is done and by which rules. A unit of work is one training with its measurements; each is
written when it is whole, so that the same command goes on after a kill, and MINUTES=10 works in pieces.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the workers
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))

import yaml
from ppo import PPO, train_ppo
from reproduce_stories import distinct_beginnings, read_stories
from study_measure import Gold, Judge, Policy, distinct_2
from study_report import at_matched_kl, write_report

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

PROTOCOL = Path(__file__).resolve().with_name("protocol.yaml")
#: `--brief`: everything runs, nothing is learnt.
BRIEF = {
    "data": {"train": 12, "dev": 3, "test": 4, "responses": 24, "k": 4, "temperature": 1.0, "max_new_tokens": 6},
    "training": {"epochs": 1, "groups_per_step": 3, "lora_r": 2},
    "losses": ("rrhf", "rank_weight_0", "dpo", "rrhf_ragged", "ppo"),
    "scales": [0.5, 1.0],
    "seeds": [11, 12],
    "resamples": 200,
}


@dataclass(frozen=True)
class Unit:
    """One training and its measurements: a loss with its settings and seed, measured on a split. No loss: the base."""

    loss: str | None
    settings: tuple[tuple[str, Any], ...]
    seed: int
    split: str


@dataclass(frozen=True)
class Study:
    """The protocol with the paths of this machine."""

    protocol: dict[str, Any]
    model: str
    stories: str
    sentiment: Path
    output: Path

    def path(self, unit: Unit) -> Path:
        """Where a unit's record stands, by all that it depends on: another protocol's records are never read."""
        kept = {name: self.protocol[name] for name in ("data", "training", "scales")}
        loss = self.protocol["losses"].get(unit.loss)
        text = json.dumps([kept, loss and {**loss, "grid": None}, unit.settings, unit.seed, unit.split, self.model])
        name = f"{unit.split}-{unit.loss or 'base'}-{unit.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        return self.output / "units" / name

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """What was measured; None where it is still to be done."""
        path = self.path(unit)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def settings(self, loss: str) -> list[tuple[tuple[str, Any], ...]]:
        """The four settings that every loss is tuned over."""
        grid = {"learning_rate": self.protocol["learning_rates"], **self.protocol["losses"][loss]["grid"]}
        return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 0 when the document is written, 3 when the minutes are over."""
    options = _parser().parse_args(arguments)
    protocol = yaml.safe_load(PROTOCOL.read_text(encoding="utf-8"))
    if options.brief:
        protocol = _brief(protocol)
    output = options.output or Path("runs/study-brief" if options.brief else "runs/study")
    study = Study(protocol, options.model, options.stories, options.sentiment, output)
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    try:
        write_data(study)
        tuning = {
            name: [Unit(name, settings, protocol["tuning_seed"], "dev") for settings in study.settings(name)]
            for name in protocol["losses"]
        }
        base = Unit(None, (), protocol["tuning_seed"], "dev")
        if not run_units(study, [base, *itertools.chain(*tuning.values())], options.workers, until):
            return _over()
        chosen = {name: choose(study, base, units) for name, units in tuning.items()}
        test = [Unit(name, settings, seed, "test") for name, settings in chosen.items() for seed in protocol["seeds"]]
        bases = [Unit(None, (), seed, "test") for seed in protocol["seeds"]]
        if not run_units(study, [*bases, *test], options.workers, until):
            return _over()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped. What is finished is kept: the same command goes on from here.", file=sys.stderr)
        return 130
    records = {name: [study.record(unit) for unit in test if unit.loss == name] for name in chosen}
    data = json.loads((output / "data.json").read_text(encoding="utf-8"))
    about = {"settings": {name: dict(settings) for name, settings in chosen.items()}, "gold": data["gold"]}
    write_report(output, protocol, about, [study.record(unit) for unit in bases], records)
    print(f"written: README.md, results.json and gold_against_kl.png in {output}")
    return 0


def _over() -> int:
    print("the minutes are over. What is finished is kept: the same command goes on from here.")
    return 3


def choose(study: Study, base: Unit, units: Sequence[Unit]) -> tuple[tuple[str, Any], ...]:
    """The setting with the highest reward on dev at the matched KL, by the rule of the protocol."""
    rules = study.protocol["rules"]

    def reward(unit: Unit) -> float:
        value, _ = at_matched_kl(study.record(base), study.record(unit), rules["tune_on"], rules["matched_kl"])
        return float(value.mean())

    return max(units, key=reward).settings


# ---- Data: prompts, the base's responses, their rewards ----


def group_sizes(protocol: dict[str, Any], data: int | str) -> list[int]:
    """How many responses of each training prompt a data set takes: about equal tokens, whatever k is."""
    total = protocol["data"]["responses"]
    if data == "ragged":
        return [2] * (total // 4) + [16] * (total // 32 or 1)
    return [int(data)] * (total // int(data))


def write_data(study: Study) -> None:
    """Once: prompts in three splits, the base's responses to them, and how good the gold reward is on its own data."""
    path = study.output / "data.json"
    wanted = {"data": study.protocol["data"], "losses": sorted(study.protocol["losses"]), "model": study.model}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["of"] == wanted:
        return
    sizes = study.protocol["data"]
    counts = [sizes[split] for split in ("train", "dev", "test")]
    rows = list(itertools.islice(distinct_beginnings(read_stories(study.stories)), sum(counts)))
    if len(rows) < sum(counts):
        raise UserError(
            f"{study.stories}: holds {len(rows)} different beginnings, and {sum(counts)} are needed. Give more stories."
        )
    prompts = [row["prompt"] for row in rows]
    train, held_out = prompts[: counts[0]], prompts[counts[0] :]
    data_sets = {loss.get("data", sizes["k"]) for loss in study.protocol["losses"].values()}
    every = [group_sizes(study.protocol, data) for data in data_sets]
    if max(map(len, every)) > counts[0]:
        raise UserError(f"protocol.yaml: data.train: {max(map(len, every))} prompts are needed; raise it.")
    needed = [max((size[i] for size in every if i < len(size)), default=0) for i in range(len(train))]
    policy = Policy(study.model)
    answers = policy.sample([p for p, k in zip(train, needed, strict=True) for _ in range(k)], sizes, seed=0)
    pairs = policy.sample([p for p in held_out for _ in range(4)], sizes, seed=1)
    stories = [f"{row['prompt']}{row['responses'][0]}" for row in rows[: counts[0]]]
    content = {
        "of": wanted,
        "train": [{"prompt": p, **_take(answers, k)} for p, k in zip(train, needed, strict=True)],
        "dev": [{"prompt": p, **_take(pairs, 4)} for p in held_out[: counts[1]]],
        "test": [{"prompt": p, **_take(pairs, 4)} for p in held_out[counts[1] :]],
        "stories": stories,
        "gold": Gold(study.sentiment).accuracy,
    }
    study.output.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content) + "\n")


def _take(answers: list[dict[str, Any]], k: int) -> dict[str, list[Any]]:
    taken = [answers.pop(0) for _ in range(k)]
    return {name: [answer[name] for answer in taken] for name in ("text", "cut")}


# ---- Units ----


def run_units(study: Study, units: Sequence[Unit], workers: int, until: float) -> bool:
    """Do what is not done, in this many processes; False when the time was over before all was done."""
    left = [unit for unit in units if study.record(unit) is None]
    if len(left) < len(units):
        print(f"{len(units) - len(left)} of {len(units)} units are finished already", flush=True)
    if workers == 1:
        for unit in left:
            if time.monotonic() > until:
                return False
            _tell(unit, run_unit(study, unit))
        return True
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting, running = iter(left), dict[Future[Any], Unit]()
        for unit in itertools.islice(waiting, workers):
            running[pool.submit(run_unit, study, unit)] = unit
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                _tell(running.pop(future), future.result())
                if time.monotonic() < until and (unit := next(waiting, None)) is not None:
                    running[pool.submit(run_unit, study, unit)] = unit
        return next(waiting, None) is None


def _tell(unit: Unit, seconds: float) -> None:
    settings = " ".join(f"{name}={value}" for name, value in unit.settings)
    print(f"{unit.split} {unit.loss or 'base'} seed {unit.seed} {settings}: {seconds:.0f} s", flush=True)


def run_unit(study: Study, unit: Unit) -> float:
    """Train, measure at every scale, and write the record; returns seconds."""
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    data = json.loads((study.output / "data.json").read_text(encoding="utf-8"))
    policy = Policy(study.model)
    if unit.loss is not None:
        train(study, unit, policy, data["train"])
    trained = time.monotonic()
    gold, judge = Gold(study.sentiment), Judge(policy.tokenizer, data["stories"])
    sizes, rows = study.protocol["data"], data[unit.split]
    prompts = [row["prompt"] for row in rows]
    points = []
    for scale in study.protocol["scales"] if unit.loss is not None else [0.0]:
        with policy.scaled(scale):
            answers = policy.sample(prompts, sizes, seed=1000 + unit.seed)
            texts = [answer["text"] for answer in answers]
            points.append(
                {
                    "scale": scale,
                    "kl": policy.kl_to_base(answers),
                    "vader": vader_of(texts),
                    "gold": gold.of(texts),
                    "judge_nats": [judge.nats_per_token(answer["ids"]) for answer in answers],
                    "tokens": [len(answer["ids"]) for answer in answers],
                    "distinct_2": distinct_2(texts),
                }
            )
    record = {
        "points": points,
        "pair_accuracy": policy.pair_accuracy(rows, [vader_of(row["text"]) for row in rows]),
        "train_seconds": trained - began,
        "settings": dict(unit.settings),
    }
    path = study.path(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(record) + "\n")
    return time.monotonic() - began


def vader_of(texts: Sequence[str]) -> list[float]:
    """The reward that is trained on."""
    from rrhf_peft.score import vader

    return vader("", list(texts))


def train(study: Study, unit: Unit, policy: Policy, rows: Sequence[dict[str, Any]]) -> None:
    """A new adapter on the base's own scored responses."""
    from rrhf_peft import RankedGroup, RRHFConfig, RRHFTrainer

    loss, training = study.protocol["losses"][unit.loss], study.protocol["training"]
    settings = dict(unit.settings)
    learning_rate = settings.pop("learning_rate")
    sizes = group_sizes(study.protocol, loss.get("data", study.protocol["data"]["k"]))
    groups = [
        RankedGroup(
            row["prompt"],
            row["text"][:k],
            vader_of(row["text"][:k]),
            finish_reasons=["length" if cut else "eos" for cut in row["cut"][:k]],
            index=index,
        )
        for index, (row, k) in enumerate(zip(rows, sizes, strict=False))
    ]
    per_step = training["groups_per_step"] * study.protocol["data"]["k"] * len(sizes) / sum(sizes)
    policy.add_adapter(training["lora_r"], unit.seed)
    if loss["objective"] == "ppo":
        train_by_ppo(study, unit, policy, [group.prompt for group in groups])
        return
    with tempfile.TemporaryDirectory() as folder:
        RRHFTrainer(
            model=policy.model,
            args=RRHFConfig(
                output_dir=folder,
                objective=loss["objective"],
                objective_options={**loss.get("options", {}), **settings},
                learning_rate=learning_rate,
                num_train_epochs=training["epochs"],
                per_device_train_batch_size=max(1, round(per_step)),
                lr_scheduler_type="cosine",
                save_strategy="no",
                logging_steps=1000,
                disable_tqdm=True,
                use_cpu=True,
                seed=unit.seed,
            ),
            train_dataset=groups,
            processing_class=policy.tokenizer,
        ).train()


def train_by_ppo(study: Study, unit: Unit, policy: Policy, prompts: Sequence[Any]) -> None:
    """As many responses as the other losses see, and as many passes over each, but the policy's own."""
    data, training = study.protocol["data"], study.protocol["training"]
    size = training["groups_per_step"]
    batches = [
        [prompt for prompt in prompts[start : start + size] for _ in range(data["k"])]
        for start in range(0, len(prompts), size)
    ]
    settings = PPO(epochs=training["epochs"], **dict(unit.settings))
    train_ppo(policy, batches, vader_of, data, settings, unit.seed)


def _brief(protocol: dict[str, Any]) -> dict[str, Any]:
    """The same protocol, so small that it says nothing."""
    losses = {name: {**protocol["losses"][name]} for name in BRIEF["losses"]}
    for loss in losses.values():
        loss["grid"] = {name: values[:1] for name, values in loss["grid"].items()}
    return {
        **protocol,
        **{name: BRIEF[name] for name in ("data", "training", "scales", "seeds")},
        "losses": losses,
        "rules": {**protocol["rules"], "matched_kl": 1e-4, "resamples": BRIEF["resamples"]},
        "claims": [claim for claim in protocol["claims"] if {claim["one"], claim["control"]} <= set(losses)],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="raincandy-u/TinyStories-656K", help="hub id or folder")
    parser.add_argument("--stories", default="roneneldan/TinyStories", help="JSON list of stories, or hub data set")
    parser.add_argument("--sentiment", type=Path, required=True, help="folder of SST-2: train.tsv and dev.tsv")
    parser.add_argument("--output", type=Path, help="folder of all that is written")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, help="begin no unit after so many")
    parser.add_argument("--brief", action="store_true", help="a few steps of a few losses")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
