"""Sharded work: every unit exactly once, whatever is killed and however many processes come back."""

from __future__ import annotations

import errno
import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
from processes import free_port, run_processes

from rrhf_peft import jobs
from rrhf_peft.files import replace_text
from rrhf_peft.jobs import Processes, ShardedOutput, exclusive, launched_processes
from rrhf_peft.records import UserError


def rows_of(unit):
    return [{"index": 2 * unit + i, "text": f"é🙂 {unit}"} for i in range(2)]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(folder):
    return {path.name for path in folder.iterdir()}


EVERYTHING = [row for unit in range(7) for row in rows_of(unit)]
#: An output and its mark.
MADE = {"out.jsonl", ".out.jsonl.rrhf-peft.json"}


def sharded(output, fingerprint="a", units=7, **options):
    return ShardedOutput(output, verb="score", fingerprint=fingerprint, units=units, **options)


def make(output, fingerprint="a", units=7, *, overwrite=False, **options):
    """All units by one process; whether they were finished before."""
    shards = sharded(output, fingerprint, units)
    if shards.open(overwrite=overwrite):
        return True
    for unit in shards.pending():
        shards.write(unit, rows_of(unit))
    shards.merge(**options)
    return False


def two_units_each(output):
    with launched_processes() as processes, exclusive(output, processes):
        shards = sharded(output, processes=processes)
        assert not shards.open()
        for unit in shards.pending()[:2]:
            shards.write(unit, rows_of(unit))
        processes.wait_for_all()


def what_is_missing(output):
    with launched_processes() as processes, exclusive(output, processes):
        shards = sharded(output, processes=processes)
        assert not shards.open()
        todo = processes.from_all(shards.pending())
        assert sorted(unit for units in todo for unit in units) == [4, 5, 6]
        for unit in shards.pending():
            shards.write(unit, rows_of(unit))
        shards.merge()


def test_two_processes_then_three_make_the_same_file(tmp_path):
    output = tmp_path / "out.jsonl"
    run_processes(two_units_each, output, count=2)
    assert names(tmp_path) == {"out.jsonl.parts"}
    run_processes(what_is_missing, output, count=3)
    assert read(output) == EVERYTHING
    assert names(tmp_path) == MADE


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_is_done_again(tmp_path, cut):
    output = tmp_path / "out.jsonl"
    shards = sharded(output)
    shards.open()
    for unit in range(3):
        shards.write(unit, rows_of(unit))
    part = tmp_path / "out.jsonl.parts" / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    shards.open()
    assert shards.pending() == [2, 3, 4, 5, 6]
    for unit in shards.pending():
        shards.write(unit, rows_of(unit))
    shards.merge()
    assert read(output) == EVERYTHING


def test_a_damaged_line_is_done_again(tmp_path):
    output = tmp_path / "out.jsonl"
    shards = sharded(output)
    shards.open()
    for unit in range(3):
        shards.write(unit, rows_of(unit))
    part = tmp_path / "out.jsonl.parts" / "part-0.jsonl"
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join([lines[0], "{\n", lines[2]]), encoding="utf-8")
    shards.open()
    assert shards.pending() == [1, 3, 4, 5, 6]


def test_the_same_work_again_is_done_and_other_work_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    assert not make(output)
    before = output.stat().st_mtime_ns
    assert make(output)
    assert output.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"made from other input or with other settings\. .*--overwrite"):
        make(output, "b")
    output.write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"changed since it was made\. .*--overwrite"):
        make(output)
    with pytest.raises(UserError, match="changed since rrhf-peft made it"):
        make(output, overwrite=True)
    assert read(output) == [{"mine": 1}]


def test_unfinished_parts_of_other_work_are_left_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    shards = sharded(output)
    shards.open()
    shards.write(0, rows_of(0))
    with pytest.raises(UserError, match=r"other work .*--overwrite"):
        sharded(output, "b").open()
    assert not make(output, "b", overwrite=True)
    assert read(output) == EVERYTHING


def test_an_output_stays_until_the_new_one_is_whole(tmp_path):
    output = tmp_path / "out.jsonl"
    make(output)
    shards = sharded(output, "b")
    shards.open(overwrite=True)
    shards.write(0, rows_of(1))
    assert read(output) == EVERYTHING  # killed here
    assert not make(output, "b")  # needs no second --overwrite
    assert read(output)[:2] == rows_of(1)
    assert names(tmp_path) == MADE


@pytest.mark.parametrize("overwrite", [False, True])
def test_parts_and_outputs_of_others_are_left_alone(tmp_path, overwrite):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match="already exists" if not overwrite else "has no mark of rrhf-peft"):
        make(output, overwrite=overwrite)
    assert output.read_text() == "mine"
    output.unlink()
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts" / "part-0.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"out\.jsonl\.parts: has no mark .*Move it away"):
        make(output, overwrite=overwrite)
    assert (tmp_path / "out.jsonl.parts" / "part-0.jsonl").read_text() == "mine"
    assert names(tmp_path) == {"out.jsonl.parts"}


def test_files_beside_the_output_are_written_with_it_and_never_over_others(tmp_path):
    output, report = tmp_path / "out.jsonl", tmp_path / "out.report.json"
    report.write_text("mine")
    shards = sharded(output, beside=[report])
    with pytest.raises(UserError, match=r"out\.report\.json: has no mark"):
        shards.open()
    assert report.read_text() == "mine"
    report.unlink()
    make(output, beside=lambda: {report: "{}"})
    assert report.read_text() == "{}"
    shards = sharded(output, "b", beside=[report])
    shards.open(overwrite=True)
    for unit in shards.pending():
        shards.write(unit, rows_of(unit))
    shards.merge(beside=lambda: {report: None})
    assert names(tmp_path) == MADE


def test_merging_unfinished_work_is_a_defect(tmp_path):
    shards = sharded(tmp_path / "out.jsonl", units=2)
    shards.open()
    shards.write(1, rows_of(1))
    with pytest.raises(AssertionError, match="1 of 2"):
        shards.merge()
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_keeps_what_was_finished_and_says_so(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    shards = sharded(output)
    shards.open()
    shards.write(0, rows_of(0))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match=r"the disk is full\). What was finished is kept in .*parts.*Make room"):
            shards.write(1, rows_of(1))
    shards.open()
    assert 0 not in shards.pending()


def test_text_that_is_not_unicode_comes_back_as_it_was(tmp_path):
    output = tmp_path / "out.jsonl"
    shards = sharded(output, units=1)
    shards.open()
    shards.write(0, [{"text": "a\ud800b"}])
    shards.merge()
    assert read(output) == [{"text": "a\ud800b"}]


def fail_on_main(folder):
    with launched_processes() as processes:

        def work():
            raise UserError("the main process's reason")

        try:
            processes.on_main(work)
        except UserError as error:
            replace_text(folder / f"{processes.index}", str(error))
        replace_text(folder / f"{processes.index}-seen", processes.on_main(lambda: f"from {processes.index}"))


def test_all_processes_learn_what_the_main_one_says(tmp_path):
    run_processes(fail_on_main, tmp_path, count=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "the main process's reason",
        "1": "the main process's reason",
        "0-seen": "from 0",
        "1-seen": "from 0",
    }


def work_in_a_folder_of_its_own(folder):
    jobs._SECONDS_TO_SEE = 1.0
    mine = folder / os.environ["RANK"]  # as on two hosts with a disk each
    mine.mkdir()
    os.chdir(mine)
    with (
        launched_processes() as processes,
        pytest.raises(UserError, match=r"process 1 .* does not see"),
        exclusive("out.jsonl", processes),
    ):
        Path("worked").touch()


def test_processes_without_a_shared_file_system_are_told_at_the_start(tmp_path):
    run_processes(work_in_a_folder_of_its_own, tmp_path, count=2)
    assert names(tmp_path / "0") == names(tmp_path / "1") == set()


def test_one_process_needs_no_launch():
    assert Processes(0, 1).on_main(lambda: 3) == 3
    assert Processes(0, 1).from_all(3) == [3]


def lonely(monkeypatch):
    """The variables of a process whose fellows never come."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)


def test_a_launch_of_which_some_never_come_ends_with_a_reason(monkeypatch):
    lonely(monkeypatch)
    monkeypatch.setattr(jobs, "_TIME_TO_JOIN", timedelta(seconds=1))
    said = r"not all 2 processes that the variable WORLD_SIZE tells of have met .*unset these"
    with pytest.raises(UserError, match=said), launched_processes():
        pass


def test_ctrl_c_says_where_the_command_goes_on(tmp_path):
    """Of an evaluation, which samples inside of itself, and not of that."""
    alone = Processes(0, 1)

    def interrupted(**options):
        with exclusive(tmp_path / "outer", alone, **options), exclusive(tmp_path / "inner", alone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=f"What was finished of {tmp_path}/outer is kept: the same command"):
        interrupted()
    assert names(tmp_path) == set()
