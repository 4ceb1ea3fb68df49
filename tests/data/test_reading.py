"""Files of every type, folders, saved data sets and hub ids read alike; what cannot be read says where and why."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrhf_peft.data import hold_out, prompt_overlap, read_groups, without_overlap, write_ranked
from rrhf_peft.data.rows import rows_of_hub, split_of
from rrhf_peft.records import RankedGroup, UserError

ROWS = [
    {"prompt": "What is 1 + 1?", "responses": ["2", "NA", ""], "scores": [1.0, -0.5, 0.0], "sources": ["a", "b", "c"]},
    {"prompt": 'say "hi",\nplease\u2028now', "responses": ["hi"], "scores": [7.0], "sources": ["human"]},
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Keep `datasets` from writing into the home folder."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


def contents(groups):
    return [{"prompt": g.prompt, "responses": g.responses, "scores": g.scores, "sources": g.sources} for g in groups]


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS[0])
        writer.writerows(
            [value if isinstance(value, str) else json.dumps(value) for value in row.values()] for row in ROWS
        )


WRITERS = {
    "data.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "windows.jsonl": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in ROWS)
    ),
    "blank.jsonl": lambda path: path.write_text("\n" + "\n \n".join(json.dumps(row) for row in ROWS)),
    "data.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    ),
    "list.json": lambda path: path.write_text(" " + json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "data.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "data.csv": write_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_groups(name, tmp_path):
    WRITERS[name](tmp_path / name)
    groups = read_groups(tmp_path / name)
    assert contents(groups) == ROWS
    assert contents(read_groups(tmp_path)) == ROWS  # the folder that holds it
    assert all(group.origin["file"] == str(tmp_path / name) for group in groups)
    place = "row" if name in ("list.json", "data.parquet") else "line"
    expected = {"blank.jsonl": [2, 4], "data.csv": [2, 3]}.get(name, [0, 1] if place == "row" else [1, 2])
    assert [group.origin[place] for group in groups] == expected


def test_csv_records_keep_text_as_it_is_and_know_their_line(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n007,"two\nlines",NA\n"a, b",null,\n')
    first, second = read_groups(path)
    assert (first.prompt, first.responses, first.origin["line"]) == ("007", ["two\nlines", "NA"], 2)
    assert (second.prompt, second.responses, second.origin["line"]) == ("a, b", ["null", ""], 4)


def test_a_csv_cell_may_be_long(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("prompt,chosen,rejected\np,%s,b\n" % ("x" * 300_000))
    assert len(read_groups(path)[0].responses[0]) == 300_000


def test_messages_survive_parquet(tmp_path):
    messages = [{"role": "user", "content": "q"}]
    rows = [{"prompt": messages, "responses": ["a"], "scores": [1.0], "sources": ["s"]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "m.parquet")
    assert read_groups(tmp_path / "m.parquet")[0].prompt == messages


def test_saved_data_sets(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data.select([0]), test=data.select([1])).save_to_disk(tmp_path / "splits")
    assert contents(read_groups(tmp_path / "one", split="test")) == ROWS
    assert contents(read_groups(tmp_path / "splits", split="test")) == ROWS[1:]
    assert read_groups(tmp_path / "one")[1].origin == {"file": str(tmp_path / "one"), "row": 1}
    with pytest.raises(UserError, match="no split 'validation', only test, train"):
        read_groups(tmp_path / "splits", split="validation")


def test_hub_data_sets_come_through_load_dataset(tmp_path, jsonl):
    """The same call reads a local repository folder and a hub id."""
    jsonl(*ROWS, name="repo/train.jsonl")
    jsonl(ROWS[1], name="repo/test.jsonl")
    rows = list(rows_of_hub(str(tmp_path / "repo"), split="test"))
    assert [(row.values["prompt"], row.index) for row in rows] == [(ROWS[1]["prompt"], 0)]
    with pytest.raises(UserError, match=r"cannot be loaded .*validation"):
        rows_of_hub(str(tmp_path / "repo"), split="validation")


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch):
    """Behind a closed port; `datasets` alone asks six times and pauses 23 seconds in between."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    with pytest.raises(UserError, match=r"^no-such-data: there is no such file or folder, and as a hub data set"):
        read_groups("no-such-data")


def test_an_unreachable_hub_id_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^owner/no-such-data: there is no such file or folder, and as a hub data set"):
        read_groups("owner/no-such-data")


def test_folders_are_read_by_split(jsonl, tmp_path):
    for name in ("train.jsonl", "deeper/test-00000-of-00001.jsonl", "extra.jsonl", ".hidden/train.jsonl"):
        jsonl({"prompt": name, "responses": ["a"], "scores": [1]}, name=name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [group.prompt for group in read_groups(tmp_path)] == ["extra.jsonl", "train.jsonl"]
    assert [group.prompt for group in read_groups(tmp_path, split="test")] == ["deeper/test-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match="no split 'validation', only test, train"):
        read_groups(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("hh_harmless_test_k2.jsonl", "test"),
        ("dev/part1.jsonl", "validation"),
        ("eval2.json", "test"),
        ("trained_well.jsonl", "train"),
        ("latest.jsonl", "train"),
        ("test/train.jsonl", "train"),
    ],
)
def test_split_words(file, split):
    assert split_of(Path(file)) == split


def test_several_places_are_read_in_order_each_with_its_own_format(jsonl):
    one = jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}, name="one.jsonl")
    two = jsonl(*ROWS, name="two.jsonl")
    groups = read_groups([one, str(two)])
    assert [group.sources for group in groups] == [["chosen", "rejected"], ["a", "b", "c"], ["human"]]
    assert len(read_groups([one, two], max_groups=2)) == 2


def test_max_groups_stops_reading(jsonl):
    assert len(read_groups(jsonl(ROWS[0], "not json"), max_groups=1)) == 1


GOOD = b'{"prompt": "p", "responses": ["a"], "scores": [1]}\n'

BAD = {
    "malformed line": (
        "x.jsonl",
        GOOD + b'{"prompt": \n',
        r":2: this is not valid JSON",
    ),
    "two records on a line": ("x.jsonl", b"{}{}\n", r":1: this is not valid JSON \(Extra data"),
    "a list on a line": ("x.jsonl", b"[1]\n", r":1: a record is an object .* not \[1\]"),
    "undecodable bytes": (
        "x.jsonl",
        GOOD + b'{"prompt": "caf\xe9"}\n',
        r":2: byte 0xe9 at position 15",
    ),
    "UTF-16": ("x.jsonl", '{"prompt": "p"}\n'.encode("utf-16"), r":1: byte 0xff .* not UTF-8"),
    "empty file": ("x.jsonl", b"", r": this file holds no rows"),
    "blank file": ("x.jsonl", b"\n\n", r": this file holds no rows"),
    "number without end": ("x.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", r":1: this JSON cannot be read"),
    "bottomless nesting": ("x.jsonl", b"[" * 100_000 + b"\n", r":1: this (JSON cannot be read|is not valid JSON)"),
    "malformed list": ("x.json", b'[\n{"prompt": "p"},\n{"prompt" "q"}\n]', r":3: this is not valid JSON"),
    "list of numbers": ("x.json", b"[1, 2]", r": row 0 \(from 0\): a record is an object"),
    "empty list": ("x.json", b"[]", r": this file holds no rows"),
    "damaged gzip": ("x.jsonl.gz", b"\x1f\x8b\x08\x00junk", r": cannot be read"),
    "not Parquet": ("x.parquet", b"PAR1 junk", r": cannot be read as Parquet"),
    "csv with a cell too many": (
        "x.csv",
        b"prompt,chosen,rejected\na,b,c\na,b,c,d\n",
        r":3: 4 cells under 3 column names",
    ),
    "csv with an open quote": ("x.csv", b'prompt,chosen,rejected\na,b,"c\n', r":2: this is not valid CSV"),
    "csv header twice": ("x.csv", b"prompt,prompt\na,b\n", r":1: the first line must hold the column names"),
    "csv header only": ("x.csv", b"prompt,chosen,rejected\n", r": this file holds no rows"),
    "csv list in Python": ("x.csv", b"prompt,responses,scores\np,['a'],[1]\n", r":2: responses is not a JSON list"),
    "unknown ending": ("x.xlsx", b"PK", r": cannot tell how to read this file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_in_one_paragraph(case, tmp_path):
    name, content, problem = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        read_groups(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_answered_with_its_neighbour(jsonl, tmp_path):
    jsonl(*ROWS, name="ranked.jsonl")
    with pytest.raises(UserError, match=r"rankd\.jsonl: there is no such file .*did you mean .*ranked\.jsonl\?"):
        read_groups(tmp_path / "rankd.jsonl")


def test_an_empty_folder_and_no_place_at_all(tmp_path):
    with pytest.raises(UserError, match="no data files here"):
        read_groups(tmp_path)
    with pytest.raises(UserError, match="no data was named"):
        read_groups([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file(jsonl):
    path = jsonl(*ROWS)
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot be read .*ermission"):
        read_groups(path)


# Text without lone surrogates, which are no characters.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scores = st.floats(-1e30, 1e30)


@st.composite
def groups_of(draw, prompts=texts):
    k = draw(st.integers(1, 32))
    return RankedGroup(
        draw(prompts),
        draw(st.lists(texts, min_size=k, max_size=k)),
        draw(st.lists(st.one_of(st.sampled_from([0.0, 1.0]), scores), min_size=k, max_size=k)),
        draw(st.lists(st.sampled_from(["human", "beam:7b", "é|\n"]), min_size=k, max_size=k)),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(groups_of(), min_size=1, max_size=4))
def test_ranked_files_come_back_unchanged(tmp_path, groups):
    write_ranked(tmp_path / "round.jsonl", groups)
    back = read_groups(tmp_path / "round.jsonl")
    assert contents(back) == contents(groups)
    assert [group.origin["line"] for group in back] == list(range(1, len(groups) + 1))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(groups_of(), min_size=1, max_size=4))
def test_ranked_files_load_with_datasets(tmp_path, groups):
    path = tmp_path / "round.jsonl"
    write_ranked(path, groups)
    data = datasets.load_dataset("json", data_files=str(path), split="train")
    assert data.column_names == ["prompt", "responses", "scores", "sources"]
    assert [dict(row) for row in data] == contents(groups)


def test_messages_load_with_datasets(tmp_path):
    messages = [{"role": "user", "content": "q"}]
    groups = [RankedGroup(messages, ["a"], [1], ["s"]), RankedGroup(messages * 2, ["a", "b"], [1.5, 2], ["s", "t"])]
    write_ranked(tmp_path / "m.jsonl", groups)
    data = datasets.load_dataset("json", data_files=str(tmp_path / "m.jsonl"), split="train")
    assert [dict(row) for row in data] == contents(groups)


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([], "no groups to write"),
        ([RankedGroup("p", ["a"], [None], ["s"])], "1 of 1 responses have no score"),
        ([RankedGroup("p", ["\ud83d"], [1.0], ["s"])], "group 0 holds text that is not Unicode"),
    ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, groups, problem):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(UserError, match=problem):
        write_ranked(path, groups)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"scores": [float("nan")]}, "group 0: a score is nan, which is not finite"),
        ({"scores": [1e308]}, r"group 0: a score is 1e\+308, which is not finite, or beyond 1e\+30"),
        ({"scores": [1.0, 2.0]}, "group 0: scores has 2 entries for 1 responses"),
        ({"scores": ["1"]}, "group 0: a score must be a number, not '1'"),
        ({"scores": [True]}, "group 0: a score must be a number, not True"),
        ({"sources": ["a", "b"]}, "group 0: sources has 2 entries for 1 responses"),
        ({"sources": [3]}, r"group 0: sources must be texts, not \[3\]"),
        ({"responses": "a"}, "group 0: responses must be a list of texts, not 'a'"),
        ({"responses": [3]}, r"group 0: responses must be a list of texts, not \[3\]"),
        ({"prompt": 3}, "group 0: prompt must be text or a list of chat messages, not 3"),
        ({"prompt": [{"role": "user"}]}, r"group 0: prompt\[0\] must be a chat message"),
        ({"finish_reasons": ["eos", "length"]}, "group 0: finish_reasons has 2 entries for 1 responses"),
        ({"token_ids": [["a"]]}, "group 0: token_ids must be lists of whole numbers"),
    ],
)
def test_a_wrong_group_is_an_error_where_it_is_made(values, problem):
    with pytest.raises(UserError, match=problem):
        RankedGroup(**{"prompt": "p", "responses": ["a"], **values})


def test_a_group_knows_its_sampling_and_chooses(tmp_path):
    about = {
        "finish_reasons": ["eos", None],
        "num_tokens": [2, None],
        "token_ids": [[5, 2], None],
        "tokenizers": ["f", None],
    }
    group = RankedGroup("p", ["a", "b"], [1.0, 2.0], **about)
    assert group.sources == ["response-0", "response-1"]
    write_ranked(tmp_path / "r.jsonl", [group])
    (back,) = read_groups(tmp_path / "r.jsonl")
    assert {name: list(getattr(back, name)) for name in about} == about
    assert back.columns == {}
    assert back.choose([1, 0]).row() == {
        "prompt": "p", "responses": ["b", "a"], "scores": [2.0, 1.0], "sources": ["response-1", "response-0"],
        **{name: values[::-1] for name, values in about.items()},
    }  # fmt: skip
    assert RankedGroup("p", ["a"]).row() == {"prompt": "p", "responses": ["a"], "sources": ["response-0"]}
    assert RankedGroup("p").row() == {"prompt": "p"}


def test_files_of_earlier_versions_say_how_responses_ended(jsonl):
    candidates = [{"finish_reason": "length", "num_tokens": 3}, {"finish_reason": "eos", "num_tokens": 2}]
    row = {"prompt": "p", "responses": ["abc", "d"], "scores": [1, 2], "meta": {"candidates": candidates}}
    (group,) = read_groups(jsonl(row))
    assert (list(group.finish_reasons), list(group.num_tokens)) == (["length", "eos"], [3, 2])
    (group,) = read_groups(jsonl({**row, "meta": {"candidates": candidates[:1]}}))  # of something else
    assert group.finish_reasons == (None, None)


def test_what_is_needed_decides_what_is_read(jsonl):
    rows = [
        {"prompt": "p"},
        {"prompt": "q", "responses": ["a"]},
        {"prompt": "r", "responses": ["b", "c"], "scores": [1, None]},
    ]
    groups = read_groups(jsonl(*rows), needs="prompt")
    assert [(group.prompt, group.responses, list(group.scores), group.index) for group in groups] == [
        ("p", [], [], 0), ("q", ["a"], [None], 1), ("r", ["b", "c"], [1.0, None], 2),
    ]  # fmt: skip
    assert [group.responses for group in read_groups(jsonl(*rows[1:]), needs="responses")] == [["a"], ["b", "c"]]
    assert read_groups(jsonl({"prompt": "p", "responses": []}), needs="responses")[0].responses == []
    with pytest.raises(UserError, match="misses"):
        read_groups(jsonl(*rows[1:]))
    with pytest.raises(UserError, match=r"scores\[1\] is null"):
        read_groups(jsonl(rows[2]))


def numbered(count: int, prompts: int | None = None) -> list[RankedGroup]:
    return [RankedGroup(f"p{n % (prompts or count)}", [f"r{n}"], [1.0], ["s"]) for n in range(count)]


@pytest.mark.parametrize(("size", "held"), [(3, 3), (0.2, 4), (0.01, 1)])
def test_hold_out_is_exact_ordered_and_repeatable(size, held):
    groups = numbered(20)
    train, evaluation = hold_out(groups, size, seed=1)
    assert len(evaluation) == held
    assert [group for group in groups if group in train] == train
    assert [group for group in groups if group in evaluation] == evaluation
    assert len(train) + len(evaluation) == 20
    assert hold_out(groups, size, seed=1) == (train, evaluation)
    assert any(hold_out(groups, size, seed=seed)[1] != evaluation for seed in range(2, 6))


def test_hold_out_keeps_a_prompt_on_one_side():
    train, evaluation = hold_out(numbered(30, prompts=10), 9, seed=0)
    assert len(evaluation) == 9
    assert not {group.prompt for group in train} & {group.prompt for group in evaluation}


@pytest.mark.parametrize(("count", "prompts", "size"), [(3, 3, 3), (3, 3, 5), (1, 1, 1), (4, 1, 2), (4, 1, 0.5)])
def test_hold_out_leaves_neither_part_empty(count, prompts, size):
    with pytest.raises(UserError, match="both parts need a group"):
        hold_out(numbered(count, prompts), size, seed=0)


RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}


@pytest.mark.parametrize("path", ["", "  "])
@pytest.mark.parametrize("needs", ["scores", "prompt"])
def test_an_empty_path_is_not_the_working_folder(tmp_path, monkeypatch, jsonl, path, needs):
    jsonl(RANKED)
    monkeypatch.chdir(tmp_path)
    for where in (path, [path], ["data.jsonl", path]):
        with pytest.raises(UserError, match="a path of the data is empty"):
            read_groups(where, needs=needs)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.txt", "pipe.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read_groups(str(tmp_path / name), needs="prompt")


def test_a_folder_leaves_pipes_alone(tmp_path, jsonl):
    jsonl(RANKED)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl")
    assert len(read_groups(tmp_path)) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "p", "prompt": "q", "responses": ["a"], "scores": [1]}', "the key 'prompt' stands there twice"),
        ('{"prompt": "p", "x": {"y": 1, "y": 1}, "responses": ["a"], "scores": [1]}', "the key 'y' stands there twice"),
        (
            '{"prompt": "p", "responses": ["a"], "scores": [1], "x": ' + "[" * 9999 + "]" * 9999 + "}",
            "nested too deeply",
        ),
        ('{"prompt": "p", "responses": ["a"], "scores": [1], "x": ' + "[" * 600 + "]" * 600 + "}", "nested too deeply"),
        ('{"prompt": "p", "responses": ["a"], "scores": [1e308]}', r"scores\[0\] is 1e\+308, beyond 1e\+30"),
    ],
    ids=["twice", "twice inside", "deep", "deep column", "large"],
)
def test_hostile_lines_are_one_sentence(jsonl, line, problem):
    with pytest.raises(UserError, match=problem) as caught:
        read_groups(jsonl(RANKED, line))
    assert "data.jsonl:2: " in str(caught.value)
    assert len(str(caught.value)) < 400


def test_half_a_character_in_another_column_does_not_break_the_last_write(jsonl):
    line = json.dumps({**RANKED, "note": ["x\ud83d", {"\udc00": "é😀"}]})
    (group,) = read_groups(jsonl(line))
    assert group.columns == {"note": ["x\ufffd", {"\ufffd": "é😀"}]}
    json.dumps(group.columns, ensure_ascii=False).encode()


def test_a_gzip_bomb_and_an_endless_line_are_refused(tmp_path, monkeypatch, jsonl):
    from rrhf_peft.data import rows

    monkeypatch.setattr(rows, "_UNPACKED_FREELY", 10_000)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wt") as file:
        file.write((json.dumps(RANKED) + "\n") * 200_000)
    with pytest.raises(UserError, match=r"bomb\.jsonl\.gz: unpacks to more than 200 times its size"):
        read_groups(tmp_path / "bomb.jsonl.gz")
    monkeypatch.setattr(rows, "_LONGEST_LINE", 1000)
    with pytest.raises(UserError, match=r"data\.jsonl:2: this line is longer than"):
        read_groups(jsonl(RANKED, {**RANKED, "prompt": "p" * 1000}))


def test_prompts_that_are_nearly_the_same_are_counted_and_those_held_out_are_removed():
    def groups(*prompts):
        return [RankedGroup(prompt, ["a", "b"], [1.0, 0.0]) for prompt in prompts]

    messages = [{"role": "user", "content": "Why is it blue?"}]
    train = groups("Why is it blue?", "why is it BLUE", "Why is it red?", "???", "!!!", messages)
    held_out = groups(" Why,  is it blue", "Who?", "???", messages)
    overlap = prompt_overlap(train, held_out)
    assert (overlap.repeated, overlap.held_out, overlap.trained) == (1, 3, 4)
    assert "1 groups nearly repeat" in overlap.notes()[0]
    assert "3 held-out groups have a prompt that is also trained on, in 4 groups" in overlap.notes()[1]
    assert [group.prompt for group in without_overlap(train, held_out)] == ["Why is it red?", "!!!"]
    assert prompt_overlap(without_overlap(train, held_out), held_out).notes() == []
    with pytest.raises(UserError, match="leaves nothing to train on"):
        without_overlap(held_out, held_out)
