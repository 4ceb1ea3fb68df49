"""The maps for newcomers say what is there: the tree in CONTRIBUTING.md, and the way of a batch in docs/."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rrhf_peft"

#: Runs `rrhf-peft train` until the first backward pass, and prints the package's functions as they are first called.
TRACE = """
import os, sys
import torch

calls, seen = [], set()

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and "/rrhf_peft/" in code.co_filename:
        name = code.co_filename.split("/rrhf_peft/")[-1] + "::" + getattr(code, "co_qualname", code.co_name)
        is_class_body = "__qualname__" in code.co_names
        if name not in seen and "<" not in name and not is_class_body:
            seen.add(name)
            calls.append(name)

def stop(*_):
    sys.setprofile(None)
    print("\\n".join(calls), flush=True)
    os._exit(0)

torch.Tensor.backward = stop
from rrhf_peft.cli import app

sys.setprofile(note)
app(["train", sys.argv[1]])
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


def test_the_way_of_a_batch_is_the_one_that_is_gone(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Once {n}", "responses": ["a b c", "d e"], "scores": [1, n % 2]} for n in range(4)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": str(tiny_model_folder)},
        "adapter": {"r": 4},
        "data": {"train": str(tmp_path / "ranked.jsonl"), "max_tokens": 64},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True, "report_to": "none"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", TRACE, str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    calls = [line for line in done.stdout.splitlines() if re.fullmatch(r"[\w/]+\.py::[\w.]+", line)]
    if sys.version_info < (3, 11):  # code objects know their class from 3.11 on
        calls = [call.replace("::__call__", "::GroupCollator.__call__") for call in calls]
    page = (ROOT / "docs" / "from_the_file_to_the_loss.md").read_text(encoding="utf-8")
    way, besides = page.split("What the step opens besides")
    named = [call for row in way.splitlines() if row.startswith("| `") for call in [row.split("`")[1]]]
    assert len(named) > 20
    if sys.version_info >= (3, 11):
        assert [call for call in named if call not in calls] == [], done.stderr[-2000:]
        order = [calls.index(call) for call in named]
        assert order == sorted(order), [
            named[n] for n, (at, after) in enumerate(itertools.pairwise(order)) if at > after
        ]
    opened = {call.split("::")[0] for call in calls}
    told = {call.split("::")[0] for call in named} | set(re.findall(r"`([\w/]+\.py)`", besides))
    assert sorted(name for name in opened if name not in told and not name.startswith("recipe/")) == ["__init__.py"] * (
        "__init__.py" in opened
    )
    assert sorted(told - opened) == []
