"""Whatever happens, a path holds the old content or the new one, never a part."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rrhf_peft.files import replace_text, staged_folder
from rrhf_peft.records import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_text_is_replaced_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    replace_text(path, "first")
    replace_text(path, "zweite ü")
    assert path.read_text(encoding="utf-8") == "zweite ü"
    assert names(path.parent) == {"report.json"}


def test_text_where_nothing_can_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=r"cannot be written .*Choose a writable place"):
        replace_text(tmp_path / "file" / "inside.json", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_text_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        replace_text(tmp_path / "taken", "new")
    assert names(tmp_path) == {"taken"}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with staged_folder(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert names(target) == {"a"}
    assert names(target.parent) == {"model"}


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staged_folder(tmp_path / "model") as staging:
            (staging / "a").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert names(tmp_path) == set()


def test_an_existing_folder_is_refused_untouched_and_an_empty_one_is_not(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with staged_folder(target) as staging:
        (staging / "a").write_text("1")
    with pytest.raises(UserError, match=r"already exists\. .*--overwrite"), staged_folder(target):
        pass
    assert (target / "a").read_text() == "1"


def test_overwrite_replaces_only_when_the_block_ended_well(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(RuntimeError), staged_folder(target, overwrite=True):
        raise RuntimeError
    assert names(target) == {"old"}
    with staged_folder(target, overwrite=True) as staging:
        (staging / "new").write_text("2")
    assert names(target) == {"new"}
    assert names(tmp_path) == {"model"}


def test_a_parent_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="cannot be written"), staged_folder(tmp_path / "file" / "model"):
        pass


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model"
    code = (
        "import os, signal, sys; from rrhf_peft.files import staged_folder\n"
        "with staged_folder(sys.argv[1]) as staging:\n"
        "    (staging / 'half').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert names(tmp_path) == {".model.partial"}
    with staged_folder(target) as staging:
        (staging / "a").write_text("1")
    assert names(target) == {"a"}
    assert names(tmp_path) == {"model"}


def test_a_kill_between_the_two_last_renames_loses_nothing(tmp_path: Path) -> None:
    retired = tmp_path / ".model.retired"
    retired.mkdir()
    (retired / "old").write_text("1")
    with pytest.raises(UserError, match="already exists"), staged_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "old").read_text() == "1"
    retired.mkdir()  # and a leftover beside a whole target is cleared
    with staged_folder(tmp_path / "model", overwrite=True) as staging:
        (staging / "new").write_text("2")
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"new"}
