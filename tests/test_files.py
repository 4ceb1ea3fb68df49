"""Whatever happens, a path holds the old content or the new one, and nobody else's file is touched."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rrhf_peft.files import (
    begun_folder,
    check_output,
    disk_trouble,
    is_finished,
    lock,
    read_mark,
    remove_work_folder,
    replace_text,
    retired_folder,
    staged_folder,
    work_folder,
    write_files,
)
from rrhf_peft.records import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed(code: str, *arguments: object) -> None:
    """Run code that kills its own process."""
    head = "import os, sys; from pathlib import Path; from rrhf_peft.files import *; from rrhf_peft import files\n"
    head += "def kill(*_, **__): os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", head + code, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL


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


# ------------------------------------------------------------------------------------------------------ staged folders


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with staged_folder(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert names(target) == {"a", ".rrhf-peft.json"}
    assert names(target.parent) == {"model"}


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staged_folder(tmp_path / "deep" / "model") as staging:
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
    with staged_folder(target) as staging:
        (staging / "old").write_text("1")
    with pytest.raises(RuntimeError), staged_folder(target, overwrite=True):
        raise RuntimeError
    assert names(target) == {"old", ".rrhf-peft.json"}
    (target / "report.html").write_text("of `rrhf-peft report`, which can be made again")
    with staged_folder(target, overwrite=True) as staging:
        (staging / "new").write_text("2")
    assert names(target) == {"new", ".rrhf-peft.json"}
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("added", ["notes.txt", "deep/notes.txt", "link"])
def test_overwrite_leaves_folders_that_hold_a_users_file(tmp_path: Path, added: str) -> None:
    target = tmp_path / "model"
    with staged_folder(target) as staging:
        (staging / "old").write_text("1")
    if added == "link":
        (target / added).symlink_to(tmp_path)
    else:
        (target / added).parent.mkdir(exist_ok=True)
        (target / added).write_text("mine")
    with (
        pytest.raises(UserError, match=rf"holds {added}, which .* did not write"),
        staged_folder(target, overwrite=True),
    ):
        pass
    assert (target / "old").read_text() == "1"
    assert (target / added).exists()


def test_overwrite_leaves_folders_that_this_program_did_not_make(tmp_path: Path) -> None:
    target = tmp_path / "documents"
    target.mkdir()
    (target / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="has no mark of rrhf-peft"), staged_folder(target, overwrite=True):
        pass
    assert names(target) == {"letter.txt"}


@pytest.mark.parametrize("state", ["partial", "retired"])
def test_siblings_that_are_not_ours_are_left_alone(tmp_path: Path, state: str) -> None:
    sibling = tmp_path / f".model.rrhf-peft.{state}"
    sibling.mkdir()
    (sibling / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{state}: has no mark .*Move it away"), staged_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == {sibling.name}
    assert (sibling / "letter.txt").read_text() == "mine"


def test_a_parent_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="cannot be written"), staged_folder(tmp_path / "file" / "model"):
        pass


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model"
    killed("with staged_folder(sys.argv[1]) as staging:\n    (staging / 'half').write_text('1'); kill()", target)
    assert not target.exists()
    with staged_folder(target) as staging:
        (staging / "a").write_text("1")
    assert names(target) == {"a", ".rrhf-peft.json"}
    assert names(tmp_path) == {"model"}


def test_a_kill_between_the_two_last_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged_folder(target) as staging:
        (staging / "old").write_text("1")
    code = (
        "with staged_folder(sys.argv[1], overwrite=True) as staging:\n"
        "    rename = Path.rename\n"
        "    Path.rename = lambda self, other: kill() if 'partial' in self.name else rename(self, other)\n"
    )
    killed(code, target)
    assert not target.exists()
    with pytest.raises(UserError, match="already exists"), staged_folder(target):
        pass
    assert names(target) == {"old", ".rrhf-peft.json"}
    code = "with staged_folder(sys.argv[1], overwrite=True) as staging:\n    "
    code += "(staging / 'mid').touch(); files.remove = kill"
    killed(code, target)
    assert names(target) == {"mid", ".rrhf-peft.json"}
    assert names(tmp_path) == {"model", ".model.rrhf-peft.retired", ".model.rrhf-peft.lock"}
    with staged_folder(target, overwrite=True) as staging:
        (staging / "new").write_text("2")
    assert names(tmp_path) == {"model"}
    assert names(target) == {"new", ".rrhf-peft.json"}


def test_a_full_disk_within_a_staged_folder_is_one_paragraph(tmp_path: Path) -> None:
    said = r"model: cannot be written \(the disk is full\)\. Make room"
    with pytest.raises(UserError, match=said), staged_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == set()


# -------------------------------------------------------------------------------------------- folders that runs fill


def fill(target: Path, name: str, *, overwrite: bool = False, resume: bool = False, fail: bool = False) -> None:
    with lock(target), begun_folder(target, verb="train", writes=["*.json"], overwrite=overwrite, resume=resume) as run:
        (target / f"{name}.json").write_text(name)
        if fail:
            raise RuntimeError
        run.keep()


def test_a_run_that_fails_before_its_first_result_gives_the_old_one_back(tmp_path: Path) -> None:
    target = tmp_path / "run"
    fill(target, "old")
    with pytest.raises(UserError, match="already exists"):
        fill(target, "new")
    with pytest.raises(RuntimeError):
        fill(target, "new", overwrite=True, fail=True)
    assert names(target) == {"old.json", ".rrhf-peft.json"}
    assert names(tmp_path) == {"run"}
    fill(target, "new", overwrite=True)
    assert names(target) == {"new.json", ".rrhf-peft.json"}
    assert names(tmp_path) == {"run"}


def test_a_run_that_stops_after_its_first_result_keeps_both(tmp_path: Path) -> None:
    target = tmp_path / "run"
    fill(target, "old")
    code = (
        "options = {'verb': 'train', 'writes': ['*.json'], 'overwrite': True}\n"
        "with files.lock(sys.argv[1]), begun_folder(sys.argv[1], **options) as run:\n"
        "    Path(sys.argv[1], 'half.json').touch(); run.keep(); kill()"
    )
    killed(code, target)
    retired = retired_folder(target)
    assert retired is not None
    assert (retired / "old.json").exists()
    assert (target / "half.json").exists()
    fill(target, "rest", resume=True)
    assert names(target) == {"half.json", "rest.json", ".rrhf-peft.json"}
    assert names(tmp_path) == {"run"}


def test_a_run_killed_before_its_first_result_gives_the_old_one_back_to_the_next(tmp_path: Path) -> None:
    target = tmp_path / "run"
    fill(target, "old")
    code = (
        "with files.lock(sys.argv[1]), begun_folder(sys.argv[1], verb='train', writes=['*.json'], overwrite=True):\n"
        "    Path(sys.argv[1], 'half.json').touch(); kill()"
    )
    killed(code, target)
    with pytest.raises(UserError, match="already exists"):
        fill(target, "new")
    assert names(target) == {"old.json", ".rrhf-peft.json"}


# ----------------------------------------------------------------------------------------------------- what is refused


def test_an_output_is_never_what_the_run_reads_nor_above_it_nor_in_it(tmp_path: Path) -> None:
    data, base = tmp_path / "data", tmp_path / "base"
    for folder in (data, base):
        folder.mkdir()
    (data / "prompts.jsonl").write_text("{}")
    (base / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(data)
    for target, folder, read, said in (
        (data / "prompts.jsonl", False, data / "prompts.jsonl", "is what this run reads"),
        (tmp_path / "link" / "prompts.jsonl", False, data / "prompts.jsonl", "is what this run reads"),
        (base, True, base, "is what this run reads"),
        (tmp_path, True, base, "holds .*base, which this run reads"),
        (data / "out.jsonl", False, data, "lies in .*data, which this run reads"),
        (tmp_path / "link", True, None, "is a link"),
        (data, False, None, "is a folder. Name a file"),
        (data / "prompts.jsonl", True, None, "is a file. Name a folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_output(
                target, key="sampling.output", folder=folder, reads=[read, "some/hub-id", None], overwrite=True
            )
    check_output(base / "merged", folder=True, reads=[base])


def test_a_file_that_somebody_puts_into_a_folder_inside_keeps_the_whole_from_being_replaced(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with lock(target), begun_folder(target, verb="train", writes=["checkpoint-*/*"]) as run:
        for number in (1, 2):
            (target / f"checkpoint-{number}" / "deep").mkdir(parents=True)
            (target / f"checkpoint-{number}" / "deep" / "[0].bin").touch()
        run.keep(target / "checkpoint-1")
    check_output(target, folder=True, overwrite=True)
    (target / "checkpoint-2" / "deep" / "notes.txt").touch()  # without a mark of its own, the pattern is all there is
    check_output(target, folder=True, overwrite=True)
    notes = target / "checkpoint-1" / "deep" / "notes.txt"
    notes.touch()
    said = r"holds checkpoint-1/deep/notes.txt, which rrhf-peft train did not write, so --overwrite leaves it"
    with pytest.raises(UserError, match=said):
        check_output(target, folder=True, overwrite=True)
    notes.unlink()
    check_output(target, folder=True, overwrite=True)


def test_a_marked_folder_that_somebody_puts_into_another_is_not_the_others(tmp_path: Path) -> None:
    with lock(tmp_path / "run"), begun_folder(tmp_path / "run", verb="train", writes=["*.json"]):
        pass
    with staged_folder(tmp_path / "run" / "merged", verb="merge") as staging:
        (staging / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"holds merged/model.safetensors, which rrhf-peft train did not write"):
        check_output(tmp_path / "run", folder=True, overwrite=True)


def test_intermediate_results_go_but_not_what_lies_among_them(tmp_path: Path) -> None:
    for name in ("part-0.jsonl", "notes.txt"):
        work_folder(tmp_path / "out.parts", verb="score", writes=["part-*.jsonl"])
        (tmp_path / "out.parts" / name).touch()
        remove_work_folder(tmp_path / "out.parts")
        assert (tmp_path / "out.parts").exists() == (name == "notes.txt")
    with pytest.raises(UserError, match=r"holds notes.txt, which rrhf-peft score did not write, .* Move it away"):
        work_folder(tmp_path / "out.parts", verb="score", writes=["part-*.jsonl"], overwrite=True)


def test_the_working_folder_and_what_holds_it_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged_folder(tmp_path / "run") as staging:
        (staging / "a").touch()
    (tmp_path / "run" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "run" / "deep")
    with pytest.raises(UserError, match="is or holds the working folder"):
        check_output(tmp_path / "run", folder=True, overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    with pytest.raises(UserError, match="is or holds your home folder"):
        check_output(tmp_path / "run", folder=True, overwrite=True)


def test_files_are_replaced_only_as_this_program_wrote_them(tmp_path: Path) -> None:
    path, other = tmp_path / "ranked.jsonl", tmp_path / "ranked.report.json"
    path.write_text("mine")
    with pytest.raises(UserError, match="has no mark of rrhf-peft"):
        check_output(path, overwrite=True)
    with pytest.raises(UserError, match="has no mark of rrhf-peft"):
        write_files(path, {path: "new"}, verb="convert")
    assert path.read_text() == "mine"
    path.unlink()
    write_files(path, {path: "old", other: "report"}, verb="convert", fingerprint="a")
    check_output(path, overwrite=True, beside=[other])
    assert is_finished(path, "a", [other])
    assert not is_finished(path, "b")
    with pytest.raises(UserError, match="already exists"):
        check_output(path)
    write_files(path, {path: ["ne", "w"], other: None}, verb="convert")
    assert path.read_text() == "new"
    assert not other.exists()
    path.write_text("edited")
    with pytest.raises(UserError, match="was changed since rrhf-peft made it"):
        check_output(path, overwrite=True)
    assert path.read_text() == "edited"


@pytest.mark.parametrize("number", range(1, 4))
def test_a_kill_between_the_renames_of_an_output_leaves_every_file_known(tmp_path: Path, number: int) -> None:
    path, other = tmp_path / "ranked.jsonl", tmp_path / "ranked.report.json"
    for content in ("1", "2"):
        code = (
            "replace, calls = Path.replace, []\n"
            "def counted(self, other):\n"
            "    calls.append(other)\n"
            f"    return kill() if len(calls) == {number} else replace(self, other)\n"
            "Path.replace = counted\n"
            "path, other = map(Path, sys.argv[1:3])\n"
            "write_files(path, {path: sys.argv[3], other: sys.argv[3]}, verb='score', fingerprint=sys.argv[3])"
        )
        killed(code, path, other, content)
        check_output(path, overwrite=True, beside=[other])
        assert not is_finished(path, content, [other])
        write_files(path, {path: "0", other: "0"}, verb="score", fingerprint="0")
        assert is_finished(path, "0", [other])
    assert names(tmp_path) == {"ranked.jsonl", "ranked.report.json", ".ranked.jsonl.rrhf-peft.json"}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"made_by": "rrhf-peft", "verb": "x", "digests": []}', "[" * 10**5])
def test_a_damaged_mark_is_no_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / ".x.jsonl.rrhf-peft.json").write_text(text)
    assert read_mark(tmp_path / "x.jsonl") is None


def test_marks_hold_no_paths(tmp_path: Path) -> None:
    write_files(tmp_path / "x.jsonl", {tmp_path / "x.jsonl": "1"}, verb="convert")
    assert str(tmp_path) not in (tmp_path / ".x.jsonl.rrhf-peft.json").read_text()


# --------------------------------------------------------------------------------------------------------------- locks


def test_two_runs_never_work_on_one_output(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.jsonl"
    code = "from rrhf_peft.files import lock; import sys\nwith lock(sys.argv[1]): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = rf"another run is working on it \(process {holder.pid} on .*since"
        with pytest.raises(UserError, match=said), lock(target):
            pass
        holder.kill()
    with lock(target):  # the kernel let go of it
        assert names(target.parent) == {".out.jsonl.rrhf-peft.lock"}
        with pytest.raises(UserError, match="this process is working on it already"), lock(target):
            pass
        with pytest.raises(UserError, match="this process"), lock(os.path.relpath(target)):
            pass
    assert names(target.parent) == set()


def test_a_child_of_the_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with lock(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with lock(tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_says_so_once(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    for _ in range(2):
        with lock(tmp_path / "out"):
            pass
    assert capsys.readouterr().err.count("has no file locks") == 1
    assert names(tmp_path) == set()


def test_errors_of_a_full_or_read_only_disk_are_recognised_in_any_words(tmp_path: Path) -> None:
    for error, said in (
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x")), "Permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ):
        assert said in str(disk_trouble(error, tmp_path))
    for error in (
        OSError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied", "/somewhere/else"),
        RuntimeError("shapes do not fit"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ):
        assert disk_trouble(error, tmp_path) is None


def test_marks_name_what_made_them(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "merged", verb="merge") as staging:
        (staging / "config.json").write_text("{}")
    values = json.loads((tmp_path / "merged" / ".rrhf-peft.json").read_text())
    assert values["made_by"] == "rrhf-peft"
    assert values["verb"] == "merge"
    assert values["writes"] == ["config.json", "report.html"]
