"""Each format's rows become the groups they mean, under its own name and under auto."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_peft.data import IMPORTERS, read_groups
from rrhf_peft.data.formats import importer_for
from rrhf_peft.data.rows import Row
from rrhf_peft.records import RankedGroup, UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
DIALOGUE = f"{HUMAN} q{ASSISTANT} x{HUMAN} r{ASSISTANT}"


def message(role, content):
    return {"role": role, "content": content}


def read(format="auto", **values):
    row = Row(values, "file.jsonl", line=7)
    (group,) = importer_for(row, format).read([row])
    return group


def parts(group: RankedGroup):
    return group.prompt, group.responses, group.scores, group.sources


PAIR = ([1.0, 0.0], ["chosen", "rejected"])
USER = [message("user", "q")]

CASES = {
    "ranked": (
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1], "sources": ["x", "y", "x"]},
        ("p", ["a", "b", "c"], [0.5, 2.0, -1.0], ["x", "y", "x"]),
    ),
    "ranked without sources": (
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1], "sources": None},
        ("p", ["a", "b"], [1.0, 1.0], ["response-0", "response-1"]),
    ),
    "ranked with messages": (
        {"prompt": USER, "responses": ["a"], "scores": [1]},
        (USER, ["a"], [1.0], ["response-0"]),
    ),
    "rrhf with query": (
        {"query": "p", "responses": ["a", "b"], "scores": [-3.5, -2]},
        ("p", ["a", "b"], [-3.5, -2.0], ["response-0", "response-1"]),
    ),
    "rrhf with response": (
        {"prompt": "p", "response": ["a", "b"], "scores": [0, 1]},
        ("p", ["a", "b"], [0.0, 1.0], ["response-0", "response-1"]),
    ),
    "preference with text": (
        {"prompt": "p", "chosen": " a", "rejected": " b"},
        ("p", [" a", " b"], *PAIR),
    ),
    "preference, implicit prompt": (
        {"chosen": "The sky is blue", "rejected": "The sky is black"},
        ("The sky is", [" blue", " black"], *PAIR),
    ),
    "preference, one answer goes on": (
        {"chosen": "The sky is blue", "rejected": "The sky is blue, or not"},
        ("The sky is", [" blue", " blue, or not"], *PAIR),
    ),
    "preference with its scores": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 8.5},
        ("p", ["a", "b"], [8.5, 8.5], ["chosen", "rejected"]),
    ),
    "preference with one score": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": None},
        ("p", ["a", "b"], *PAIR),
    ),
    "preference, nothing in common": ({"chosen": "yes", "rejected": "no"}, ("", ["yes", "no"], *PAIR)),
    "preference with messages": (
        {"prompt": USER, "chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]},
        (USER, ["a", "b"], *PAIR),
    ),
    "preference with messages, prompt repeated in the answers": (
        {"prompt": USER, "chosen": [*USER, message("assistant", "a")], "rejected": [*USER, message("assistant", "b")]},
        (USER, ["a", "b"], *PAIR),
    ),
    "preference with messages and the prompt as text": (
        {"prompt": "q", "chosen": [*USER, message("assistant", "a")], "rejected": [*USER, message("assistant", "b")]},
        (USER, ["a", "b"], *PAIR),
    ),
    "preference with messages, implicit prompt": (
        {"chosen": [*USER, message("assistant", "a")], "rejected": [*USER, message("assistant", "b")]},
        (USER, ["a", "b"], *PAIR),
    ),
    "preference with messages after different questions": (
        {
            "chosen": [*USER, message("assistant", "a")],
            "rejected": [message("user", "another"), message("assistant", "b")],
        },
        (USER, ["a"], [1.0], ["chosen"]),
    ),
    "preference beside an instruction": (
        {"instruction": "i", "prompt": "p", "chosen": "a", "rejected": "b"},
        ("p", ["a", "b"], *PAIR),
    ),
    "preference with messages beside an instruction": (
        {
            "instruction": "i",
            "chosen": [*USER, message("assistant", "a")],
            "rejected": [*USER, message("assistant", "b")],
        },
        (USER, ["a", "b"], *PAIR),
    ),
    "hh": (
        {
            "chosen": f"{HUMAN} q{ASSISTANT} x{HUMAN} r{ASSISTANT} a",
            "rejected": f"{HUMAN} q{ASSISTANT} x{HUMAN} r{ASSISTANT} b",
        },
        (f"{HUMAN} q{ASSISTANT} x{HUMAN} r{ASSISTANT}", [" a", " b"], *PAIR),
    ),
    "hh, different prompts": (
        {"chosen": f"{HUMAN} q{ASSISTANT} a", "rejected": f"{HUMAN} q{ASSISTANT} a{HUMAN} r{ASSISTANT} b"},
        (f"{HUMAN} q{ASSISTANT}", [" a"], [1.0], ["chosen"]),
    ),
    "rm_static": (
        {"prompt": f"{HUMAN} q{ASSISTANT}", "response": " a", "chosen": " a", "rejected": " b"},
        (f"{HUMAN} q{ASSISTANT}", [" a", " b"], *PAIR),
    ),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_rows_become_the_groups_they_mean(case, named):
    values, expected = CASES[case]
    format = case.split(",")[0].split(" ")[0] if named else "auto"
    assert parts(read(format, **values)) == expected


def test_columns_keep_other_columns_and_the_origin():
    group = read(prompt="p", responses=["a"], scores=[1], lang="en", empty=None)
    assert (group.columns, group.origin) == ({"lang": "en"}, {"file": "file.jsonl", "line": 7})
    assert read(prompt="p", response=" a", chosen=" a", rejected="b").columns["response"] == " a"


def test_message_keys_that_are_no_text_are_left_out():
    group = read(prompt=[{"role": "user", "content": "q", "tool_calls": None}], responses=["a"], scores=[1])
    assert group.prompt == USER


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_hh_prompt_and_response_are_exactly_the_transcript(history, one, other):
    start = f"{HUMAN}{history}{ASSISTANT}"
    group = read("hh", chosen=start + one, rejected=start + other)
    assert group.prompt + group.responses[0] == start + one
    assert ASSISTANT not in group.responses[0]


@settings(deadline=None)
@given(st.text(), st.text())
def test_an_implicit_prompt_splits_no_word_and_loses_no_character(one, other):
    group = read("preference", chosen=one, rejected=other)
    assert [group.prompt + response for response in group.responses] == [one, other]
    if group.prompt:
        assert all(response[0].isspace() for response in group.responses)


BAD = {
    "score count": ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "scores has 1 entries for 2 responses"),
    "source count": (
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "sources": ["x"]},
        "sources has 1 entries for 2 responses",
    ),
    "NaN": ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, r"scores\[1\] is nan"),
    "infinity": ({"prompt": "p", "responses": ["a"], "scores": [float("-inf")]}, r"scores\[0\] is -inf"),
    "huge integer": ({"prompt": "p", "responses": ["a"], "scores": [10**400]}, r"scores\[0\] is inf"),
    "score as text": ({"prompt": "p", "responses": ["a"], "scores": ["1"]}, r"scores\[0\] is text, not a number"),
    "score as truth": ({"prompt": "p", "responses": ["a"], "scores": [True]}, r"scores\[0\] is true/false"),
    "missing score": ({"prompt": "p", "responses": ["a"], "scores": [None]}, r"scores\[0\] is null"),
    "one score for all": ({"prompt": "p", "responses": ["a"], "scores": 1.0}, "scores is a number, not a list"),
    "response no text": ({"prompt": "p", "responses": ["a", 3], "scores": [1, 2]}, r"responses\[1\] is a number"),
    "response missing": ({"prompt": "p", "responses": [None], "scores": [1]}, r"responses\[0\] is null"),
    "no responses": ({"prompt": "p", "responses": [], "scores": []}, "responses is an empty list"),
    "responses as text": ({"prompt": "p", "responses": "a", "scores": [1]}, "responses is text, not a list"),
    "no prompt": ({"prompt": None, "responses": ["a"], "scores": [1]}, "prompt is null or missing, not text"),
    "half a character": (
        {"prompt": "p", "responses": ["ok \ud83d"], "scores": [1]},
        r"responses\[0\] holds half a character \(\\ud83d at position 3\)",
    ),
    "ShareGPT message": (
        {"prompt": [{"from": "human", "value": "q"}], "responses": ["a"], "scores": [1]},
        r"prompt\[0\] is not a chat message \('from', 'value'\)",
    ),
    "content no text": (
        {"prompt": [message("user", ["q"])], "responses": ["a"], "scores": [1]},
        r"prompt\[0\].content is a list, not text",
    ),
    "mixed answers": ({"prompt": "p", "chosen": [message("assistant", "a")], "rejected": "b"}, "rejected is text"),
    "user has the last word": (
        {"chosen": [message("user", "a")], "rejected": [message("user", "b")]},
        "chosen ends with a message of role 'user'",
    ),
    "no prompt anywhere": (
        {"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]},
        "no prompt: chosen is a single message",
    ),
    "unknown columns": (
        {"query": "p", "response": ["a"], "score": [1]},
        r"no format fits the columns query, response, score\. The nearest, format rrhf, .*"
        r"misses responses \(did you mean 'response'\?\), scores \(did you mean 'score'\?\)",
    ),
    "misspelt column": (
        {"prompt": "p", "responces": ["a"], "scores": [1]},
        r"nearest, format ranked, needs prompt, responses, scores and misses responses \(did you mean 'responces'\?\)",
    ),
    "no columns": ({}, r"columns \(none\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_with_file_line_and_field(case):
    values, problem = BAD[case]
    with pytest.raises(UserError, match=rf"^file\.jsonl:7: .*{problem}") as caught:
        read(**values)
    assert "\n" not in str(caught.value)


def test_a_row_without_lines_is_named_by_its_position():
    row = Row({"prompt": "p", "responses": ["a"], "scores": ["x"]}, "owner/name", index=0)
    with pytest.raises(UserError, match=r"^owner/name: row 0 \(from 0\): scores\[0\]"):
        list(IMPORTERS["ranked"].read([row]))


def test_a_named_format_that_does_not_fit_says_which_does():
    with pytest.raises(UserError, match=r"needs .* misses responses, scores.* They fit format preference"):
        read("ranked", prompt="p", chosen="a", rejected="b")


def test_a_transcript_without_an_answer_is_named():
    with pytest.raises(UserError, match=r"rejected has no \"\\n\\nAssistant:\" turn"):
        read("hh", chosen=f"{HUMAN} q{ASSISTANT} a", rejected=f"{HUMAN} q")


def test_an_unknown_format_is_answered_with_the_nearest(jsonl):
    with pytest.raises(UserError, match="did you mean 'preference'"):
        read_groups(jsonl({}), format="preferences")


def test_scores_that_contradict_a_preference_are_told():
    with pytest.raises(UserError, match=r"file\.jsonl:7: score_chosen is 1 and score_rejected 2, but higher is better"):
        read(prompt="p", chosen="a", rejected="b", score_chosen=1, score_rejected=2.0)
