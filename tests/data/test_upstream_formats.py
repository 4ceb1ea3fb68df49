"""Each public data set's own layout, in a small file of its type, becomes the groups that it means.

What is checked for every format: the order of scores, ties, who wrote what, what has no rating, and that
a ranked file written from it reads back the same.
"""

from __future__ import annotations

import gzip
import itertools
import json
import typing

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_peft.data import IMPORTERS, read_groups, write_ranked
from rrhf_peft.data.rows import Row
from rrhf_peft.recipe.schema import Format
from rrhf_peft.records import UserError


def annotation(rating, **more):
    return {"Rating": rating, "Rationale": "because", **more}


def completion(model, response, *ratings):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "annotations": {aspect: annotation(rating) for aspect, rating in zip(aspects, ratings, strict=True)},
        "critique": "fine",
        "custom_system_prompt": "Be honest.",
        "fine-grained_score": 1.0,
        "model": model,
        "overall_score": 10.0,
        "principle": "honesty",
        "response": response,
    }


ULTRAFEEDBACK = [
    {
        "source": "evol_instruct",
        "instruction": "Name a river.",
        "models": ["alpaca-7b", "gpt-4", "bard", "falcon"],
        "completions": [
            completion("alpaca-7b", "A river.", "2", "1", "1", "2"),
            completion("gpt-4", "The Danube.", "5", "5", "5", "4"),
            completion("bard", "The Rhine.", "5", "4", "5", "5"),
            completion("falcon", "", "N/A", "N/A", "N/A", "N/A"),
        ],
        "correct_answers": None,
        "incorrect_answers": None,
    },
    {
        "source": "flan",
        "instruction": "Write a poem.",
        "models": ["a", "b", "c"],
        "completions": [  # honesty applies to no poem; one completion misses truthfulness
            completion("a", "Roses", "3", "N/A", "4", "2"),
            completion("b", "Violets", "1", "N/A", "1", "1"),
            completion("c", "Tulips", "5", "N/A", "N/A", "5"),
        ],
    },
]

NECTAR = [
    {
        "prompt": "\n\nHuman: Hello \n\nAssistant: ",
        "answers": [
            {"answer": "Go away", "model": "llama", "rank": 3.0},
            {"answer": "Hi", "model": "gpt-4", "rank": 1.0},
            {"answer": "Hey", "model": "gpt-3.5", "rank": 2.0},
            {"answer": "Ho", "model": "claude", "rank": 2.0},
        ],
        "turns": 1,
        "num_responses": 4,
        "source": ["sharegpt"],
        "good_natured": True,
    }
]


def steered(prompt, response, helpfulness, *others):
    names = ("correctness", "coherence", "complexity", "verbosity")
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpfulness,
        **dict(zip(names, others or (4, 4, 2, 1), strict=True)),
    }


HELPSTEER2 = [
    steered("Why?", "Because.", 1),
    steered("Why?", "It depends on the question.", 4, 3, 4, 2, 2),
    steered("How?", "So.", 2),
    steered("Why?", "Why not?", 1),
    steered("How?", "Thus.", 2),
]

SUMMARIZE = [
    {
        "info": {
            "id": "t3_x",
            "post": "My cat slept.",
            "title": "A cat",
            "subreddit": "cats",
            "site": None,
            "article": None,
        },
        "summaries": [
            {"text": " Cat slept.", "policy": "sup2", "note": "ok"},
            {"text": " The cat slept all day.", "policy": "ref", "note": None},
        ],
        "choice": 1,
        "worker": "w7",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 5},
    },
    {
        "info": {
            "id": "c1",
            "post": None,
            "title": "News",
            "subreddit": None,
            "site": "cnn",
            "article": "It rained.",
        },
        "summaries": [
            {"text": " Rain.", "policy": "ref", "note": None},
            {"text": " Sun.", "policy": "sup1", "note": None},
        ],
        "choice": 0,
        "worker": "w1",
        "batch": "cnndm0",
        "split": "valid1",
        "extra": {"confidence": None},
    },
]


def paired(qid, better, other):
    return {
        "qid": qid,
        "question": f"Question {qid}?",
        "date": "2020/01/01",
        "metadata": ["https://example.org", "https://example.org/q"],
        "response_j": better,
        "response_k": other,
    }


STACK_EXCHANGE = [  # question 1: a chain with a tie; 2: an order that no scores can say
    paired(1, "best", "good"),
    paired(2, "a", "c"),
    paired(1, "best", "poor"),
    paired(1, "good", "poor"),
    paired(1, "best", "fair"),
    paired(1, "fair", "poor"),
    paired(2, "b", "d"),
]


def comments(post, *sides, labels):
    (a, votes_a), (b, votes_b) = sides
    return {
        "post_id": post,
        "domain": "askbaking_train",
        "upvote_ratio": 0.99,
        "history": f"Post {post}",
        "c_root_id_A": f"id-{a}",
        "c_root_id_B": f"id-{b}",
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": votes_a,
        "score_B": votes_b,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": labels,
        "seconds_difference": 1.0,
        "score_ratio": 2.0,
    }


SHP = [
    comments("p1", ("Bake.", 52), ("Fry.", 54), labels=0),
    comments("p2", ("Yes", 9), ("No", 3), labels=1),
    comments("p1", ("Boil.", 54), ("Bake.", 52), labels=1),
]

PKU = [
    {
        "prompt": "How to climb?",
        "response_0": "With a rope.",
        "response_1": "Without a rope.",
        "prompt_source": "BeaverTails",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "WizardLM-30B",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "response_0_severity_level": 0,
        "response_1_severity_level": 2,
        "better_response_id": 1,
        "safer_response_id": 0,
        "response_0_sha256": "00",
        "response_1_sha256": "11",
    },
    {
        "prompt": "old layout",
        "response_0": "x",
        "response_1": "y",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    },
]

TURNS = ["<|prompter|>Hi", "<|assistant|>Hello", "<|prompter|>Bye", "<|assistant|>"]
PRO = [
    {
        "meta": {"path": "harmless-base/train.jsonl", "line_num": 1, "task": "dialogue"},
        "prefix": [TURNS, TURNS, TURNS],
        "suffix": ["Bye bye", "Farewell", "Go"],
        "reward": [0.5, 2.25, 0.5],
        "sft_index": 0,
    },
    {
        "meta": {"task": "summarize"},
        "prefix": ["POST: x\nTL;DR:", "POST: x\nTL;DR:", "POST: y\nTL;DR:"],
        "suffix": [" one", " two", " three"],
        "reward": [1.0, 1.0, 1.0],
        "sft_index": 0,
    },
]


def node(name, role, rank=None, replies=(), **more):
    return {
        "message_id": name,
        "user_id": "u",
        "text": f"text of {name}",
        "role": role,
        "lang": "en",
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "replies": list(replies),
        **more,
    }


TREE = {
    "message_tree_id": "root",
    "tree_state": "ready_for_export",
    "prompt": node(
        "root",
        "prompter",
        replies=[
            node("a", "assistant", 1),
            node(
                "b",
                "assistant",
                0,
                [
                    node(
                        "c",
                        "prompter",
                        replies=[
                            node("d", "assistant", 2, synthetic=True, model_name="gpt-x"),
                            node("e", "assistant", 0),
                            node("f", "assistant"),
                            node("g", "assistant", 1, deleted=True),
                        ],
                    ),
                    node("h", "prompter", 1, [node("i", "assistant")]),
                ],
            ),
        ],
    ),
}


def flattened(message, parent=None):
    """The messages of a tree as the hub has them: one row each, the children not always after the parent."""
    rest = {name: value for name, value in message.items() if name != "replies"}
    row = {"parent_id": parent, "message_tree_id": "root", "model_name": None, "tree_state": "ready", **rest}
    children = [own for reply in message["replies"] for own in flattened(reply, message["message_id"])]
    return [*children[:2], row, *children[2:]]


OASST_GROUPS = [
    ([("user", "root")], ["a", "b"], [-1, 0], ["human", "human"]),
    (
        [("user", "root"), ("assistant", "b"), ("user", "c")],
        ["d", "e"],
        [-2, 0],
        ["gpt-x", "human"],
    ),
]
OASST_EXPECTED = [
    (
        [{"role": role, "content": f"text of {name}"} for role, name in path],
        [f"text of {name}" for name in names],
        scores,
        sources,
    )
    for path, names, scores, sources in OASST_GROUPS
]

ALPACA_FARM = [
    {
        "instruction": "Add.",
        "input": "1 and 2",
        "output_1": "3",
        "output_2": "12",
        "preference": 1,
        "raw_preference": 1,
    },
    {"instruction": "Greet.", "input": "", "output_1": "Hi", "output_2": "Hello", "preference": 2},
]
ALPACA_EVAL = [
    {"generator_1": "davinci", "generator_2": "mine", "annotator": "gpt4", "dataset": "vicuna", **rest}
    for rest in (
        {"instruction": "i1", "output_1": "a", "output_2": "b", "preference": 1.75},
        {"instruction": "i2", "output_1": "a", "output_2": "b", "preference": 1.5},
        {"instruction": "i3", "output_1": "a", "output_2": "b", "preference": 0},
        {"instruction": "i4", "output_1": "a", "output_2": "b", "preference": None},
    )
]

LMFLOW = {
    "type": "text_to_scored_textlist",
    "instances": [
        {
            "input": "what's your name?",
            "output": [{"score": -0.8, "text": "I'm John"}, {"score": 1.0, "text": "My name is John"}],
        },
        {
            "input": "Who are you?",
            "output": [{"score": 1, "text": "Amy"}, {"score": 1, "text": "I'm Amy"}, {"text": "?"}],
        },
    ],
}
LMFLOW_EXPECTED = [
    ("what's your name?", ["I'm John", "My name is John"], [-0.8, 1], ["response-0", "response-1"]),
    ("Who are you?", ["Amy", "I'm Amy"], [1, 1], ["response-0", "response-1"]),
]

LLAMA_ALPACA = [
    {"instruction": "Sum up", "input": "a text", "chosen": "yes", "rejected": "no"},
    {"instruction": "Hi", "input": "", "chosen": "yes", "rejected": "no"},
    {
        "instruction": "And now?",
        "input": "",
        "system": "Be brief.",
        "history": [["First?", "One."]],
        "chosen": "Two.",
        "rejected": "Nothing.",
    },
]
LLAMA_SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "r"},
        ],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        "chosen": "good",
        "rejected": "bad",
    },
]


def said(*turns):
    return [{"role": role, "content": text} for role, text in turns]


PAIR = [1, 0], ["chosen", "rejected"]
THREAD = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"

#: Name of the case -> format, file name, rows (or one object), the groups it means.
CASES = {
    "ultrafeedback": (
        "ultrafeedback",
        "data.jsonl",
        ULTRAFEEDBACK,
        [
            (
                "Name a river.",
                ["A river.", "The Danube.", "The Rhine."],
                [1.5, 4.75, 4.75],
                ["alpaca-7b", "gpt-4", "bard"],
            ),
            ("Write a poem.", ["Roses", "Violets"], [3, 1], ["a", "b"]),
        ],
    ),
    "nectar": (
        "nectar",
        "data.parquet",
        NECTAR,
        [
            (
                "\n\nHuman: Hello \n\nAssistant: ",
                ["Go away", "Hi", "Hey", "Ho"],
                [-3, -1, -2, -2],
                ["llama", "gpt-4", "gpt-3.5", "claude"],
            )
        ],
    ),
    "helpsteer2": (
        "helpsteer2",
        "train.jsonl.gz",
        HELPSTEER2,
        [
            (
                "Why?",
                ["Because.", "It depends on the question.", "Why not?"],
                [1, 4, 1],
                ["response-0", "response-1", "response-2"],
            ),
            ("How?", ["So.", "Thus."], [2, 2], ["response-0", "response-1"]),
        ],
    ),
    "summarize_comparisons": (
        "summarize_comparisons",
        "batch3.json",
        SUMMARIZE,
        [
            (
                "SUBREDDIT: r/cats\n\nTITLE: A cat\n\nPOST: My cat slept.\n\nTL;DR:",
                [" Cat slept.", " The cat slept all day."],
                [0, 1],
                ["sup2", "ref"],
            ),
            ("It rained.\n\nTL;DR:", [" Rain.", " Sun."], [1, 0], ["ref", "sup1"]),
        ],
    ),
    "stack_exchange_paired": (
        "stack_exchange_paired",
        "data.parquet",
        STACK_EXCHANGE,
        [
            ("Question 1?", ["best", "good", "poor", "fair"], [2, 1, 0, 1], ["human"] * 4),
            ("Question 2?", ["a", "c"], [1, 0], ["human"] * 2),
            ("Question 2?", ["b", "d"], [1, 0], ["human"] * 2),
        ],
    ),
    "shp": (
        "shp",
        "askbaking/train.json",
        SHP,
        [
            ("Post p1", ["Bake.", "Fry.", "Boil."], [52, 54, 54], ["human"] * 3),
            ("Post p2", ["Yes", "No"], [9, 3], ["human"] * 2),
        ],
    ),
    "pku_saferlhf": (
        "pku_saferlhf",
        "train.jsonl",
        PKU,
        [
            ("How to climb?", ["With a rope.", "Without a rope."], [0, 1], ["Alpaca-7B", "WizardLM-30B"]),
            ("old layout", ["x", "y"], [1, 0], ["response-0", "response-1"]),
        ],
    ),
    "pku_saferlhf:safer": (
        "pku_saferlhf:safer",
        "train.jsonl",
        PKU,
        [
            ("How to climb?", ["With a rope.", "Without a rope."], [1, 0], ["Alpaca-7B", "WizardLM-30B"]),
            ("old layout", ["x", "y"], [0, 1], ["response-0", "response-1"]),
        ],
    ),
    "pro": (
        "pro",
        "train.json",
        PRO,
        [
            (
                THREAD,
                [" Bye bye", " Farewell", " Go"],
                [0.5, 2.25, 0.5],
                ["response-0", "response-1", "response-2"],
            ),
            ("POST: x\nTL;DR:", [" one", " two"], [1, 1], ["response-0", "response-1"]),
            ("POST: y\nTL;DR:", [" three"], [1], ["response-2"]),
        ],
    ),
    "oasst trees": ("oasst", "ready.trees.jsonl.gz", [TREE], OASST_EXPECTED),
    "oasst messages": ("oasst", "train.parquet", flattened(TREE["prompt"]), OASST_EXPECTED),
    "alpaca_farm": (
        "alpaca_farm",
        "alpaca_human_preference.json",
        ALPACA_FARM,
        [
            ("Add.\n\n1 and 2", ["3", "12"], [1, 0], ["output_1", "output_2"]),
            ("Greet.", ["Hi", "Hello"], [0, 1], ["output_1", "output_2"]),
        ],
    ),
    "alpaca_farm, weighted": (
        "alpaca_farm",
        "annotations.json",
        ALPACA_EVAL,
        [
            ("i1", ["a", "b"], [0.25, 0.75], ["davinci", "mine"]),
            ("i2", ["a", "b"], [0.5, 0.5], ["davinci", "mine"]),
            ("i3", ["a", "b"], [0.5, 0.5], ["davinci", "mine"]),
            ("i4", [], [], []),
        ],
    ),
    "lmflow": ("lmflow", "train.json", LMFLOW, LMFLOW_EXPECTED),
    "lmflow instances": ("lmflow", "train.jsonl", LMFLOW["instances"], LMFLOW_EXPECTED),
    "llama_factory": (
        "llama_factory",
        "data.json",
        LLAMA_ALPACA,
        [
            ("Sum up\na text", ["yes", "no"], *PAIR),
            ("Hi", ["yes", "no"], *PAIR),
            (
                said(
                    ("system", "Be brief."),
                    ("user", "First?"),
                    ("assistant", "One."),
                    ("user", "And now?"),
                ),
                ["Two.", "Nothing."],
                *PAIR,
            ),
        ],
    ),
    "llama_factory, conversations": (
        "llama_factory",
        "data.json",
        LLAMA_SHAREGPT,
        [
            (said(("user", "q"), ("assistant", "a"), ("user", "r")), ["good", "bad"], *PAIR),
            (said(("system", "s"), ("user", "q")), ["good", "bad"], *PAIR),
        ],
    ),
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Keep `datasets` from writing into the home folder."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def upstream(tmp_path):
    """Write rows in the file type that the name tells."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows, indent=2))
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        return path

    return write


def parts(groups):
    return [(group.prompt, group.responses, group.scores, group.sources) for group in groups]


@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_the_upstream_layout_becomes_the_groups_it_means(case, named, upstream, tmp_path):
    format, name, rows, expected = CASES[case]
    if not named and ":" in format:
        pytest.skip("a variant must be named")
    path = upstream(name, rows)
    groups = read_groups(path, format=format if named else "auto")
    assert sorted(map(repr, parts(groups))) == sorted(
        map(repr, [(p, r, [*map(float, s)], o) for p, r, s, o in expected])
    )
    if "oasst" not in case:  # flat messages come in the file's order
        assert [group.prompt for group in groups] == [group[0] for group in expected]
    assert all(
        group.origin["file"] == str(path) and ("line" in group.origin or "row" in group.origin) for group in groups
    )

    filled = [group for group in groups if group.responses]
    write_ranked(tmp_path / "ranked.jsonl", filled)
    assert parts(read_groups(tmp_path / "ranked.jsonl")) == parts(filled)


def test_every_importer_is_tested_here_or_with_the_simple_ones():
    simple = {"ranked", "rrhf", "preference", "hh", "rm_static"}
    assert {case[0] for case in CASES.values()} | simple == set(IMPORTERS)


def test_the_recipe_knows_every_importer():
    assert set(typing.get_args(Format)) == {"auto", *IMPORTERS}


def test_what_has_no_rating_is_kept_apart(upstream):
    first, second = read_groups(upstream("u.jsonl", ULTRAFEEDBACK))
    assert first.columns["unrated"] == [{"response": "", "source": "falcon"}]
    assert second.columns["unrated"] == [{"response": "Tulips", "source": "c"}]
    groups = read_groups(upstream("o.jsonl", [TREE]))
    assert [group.columns.get("unrated") for group in groups] == [None, [{"response": "text of f", "source": "human"}]]
    empty = read_groups(upstream("a.json", ALPACA_EVAL))[-1]
    assert [entry["source"] for entry in empty.columns["unrated"]] == ["davinci", "mine"]


def test_other_judgements_and_annotators_stay_in_meta(upstream):
    assert read_groups(upstream("p.jsonl", PKU))[0].columns["safer_response_id"] == 0
    assert read_groups(upstream("s.jsonl", SUMMARIZE))[0].columns["worker"] == "w7"
    assert read_groups(upstream("a.jsonl", ALPACA_EVAL))[0].columns["annotator"] == "gpt4"
    assert read_groups(upstream("h.jsonl", HELPSTEER2))[0].columns["ratings"][1]["correctness"] == 3
    assert read_groups(upstream("r.jsonl", SHP))[0].columns["comments"] == ["id-Bake.", "id-Fry.", "id-Boil."]
    assert read_groups(upstream("o.jsonl", [TREE]))[1].columns["message_id"] == "c"


def test_numbers_in_csv(tmp_path):
    path = tmp_path / "preferences.csv"
    path.write_text("instruction,output_1,output_2,preference\ni,a,b,2\ni,a,b,\ni,a,b,1.5\n")
    assert [group.scores for group in read_groups(path)] == [[0, 1], [], [0.5, 0.5]]
    path.write_text("prompt,response_0,response_1,better_response_id\np,a,b,1\n")
    assert read_groups(path)[0].scores == [0, 1]
    path.write_text("prompt,response_0,response_1,better_response_id\np,a,b,first\n")
    with pytest.raises(UserError, match=r"better_response_id is text, not a number"):
        read_groups(path)


def test_a_comment_with_two_vote_counts_is_left_for_the_clean_up(upstream):
    rows = [comments("p", ("a", 5), ("b", 3), labels=1), comments("p", ("a", 7), ("c", 1), labels=1)]
    (group,) = read_groups(upstream("x.jsonl", rows))
    assert list(zip(group.responses, group.scores, strict=True)) == [("a", 5), ("b", 3), ("a", 7), ("c", 1)]


pairs = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abcde")), min_size=1, max_size=12)


@settings(deadline=None)
@given(pairs)
def test_stack_exchange_groups_order_what_the_pairs_order_and_nothing_else(given_pairs):
    rows = [Row(paired(1, better, other), "f", line=1) for better, other in given_pairs]
    implied = {pair for pair in given_pairs if pair[0] != pair[1]}
    while more := {(a, d) for a, b in implied for c, d in implied if b == c} - implied:
        implied |= more
    ordered = set()
    for group in IMPORTERS["stack_exchange_paired"].read(rows):
        for (one, high), (other, low) in itertools.permutations(zip(group.responses, group.scores, strict=True), 2):
            if high > low:
                ordered.add((one, other))
    assert {pair for pair in given_pairs if pair[0] != pair[1]} <= ordered <= implied


BAD = {
    "pku id": ("pku_saferlhf", {**PKU[0], "better_response_id": 2}, r"better_response_id is 2, not a whole number"),
    "choice": ("summarize_comparisons", {**SUMMARIZE[0], "choice": None}, r"choice is null or missing, not a number"),
    "info": ("summarize_comparisons", {**SUMMARIZE[0], "info": "post"}, r"info is text, not an object"),
    "preference": ("alpaca_farm", {**ALPACA_FARM[0], "preference": -1}, r"preference is -1\. It is 1 or 2"),
    "labels": ("shp", {**SHP[0], "labels": 1}, r"labels contradicts score_A and score_B"),
    "lmflow type": ("lmflow", {"type": "text2text", "instances": []}, r"type is 'text2text'"),
    "nested field": (
        "lmflow",
        {"instances": [{"input": "q", "output": [{"text": 3, "score": 1}]}]},
        r"instances\[0\]\.output\[0\]\.text is a number, not text",
    ),
    "rank no number": (
        "nectar",
        {"prompt": "p", "answers": [{"answer": "a", "model": "m", "rank": [1]}]},
        r"answers\[0\]\.rank is a list, not a number",
    ),
    "prefixes": ("pro", {**PRO[0], "prefix": [TURNS]}, r"prefix has 1 entries for 3 of suffix"),
    "role": (
        "oasst",
        {**TREE, "prompt": node("x", "narrator")},
        r"prompt\.role is 'narrator', not prompter or assistant",
    ),
    "orphan": ("oasst", {**node("x", "assistant"), "parent_id": "lost"}, r"parent_id 'lost' is no message"),
    "tools": (
        "llama_factory",
        {**LLAMA_SHAREGPT[0], "conversations": [{"from": "observation", "value": "v"}]},
        r"conversations\[0\]\.from is 'observation'",
    ),
    "the assistant's turn": (
        "llama_factory",
        {**LLAMA_SHAREGPT[0], "conversations": [{"from": "gpt", "value": "v"}]},
        r"conversations must end with a message from human",
    ),
    "history": ("llama_factory", {**LLAMA_ALPACA[2], "history": [["q"]]}, r"history\[0\] is not a pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_say_where_and_what(case, upstream):
    format, row, problem = BAD[case]
    path = upstream("bad.jsonl", [row])
    with pytest.raises(UserError, match=problem) as caught:
        read_groups(path, format=format)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert "\n" not in str(caught.value)


def test_a_file_without_any_group_says_so(upstream):
    lone = {"message_tree_id": "t", "tree_state": "x", "prompt": node("t", "prompter")}
    with pytest.raises(UserError, match=r"no group was found in the rows of format oasst"):
        read_groups(upstream("lone.jsonl", [lone]), format="oasst")


def test_one_json_object_over_many_lines_may_be_broken(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{\n"type": "x",\n"instances" [\n]}')
    with pytest.raises(UserError, match=r"x\.json:3: this is not valid JSON"):
        read_groups(path)
