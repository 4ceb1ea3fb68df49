"""The folder of an evaluation: what is written where, and what it was made with.

samples/POLICY.jsonl           all responses            scored/POLICY.LABEL.jsonl    their rewards
perplexity/POLICY.jsonl        under the judge model    references/POLICY.jsonl      under the policy
pairs/POLICY.jsonl             its p_i                  wins/POLICY.jsonl            the judge's verdicts
made_with.json                 the settings behind each of these files
evaluation.json, table.md, recipe.yaml, plots/
"""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rrhf_peft.evaluate.numbers import EVALUATION
from rrhf_peft.files import REPORT, BegunFolder, begun_folder, check_output, is_empty_folder, read_mark, replace_text
from rrhf_peft.records import UserError

TABLE, RECIPE, PLOTS, MADE_WITH = "table.md", "recipe.yaml", "plots", "made_with.json"
PLOT_NAMES = ("reward", "reward_perplexity", "best_of_n", "reward_histogram", "wins")
STAGES = ("samples", "scored", "perplexity", "references", "pairs", "wins")
#: What an evaluation writes in its folder, beside the files of its stages.
_WRITES = [EVALUATION, TABLE, RECIPE, MADE_WITH, REPORT, *(f"{PLOTS}/{name}.[ps][nv]g" for name in PLOT_NAMES)]


def file_name(stage: str, policy: str, label: str | None = None) -> str:
    """The file of one policy in one stage, relative to the folder."""
    assert stage in STAGES, stage
    return f"{stage}/{policy}{'' if label is None else f'.{label}'}.jsonl"


class OutputFolder:
    """One evaluation's folder.

    Args:
        path: the folder; need not be there.
        settings: file relative to the folder -> JSON values that it depends on. `evaluation.json` may be made again
            with others, because it is made from the other files.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = Path(path), settings
        self._begun: BegunFolder | None = None
        self._rows: dict[Path, list[dict[str, Any]]] = {}

    def file(self, stage: str, policy: str, label: str | None = None) -> Path:
        """The file of one policy in one stage."""
        return self.path / file_name(stage, policy, label)

    def open(self, *, reads: Iterable[str | Path], overwrite: bool, end: contextlib.ExitStack) -> bool:
        """Start or continue; the main process calls it before anything is written, and holds the folder's lock.

        Args:
            reads: files and folders that the evaluation reads.
            overwrite: start from nothing; what an earlier evaluation made comes back if this one fails early.
            end: entered with the folder, left when the evaluation is over.

        Returns:
            Whether the same evaluation was finished before.

        Raises:
            UserError: the folder is something else's, or a file that is there was made with other settings.
        """
        record, settings = self.path / MADE_WITH, self.settings
        check_output(
            self.path, key="evaluation.output", folder=True, reads=reads, overwrite=overwrite, continues=not overwrite
        )
        is_empty = not self.path.is_dir() or is_empty_folder(self.path)
        if not is_empty and read_mark(self.path) is None and not record.is_file():
            raise UserError(f"{self.path}: evaluation.output holds other files. Choose another folder, or empty it.")
        made = {} if overwrite else self._recorded()
        for file, wanted in settings.items():
            then = made.get(file)
            if file == EVALUATION or then is None or then == wanted or not self._is_begun(file):
                continue
            raise UserError(
                f"{self.path / file}: was made with other settings ({'; '.join(_changes(then, wanted))}). Undo the "
                "change, choose another evaluation.output or another name, or pass --overwrite to evaluate everything "
                "again."
            )
        files = (file.removesuffix(".jsonl") for file in {**made, **settings} if file != EVALUATION)
        writes = [*_WRITES, *(f"{glob.escape(file)}.*" for file in files)]
        self._begun = end.enter_context(
            begun_folder(self.path, verb="evaluate", writes=writes, overwrite=overwrite, resume=not overwrite)
        )
        if made.get(EVALUATION) == settings[EVALUATION] and (self.path / TABLE).is_file():
            return True
        if made.get(EVALUATION) != settings[EVALUATION]:  # what other settings led to must not pass for this one's
            (self.path / TABLE).unlink(missing_ok=True)
            (self.path / EVALUATION).unlink(missing_ok=True)
        replace_text(record, json.dumps({**made, **settings}, indent=1, ensure_ascii=False) + "\n")
        return False

    def keep(self) -> None:
        """There is something now that is worth more than the evaluation that this one replaces."""
        if self._begun is not None:
            self._begun.keep()

    def rows(self, stage: str, policy: str, label: str | None = None) -> list[dict[str, Any]]:
        """The rows of one of the files, which is whole when this is first called for it.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.file(stage, policy, label)
        if path not in self._rows:
            try:
                with path.open(encoding="utf-8") as lines:
                    self._rows[path] = [json.loads(line) for line in lines]
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}). Remove it and run the same command again."
                ) from None
        return self._rows[path]

    def _recorded(self) -> dict[str, Any]:
        record = self.path / MADE_WITH
        if not record.is_file():
            return {}
        try:
            made = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            made = error
        if not isinstance(made, dict):
            raise UserError(
                f"{record}: is damaged ({made!s:.200}), so nothing says what the files beside it were made with. "
                "Choose another evaluation.output, or pass --overwrite to evaluate everything again."
            )
        return made

    def _is_begun(self, file: str) -> bool:
        path = self.path / file
        return any(other.exists() for other in (path, *(Path(f"{path}.{more}") for more in ("parts", "stages"))))


def _changes(then: Any, now: Any, key: str = "") -> list[str]:
    """What differs, key by key."""
    if isinstance(then, dict) and isinstance(now, dict):
        inner = (_changes(then.get(name), now.get(name), f"{key}.{name}" if key else name) for name in {**then, **now})
        return [change for changes in inner for change in changes]
    if then == now:
        return []
    if key.endswith("_sha256"):
        return [f"{key.removesuffix('_sha256')} has another content"]
    return [f"{key} was {json.dumps(then, ensure_ascii=False)} and is {json.dumps(now, ensure_ascii=False)}"]
