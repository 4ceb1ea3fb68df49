"""The maps for newcomers say what is there: the tree in CONTRIBUTING.md, and what the verbs open, in docs/."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reward_folders import llama_classifier
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rrhf_peft"
PAGE = ROOT / "docs" / "from_the_file_to_the_loss.md"

#: How many files of the package a verb may open. The numbers only fall, down to train 22, evaluate 25, others 15.
MOST_FILES = {"train": 30, "sample": 22, "score": 18, "merge": 15, "evaluate": 39}

#: Runs `rrhf-peft VERB ARGUMENTS` for each entry of a file, in a process of its own, and notes the package's functions
#: in the order in which they are first called; training until the first backward pass.
TRACE = """
import json, os, sys, threading, traceback
from pathlib import Path

import datasets, peft, torch, transformers  # once for all verbs: it takes seconds

folder = Path(sys.argv[1])
calls, seen = [], set()


def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and "/rrhf_peft/" in code.co_filename:
        name = code.co_filename.split("/rrhf_peft/")[-1] + "::" + getattr(code, "co_qualname", code.co_name)
        is_class_body = "__qualname__" in code.co_names
        if name not in seen and "<" not in name and not is_class_body and not is_importing(frame):
            seen.add(name)
            calls.append(name)


def is_importing(frame):  # decorators, and tables that a module makes for itself
    while frame is not None:
        if frame.f_code.co_name == "<module>" and "/rrhf_peft/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def stop(verb, status):
    sys.setprofile(None)
    (folder / f"{verb}.calls").write_text("\\n".join(calls))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for verb, arguments in json.loads((folder / "verbs.json").read_text()).items():
    if os.fork() == 0:
        if verb == "train":
            torch.Tensor.backward = lambda *_: stop(verb, 0)
        from rrhf_peft.cli import app

        threading.setprofile(note)
        sys.setprofile(note)
        try:
            app([verb, *arguments])
        except SystemExit as end:
            stop(verb, 0 if end.code in (0, None) else 1)
        except BaseException:
            traceback.print_exc()
            stop(verb, 1)
        stop(verb, 0)
    _, status = os.wait()
    if status:
        sys.exit(f"{verb} ended with {status}")
"""


def test_the_tree_in_contributing_names_every_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(rrhf_peft/.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    named: set[str] = set()
    folder = ""
    for line in tree.group(1).splitlines()[1:]:
        if not line.startswith("    "):  # a new entry: a folder with its files, or files of the package itself
            match = re.match(r"  (\w+/) ", line)
            folder = match.group(1) if match else ""
        named |= {folder + name for name in re.findall(r"[\w]+\.(?:py|html|mplstyle)", line.split("  # ")[0])}
    there = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".html", ".mplstyle")
    }
    there = {name for name in there if not name.endswith(("__init__.py", "__main__.py"))}
    assert sorted(named) == sorted(there)


@pytest.fixture(scope="module")
def calls(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Verb -> the package's functions (`file::function`) that a small run calls, in the order of their first calls."""
    folder = tmp_path_factory.mktemp("verbs")
    base, adapter = str(tiny_model_folder), str(folder / "adapter")
    torch.manual_seed(0)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    policy.save_pretrained(adapter)
    llama_classifier(folder / "reward", tiny_model_folder)
    rows = [{"prompt": f"Once {n}", "responses": ["a b c", "d e"], "scores": [1, n % 2]} for n in range(4)]
    ranked = folder / "ranked.jsonl"
    ranked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, decoding = {"name": base}, {"strategy": "top_p", "k": 2, "max_new_tokens": 4}
    scorer = {"name": "reward_model", "model": str(folder / "reward")}
    sections: dict[str, Any] = {
        "train": {
            "adapter": {"r": 4},
            "data": {"train": str(ranked), "max_tokens": 64},
            "training": {"output_dir": str(folder / "run"), "max_steps": 1, "use_cpu": True, "report_to": "none"},
        },
        "sample": {
            "sampling": {
                "prompts": str(ranked),
                "output": str(folder / "candidates.jsonl"),
                "candidates": [{**decoding, "adapter": adapter}],
            }
        },
        "score": {"scoring": {"input": str(ranked), "output": str(folder / "scored.jsonl"), "scorer": scorer}},
        "evaluate": {
            "evaluation": {
                "output": str(folder / "evaluation"),
                "prompts": str(ranked),
                "pairs": str(ranked),
                "split": "train",
                "policies": {"base": {}, "trained": {"adapter": adapter}},
                "decoding": decoding,
                "scorers": {"reward": scorer},
                "perplexity": {},
                "wins": {"against": "base", "by": "reward"},
            }
        },
    }
    verbs = {"merge": [adapter, "--output", str(folder / "merged"), "--quantization", "none"]}
    for verb, section in sections.items():
        (folder / f"{verb}.yaml").write_text(json.dumps({"model": model, **section}))
        verbs[verb] = [str(folder / f"{verb}.yaml")]
    (folder / "verbs.json").write_text(json.dumps(verbs))
    command = [sys.executable, "-c", TRACE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return {verb: (folder / f"{verb}.calls").read_text().splitlines() for verb in verbs}


@pytest.mark.parametrize("verb", MOST_FILES)
def test_the_page_names_the_files_that_a_verb_opens(verb: str, calls: dict[str, list[str]]) -> None:
    opened = list(dict.fromkeys(call.split("::")[0] for call in calls[verb]))
    row = re.search(rf"^\| `{verb}` \|.*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert row is not None
    needed = f"| `{verb}` | {len(opened)} | {' '.join(f'`{name}`' for name in opened)} |"
    assert sorted(re.findall(r"`([\w/]+\.py)`", row[0])) == sorted(opened), f"the row should be\n{needed}"
    assert f"| {len(opened)} |" in row[0], f"the row should be\n{needed}"
    assert len(opened) <= MOST_FILES[verb]


def test_the_page_names_the_functions_of_a_training_step_in_their_order(calls: dict[str, list[str]]) -> None:
    called = calls["train"]
    named = [row.split("`")[1] for row in PAGE.read_text(encoding="utf-8").splitlines() if "::" in row.split(" | ")[0]]
    assert len(named) > 20
    if sys.version_info < (3, 11):  # code objects know their class from 3.11 on
        return
    assert [call for call in named if call not in called] == []
    order = [called.index(call) for call in named]
    assert order == sorted(order), [named[n] for n, (at, after) in enumerate(itertools.pairwise(order)) if at > after]
