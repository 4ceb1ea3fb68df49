"""The folder of an evaluation: what is written where, what it was made with, and whether it may be continued.

samples/POLICY.jsonl           all responses            scored/POLICY.LABEL.jsonl    their rewards
perplexity/POLICY.jsonl        under the judge model    references/POLICY.jsonl      under the policy
pairs/POLICY.jsonl             its p_i                  wins/POLICY.jsonl            the judge's verdicts
made_with.json                 the settings behind each of these files
evaluation.json, table.md, recipe.yaml, plots/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrhf_peft.files import replace_text
from rrhf_peft.records import UserError

EVALUATION, TABLE, RECIPE, PLOTS, MADE_WITH = "evaluation.json", "table.md", "recipe.yaml", "plots", "made_with.json"
STAGES = ("samples", "scored", "perplexity", "references", "pairs", "wins")


class OutputFolder:
    """One evaluation's folder.

    Args:
        path: the folder; need not be there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, stage: str, policy: str, label: str | None = None) -> Path:
        """The file of one policy in one stage."""
        assert stage in STAGES, stage
        return self.path / stage / f"{policy}{'' if label is None else f'.{label}'}.jsonl"

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Start or continue; the main process calls it before anything is written.

        Args:
            settings: file relative to the folder -> JSON values that it depends on. `evaluation.json` may be
                made again with others, because it is made from the other files.
            overwrite: remove what an earlier evaluation made.

        Raises:
            UserError: the folder is something else's, the evaluation is finished, or a file that is there was
                made with other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: evaluation.output is a file. Name a folder.")
        record = self.path / MADE_WITH
        if self.path.is_dir() and any(self.path.iterdir()) and not record.is_file():
            raise UserError(f"{self.path}: evaluation.output holds other files. Choose another folder, or empty it.")
        if overwrite:
            self._remove()
        made: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        for file, wanted in settings.items():
            then = made.get(file)
            if file == EVALUATION or then is None or then == wanted or not self._is_begun(file):
                continue
            changes = _changes(then, wanted)
            raise UserError(
                f"{self.path / file}: was made with other settings ({'; '.join(changes)}). Undo the change, choose "
                "another evaluation.output or another name, or pass --overwrite to evaluate everything again."
            )
        if made.get(EVALUATION) == settings[EVALUATION] and (self.path / TABLE).is_file():
            raise UserError(
                f"{self.path / EVALUATION}: is there already, made with these settings. Read {self.path / TABLE}, "
                "choose another evaluation.output, or pass --overwrite to evaluate everything again."
            )
        if made.get(EVALUATION) != settings[EVALUATION]:  # what other settings led to must not pass for this one's
            (self.path / EVALUATION).unlink(missing_ok=True)
            (self.path / TABLE).unlink(missing_ok=True)
        replace_text(record, json.dumps({**made, **settings}, indent=1, ensure_ascii=False) + "\n")

    def recorded(self) -> dict[str, Any]:
        """File -> the settings that it is made with."""
        found: dict[str, Any] = json.loads((self.path / MADE_WITH).read_text(encoding="utf-8"))
        return found

    def _is_begun(self, file: str) -> bool:
        path = self.path / file
        return any(other.exists() for other in (path, *(Path(f"{path}.{more}") for more in ("parts", "stages"))))

    def _remove(self) -> None:
        for stage in (*STAGES, PLOTS):
            shutil.rmtree(self.path / stage, ignore_errors=True)
        for file in (EVALUATION, TABLE, RECIPE, MADE_WITH):
            (self.path / file).unlink(missing_ok=True)


def is_finished(path: Path) -> bool:
    """Whether a file is written and nothing is left that made it; a kill may come between the two."""
    return path.exists() and not any(Path(f"{path}.{more}").exists() for more in ("parts", "stages"))


def _changes(then: Any, now: Any, key: str = "") -> list[str]:
    """What differs, key by key."""
    if isinstance(then, dict) and isinstance(now, dict):
        inner = (_changes(then.get(name), now.get(name), f"{key}.{name}" if key else name) for name in {**then, **now})
        return [change for own in inner for change in own]
    if then == now:
        return []
    if key.endswith("_sha256"):
        return [f"{key.removesuffix('_sha256').replace('_', ' ')} has another content"]
    return [f"{key} was {json.dumps(then, ensure_ascii=False)} and is {json.dumps(now, ensure_ascii=False)}"]
