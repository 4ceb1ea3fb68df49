"""The run folder: what is written where, what may be continued, and what a run may be continued from.

recipe.yaml        the resolved recipe        data_report.json   what the data was
metrics.jsonl      one line per log           run.json           what else decides the weights: base, processes
checkpoint-N/      to resume from             README.md          the adapter's card
adapter_model.safetensors, tokenizer files ...

Reads without torch, so that a report of runs is there at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rrhf_peft.files import REPORT, remove, replace_text
from rrhf_peft.records import UserError

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe

RECIPE, DATA_REPORT, METRICS, CIRCUMSTANCES = "recipe.yaml", "data_report.json", "metrics.jsonl", "run.json"
#: In a checkpoint, beside what transformers puts there: the sums behind the metrics (`RRHFTrainer`).
TOTALS = "totals.json"

#: What training writes into its folder. A file of another name is a user's and keeps the folder from being replaced.
WRITES = (
    *(
        RECIPE,
        DATA_REPORT,
        METRICS,
        CIRCUMSTANCES,
        REPORT,
        "README.md",
        "checkpoint-[0-9]*/*",
    ),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json", "generation_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "training_args.bin"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "chat_template*", "additional_chat_templates/*.jinja"),
    *("trainer_state.json", "modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *("reference_log_probs.safetensors", "online/step-[0-9]*.jsonl", "runs/*events.out.tfevents*", "*.tmp", ".tmp*"),
)

#: Settings that may change between a run and its resumption: they do not touch the weights.
HARMLESS_PREFIXES = ("training.logging", "training.report_to", "training.save", "training.eval", "training.run_name")
HARMLESS_KEYS = frozenset({"training.output_dir", "training.disable_tqdm", "training.dataloader_num_workers"})


@dataclass(frozen=True)
class Circumstances:
    """What a run's weights depend on beside its recipe and its data.

    Attributes:
        processes: of the launch.
        groups_per_step: groups in one optimizer step, over all processes.
        base: fingerprint of the base model's weights; None where it is not known.
        init_adapter: the same of the adapter that is trained further.
    """

    processes: int
    groups_per_step: int
    base: str | None
    init_adapter: str | None


# ---- Reading what a run has left ----


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last one without its line break was cut by a kill, or is being written.

    Raises:
        UserError: it cannot be read, or a line is damaged; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []  # ended before its first log
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Restore the file.") from None
    logs = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = entry["step"] if isinstance(entry, dict) else None
        except (ValueError, KeyError, RecursionError):
            step = None
        if not isinstance(step, (int, float)) or isinstance(step, bool) or not math.isfinite(step):
            raise UserError(
                f"{path}, line {number}: this is not the log of a step (a JSON object with the key step). "
                "Fix or remove the line."
            )
        logs.append(entry)
    return logs


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object out of a run's file.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the run's folder.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is not JSON ({error}). Restore the file, or leave this run out.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: this is not a JSON object. Restore the file, or leave this run out.")
    return values


def read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """A run's resolved recipe, as text and as values.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # What is written there has no aliases, which can stand for more values than any memory holds.
        has_aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        recipe = None if has_aliases else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read as a recipe ({reason}). Restore the file, or leave this run out."
        ) from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: this is not a recipe. Restore the file, or leave this run out.")
    return text, recipe


# ---- What has changed ----


def describe_run(folder: Path, recipe: Recipe, reports: dict[str, Any], circumstances: Circumstances) -> None:
    """Write the snapshot of the recipe, of the data and of what else decides the weights."""
    from rrhf_peft.recipe import recipe_text

    replace_text(folder / CIRCUMSTANCES, json.dumps(asdict(circumstances), indent=2) + "\n")
    replace_text(folder / DATA_REPORT, json.dumps(reports, indent=2, ensure_ascii=False) + "\n")
    replace_text(folder / RECIPE, recipe_text(recipe))


def recipe_changes(folder: Path, recipe: Recipe) -> list[str]:
    """What the recipe says otherwise than that of the run in the folder did; nothing where no run has begun there.

    Raises:
        UserError: the run's recipe is damaged.
    """
    from rrhf_peft.recipe import recipe_text

    if not (folder / RECIPE).is_file():
        return []
    then = dict(flat_items(read_recipe(folder / RECIPE)[1]))
    now = dict(flat_items(yaml.safe_load(recipe_text(recipe))))
    return [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key not in HARMLESS_KEYS and not key.startswith(HARMLESS_PREFIXES)
    ]


def input_changes(folder: Path, data_fingerprint: str, now: Circumstances, *, processes: bool = True) -> list[str]:
    """What a run reads otherwise than it did, or with `processes` runs on otherwise, with the same recipe.

    Raises:
        UserError: the run's own description is damaged.
    """
    changes = []
    if (folder / DATA_REPORT).is_file():
        train = read_object(folder / DATA_REPORT).get("train")
        if not isinstance(train, dict) or train.get("fingerprint") != data_fingerprint:
            changes.append("the training data gives other tokens or scores")
    if not (folder / CIRCUMSTANCES).is_file():
        return changes
    then = read_object(folder / CIRCUMSTANCES)
    for key, name in (("base", "the base model has"), ("init_adapter", "the adapter of model.init_adapter has")):
        before, after = then.get(key), getattr(now, key)
        if None not in (before, after) and before != after:
            changes.append(f"{name} other weights than the run began with")
    if processes and then.get("processes") != now.processes:
        changes.append(
            f"the run was on {then.get('processes')} process(es) with {then.get('groups_per_step')} groups per step "
            f"and is on {now.processes} with {now.groups_per_step}"
        )
    return changes


# ---- Checkpoints ----


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next((path for path in _checkpoints(folder) if damage(path) is None), None)


def checkpoint_to_resume(folder: Path, *, weights_suffice: bool = False) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None to start from the beginning; and what was passed over, in words.

    Args:
        folder: the run folder.
        weights_suffice: a checkpoint without optimizer, scheduler or random states counts as whole.

    Raises:
        UserError: checkpoints were written, and none of them is whole.
    """
    passed: list[str] = []
    was_whole: list[str] = []
    for path in _checkpoints(folder):
        problem = damage(path, weights_suffice=weights_suffice)
        if problem is None:
            return path, passed
        passed.append(f"{path.name} is not whole ({problem})")
        if (path / "trainer_state.json").is_file():  # written last: it was whole once
            was_whole.append(path.name)
    if not was_whole:
        return None, passed
    raise UserError(
        f"{folder}: no checkpoint is left that this run could be continued from as if nothing had happened: "
        f"{'; '.join(passed)}. Put the files back; or remove what is damaged of {was_whole[0]} and pass "
        "--ignore-changes to go on from its weights with a new optimizer; or pass --overwrite to start anew."
    )


def remove_unfinished(folder: Path, checkpoint: Path | None) -> None:
    """Clear what a kill left, before a run continues from `checkpoint`, or begins again with None.

    Checkpoints that are newer, or not whole, would be taken for whole ones when transformers removes old ones; and
    weights in the middle of being written are of no use to anybody.
    """
    for path in _checkpoints(folder):
        if checkpoint is None or _step(path) > _step(checkpoint) or damage(path, weights_suffice=True) is not None:
            remove(path)
    for pattern in ("*.tmp", ".tmp*"):
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()


def damage(checkpoint: Path, *, weights_suffice: bool = False) -> str | None:
    """Why a checkpoint cannot be continued from: the first file that is missing or cut short. None if it is whole.

    The trainer's state is written last, after every process's share.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("global_step") != _step(checkpoint):
            return "trainer_state.json is of another step"
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, RecursionError):
        return "trainer_state.json is damaged"
    if (checkpoint / TOTALS).is_file() and not _is_object(checkpoint / TOTALS):
        return f"{TOTALS} is damaged"
    if any(checkpoint.glob("global_step*")) or any(checkpoint.glob("pytorch_model_fsdp*")):
        return None  # DeepSpeed's and FSDP's formats, which check themselves
    if problem := weights_damage(checkpoint):
        return problem
    count = len(list(checkpoint.glob("rng_state_*.pth")))
    random = [f"rng_state_{process}.pth" for process in range(count)] or ["rng_state.pth"]
    for name in ("optimizer.pt", "scheduler.pt", *random, "scaler.pt"):
        path = checkpoint / name
        if not path.is_file():
            if not weights_suffice and name != "scaler.pt":
                return f"{name} is missing"
        elif not _is_whole_archive(path):
            return f"{name} is damaged"
    return None


def weights_damage(folder: Path) -> str | None:
    """Why the adapter or model of a run or a checkpoint is not whole; None if it is."""
    weights = sorted([*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")])
    damaged = [path.name for path in weights if not _is_whole_safetensors(path)]
    if not weights:
        return "its weights are missing"
    return f"{damaged[0]} is damaged" if damaged else None


def _checkpoints(folder: Path) -> list[Path]:
    """All of them, the newest first."""
    numbered = (path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal())
    return sorted(numbered, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_object(path: Path) -> bool:
    with contextlib.suppress(UserError):
        return bool(read_object(path))
    return False


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the header can be read and the file is as long as it says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(length)) if length <= size - 8 else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return bool(header) and 8 + length + max(ends, default=0) == size


def _is_whole_archive(path: Path) -> bool:
    """Whether every part of what `torch.save` wrote has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return False


def flat_items(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of everything that a recipe sets."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat_items(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


# ---- The adapter's card ----

_CURVE = ("rewards/mean", "kl/response", "loss", "rank_loss", "sft_loss", "pair_accuracy", "best_hit_rate")


def write_model_card(folder: Path, recipe: Recipe, report: Any, history: list[dict[str, Any]]) -> None:
    """Write README.md with Hugging Face metadata: what was trained, on what, how it went, and how to use it.

    Args:
        folder: the run folder.
        recipe: what was run.
        report: of the training data, or of the prompts of online training.
        history: `TrainerState.log_history`.
    """
    from rrhf_peft import __version__
    from rrhf_peft.modeling.model_card import model_card
    from rrhf_peft.recipe import recipe_text

    library = "transformers" if recipe.adapter is None and not recipe.model.init_adapter else "peft"
    intro = (
        f"`{recipe.model.name}` aligned with ranked responses by the `{recipe.objective.name}` objective, "
        f"with rrhf-peft {__version__}. {_of_objective(recipe)}"
    )
    after = "The curve is in `metrics.jsonl`, the data report in `data_report.json`. Standalone weights:"
    merge = f"```sh\nrrhf-peft merge {folder} --output {folder}-merged\n```"
    sections = {
        "Data": "\n".join(_data_lines(report)),
        "Training": f"{_curve_table(history)}\n\n{after}\n\n{merge}",
        "Recipe": f"```yaml\n{recipe_text(recipe).rstrip()}\n```",
    }
    tags = [recipe.objective.name, "ranked-responses"]
    card = model_card(folder.name, intro, sections, base=recipe.model.name, library=library, tags=tags)
    replace_text(folder / "README.md", card)


def _of_objective(recipe: Recipe) -> str:
    """The first line that its section of the recipe says of itself: name, paper, equation."""
    return str(type(recipe.objective).__doc__).splitlines()[0]


def _data_lines(report: Any) -> list[str]:
    """What a reader of the card asks first; the paper expects the policy's reward to approach the mean of max."""
    if not hasattr(report, "k_histogram"):  # a `PromptReport`
        return [
            f"- {report.prompts_kept:,} prompts, answered by the policy itself while it was trained",
            f"- {report.provided_responses:,} responses that came with them, ranked together with its own",
        ]
    most, least = max(report.k_histogram), min(report.k_histogram)
    return [
        f"- {report.groups_kept:,} groups, {report.responses_kept:,} responses "
        f"({least if least == most else f'{least} to {most}'} per group)",
        f"- scores: mean {report.score_mean:.3f}, mean of each group's maximum {report.score_mean_of_max:.3f}, "
        f"{report.tie_rate:.0%} of pairs tied",
        f"- sources: {', '.join(list(report.sources)[:12])}{' ...' if len(report.sources) > 12 else ''}",
    ]


def _curve_table(history: list[dict[str, Any]]) -> str:
    """First and last tenth of the steps, averaged: single steps are noise."""
    from rrhf_peft.modeling.model_card import markdown_table

    if not any("loss" in entry for entry in history):
        return "No step was logged."
    rows = []
    for name in _CURVE:
        values = [entry[name] for entry in history if name in entry]
        tenth = max(1, len(values) // 10)
        first, last = values[:tenth], values[-tenth:]
        if values:
            rows.append((name, f"{sum(first) / len(first):.4f}", f"{sum(last) / len(last):.4f}"))
    return markdown_table(("", "first steps", "last steps"), rows)
