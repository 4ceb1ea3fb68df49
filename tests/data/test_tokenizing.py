"""Sequences have one BOS, one EOS and the promised length; what is dropped, cut or merged is counted."""

from __future__ import annotations

import copy
import logging
import random
from array import array

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rrhf_peft.data import tokenize_groups
from rrhf_peft.records import RankedGroup, UserError

BOS, EOS = 1, 2


def group(prompt="prompt", responses=("a", "b"), scores=None, sources=None, **origin):
    scores = list(range(len(responses), 0, -1)) if scores is None else list(scores)
    sources = sources or [f"s{n}" for n in range(len(responses))]
    return RankedGroup(prompt, list(responses), [float(score) for score in scores], list(sources), origin=origin)


def one(tokenizer, own, **keys):
    (tokenized,), report = tokenize_groups([own], tokenizer, **keys)
    return tokenized, report


@pytest.fixture
def no_bos(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.bos_token = None
    return tokenizer


def test_one_bos_one_eos_and_nothing_between(byte_tokenizer):
    tokenized, _ = one(byte_tokenizer, group("ab", ["cd", "e"]))
    ids = dict(zip("abcde", byte_tokenizer.convert_tokens_to_ids(list("abcde")), strict=True))
    assert list(tokenized.prompt_ids) == [BOS, ids["a"], ids["b"]]
    assert [list(response) for response in tokenized.response_ids] == [[ids["c"], ids["d"], EOS], [ids["e"], EOS]]
    assert tokenized.prompt_ids.typecode == tokenized.response_ids[0].typecode == "i"
    assert (tokenized.scores, tokenized.sources, tokenized.index) == ([2.0, 1.0], ["s0", "s1"], 0)


def test_a_bos_that_the_prompt_brings_is_not_doubled(byte_tokenizer):
    assert one(byte_tokenizer, group("<s>ab"))[0].prompt_ids == one(byte_tokenizer, group("ab"))[0].prompt_ids


def test_an_eos_that_the_response_brings_is_not_doubled(byte_tokenizer):
    tokenized, _ = one(byte_tokenizer, group("p", ["ab</s>", "c"]))
    assert [list(ids).count(EOS) for ids in tokenized.response_ids] == [1, 1]
    assert len(tokenized.response_ids[0]) == 3


def test_special_tokens_spelled_out_in_a_response_are_plain_text(byte_tokenizer):
    tokenized, _ = one(byte_tokenizer, group("p", ["<s>struck</s> out", "c"]))
    assert list(tokenized.response_ids[0]).count(EOS) == 1
    assert BOS not in tokenized.response_ids[0]
    assert len(tokenized.response_ids[0]) == len("<s>struck</s> out") + 1
    assert byte_tokenizer("</s>", add_special_tokens=False)["input_ids"] == [EOS]  # the tokenizer is left as it was


def test_without_bos_none_is_added_and_an_empty_prompt_starts_with_eos(no_bos):
    assert len(one(no_bos, group("ab"))[0].prompt_ids) == 2
    tokenized, report = one(no_bos, group(""))
    assert list(tokenized.prompt_ids) == [EOS]
    assert report.empty_prompts == 1


def test_an_empty_prompt_with_bos_is_the_bos(byte_tokenizer):
    tokenized, report = one(byte_tokenizer, group(""))
    assert list(tokenized.prompt_ids) == [BOS]
    assert report.empty_prompts == 1
    assert one(byte_tokenizer, group("p"))[1].empty_prompts == 0


def test_a_tokenizer_without_eos_is_an_error(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        tokenize_groups([group()], tokenizer)


def test_an_overlong_prompt_loses_its_beginning_but_not_its_bos(byte_tokenizer):
    whole, _ = one(byte_tokenizer, group("abcdef"))
    cut, report = one(byte_tokenizer, group("abcdef"), max_prompt_tokens=4)
    assert list(cut.prompt_ids) == [BOS, *whole.prompt_ids[-3:]]
    assert report.prompts_truncated == 1
    exact, report = one(byte_tokenizer, group("abc"), max_prompt_tokens=4)
    assert (len(exact.prompt_ids), report.prompts_truncated) == (4, 0)
    assert list(one(byte_tokenizer, group("abc"), max_prompt_tokens=1)[0].prompt_ids) == [BOS]


def test_an_overlong_prompt_without_bos_keeps_its_end(no_bos):
    whole, _ = one(no_bos, group("abcdef"))
    assert list(one(no_bos, group("abcdef"), max_prompt_tokens=2)[0].prompt_ids) == list(whole.prompt_ids[-2:])


@pytest.mark.parametrize(
    ("prompt", "responses", "max_tokens", "prompt_length", "response_lengths"),
    [
        ("abc", ["x", "xyz"], 8, 4, [2, 4]),  # all fits exactly
        ("abcd", ["x", "xyz"], 8, 4, [2, 4]),  # the prompt makes room for the longest response
        ("abcdefgh", ["x", "y"], 8, 6, [2, 2]),
        ("abcdefgh", ["x", "y", " " * 9], 8, 6, [2, 2]),  # a rejected response needs no room
        ("abcdefgh", ["x", "xyzxyzxyz"], 8, 4, [2, 4]),  # but keeps half
        ("ab", ["x", "xyzxyzxyz"], 8, 3, [2, 5]),  # and a short prompt is not cut at all
        ("abcdefgh", ["xyzxyz", "yxzyxz"], 7, 4, [3, 3]),  # the odd token is the prompt's
        ("abcdefgh", ["xy", "yx"], 2, 1, [1, 1]),
    ],
)
def test_without_a_prompt_limit_the_longest_response_gets_up_to_half(
    byte_tokenizer, prompt, responses, max_tokens, prompt_length, response_lengths
):
    tokenized, report = one(byte_tokenizer, group(prompt, responses), max_tokens=max_tokens)
    assert len(tokenized.prompt_ids) == prompt_length
    assert [len(ids) for ids in tokenized.response_ids] == response_lengths
    assert report.prompts_truncated == (prompt_length < len(prompt) + 1)
    assert report.settings["max_prompt_tokens"] is None


def test_without_a_prompt_limit_each_group_has_its_own(byte_tokenizer):
    groups = [group("a" * 7, ["x" * 4, "y"]), group("a" * 7, ["x", "y"])]
    kept, report = tokenize_groups(groups, byte_tokenizer, max_tokens=10, overlong_prompt="drop")
    assert ([own.index for own in kept], report.groups_dropped) == ([1], {"overlong_prompt": 1})
    with pytest.raises(UserError, match=r"group 0: the prompt has 8 tokens and the limit is 5\."):
        tokenize_groups(groups, byte_tokenizer, max_tokens=10, overlong_prompt="error")


def test_an_overlong_response_loses_its_end_and_eos(byte_tokenizer):
    tokenized, report = one(byte_tokenizer, group("p", ["abc", "abcd", "xyz"]), max_tokens=6)
    lengths = [len(ids) for ids in tokenized.response_ids]
    assert lengths == [4, 4, 4]
    assert [ids[-1] == EOS for ids in tokenized.response_ids] == [True, False, True]
    assert report.responses_truncated == 1


def test_dropped_prompts_are_counted_and_nothing_else_of_them(byte_tokenizer):
    groups = [group("a" * 9, ["", "x"]), group("a", ["x", "y"])]
    kept, report = tokenize_groups(groups, byte_tokenizer, max_prompt_tokens=5, overlong_prompt="drop")
    assert [own.index for own in kept] == [1]
    assert report.groups_dropped == {"overlong_prompt": 1}
    assert (report.responses_in_dropped_groups, report.empty_responses, report.prompts_truncated) == (2, 0, 0)


@pytest.mark.parametrize(
    ("origin", "where"),
    [({"file": "f.jsonl", "line": 12}, r"f\.jsonl:12"), ({"file": "a/b", "row": 0}, r"a/b: row 0"), ({}, "group 1")],
)
def test_an_overlong_prompt_can_be_an_error_that_names_the_group(byte_tokenizer, origin, where):
    groups = [group("a"), group("a" * 9, **origin)]
    with pytest.raises(UserError, match=rf"^{where}.* has 10 tokens and the limit is 5\. Raise data\.max"):
        tokenize_groups(groups, byte_tokenizer, max_prompt_tokens=5, overlong_prompt="error")


@pytest.mark.parametrize(
    "keys", [{"max_prompt_tokens": 8, "max_tokens": 8}, {"max_tokens": 1}, {"max_prompt_tokens": 0}]
)
def test_impossible_limits(byte_tokenizer, keys):
    with pytest.raises(UserError, match="leave no room"):
        tokenize_groups([group()], byte_tokenizer, **keys)


def test_an_unknown_choice_for_overlong_prompts(byte_tokenizer):
    with pytest.raises(UserError, match="Use truncate, drop or error"):
        tokenize_groups([group()], byte_tokenizer, overlong_prompt="cut")


def test_empty_and_blank_responses_are_rejected(byte_tokenizer):
    tokenized, report = one(byte_tokenizer, group("p", ["", "a", " \n\t", "</s>", "b"]))
    assert tokenized.sources == ["s1", "s4"]
    assert (report.empty_responses, report.responses_kept) == (3, 2)


def test_duplicates_with_one_score_stay_once(byte_tokenizer):
    tokenized, report = one(byte_tokenizer, group("p", ["a", "b", "a"], [0.1, 2, 0.1]))
    assert (tokenized.scores, tokenized.sources) == ([0.1, 2.0], ["s0 & s2", "s1"])
    assert (report.duplicates_merged, report.conflicting_duplicates) == ({"equal_text": 1}, 0)


def test_duplicates_with_different_scores_get_the_mean(byte_tokenizer):
    tokenized, report = one(byte_tokenizer, group("p", ["a", "b", "a", "a"], [1, 9, 2, 6]))
    assert tokenized.scores == [3.0, 9.0]
    assert (report.duplicates_merged, report.conflicting_duplicates) == ({"equal_text": 2}, 1)


def test_a_mean_that_ties_everything_drops_the_group(byte_tokenizer):
    kept, report = tokenize_groups([group("p", ["a", "b", "a"], [0, 1, 2]), group()], byte_tokenizer)
    assert ([own.index for own in kept], report.groups_dropped) == ([1], {"no_ordered_pair": 1})


def test_texts_that_only_truncation_makes_equal_are_duplicates(byte_tokenizer):
    tokenized, report = one(byte_tokenizer, group("p", ["abcX", "abcY", "xyz", "abcY"]), max_tokens=5)
    assert len(tokenized.response_ids) == 2
    assert report.duplicates_merged == {"equal_after_truncation": 1, "equal_text": 1}


def test_texts_with_the_same_tokens_are_duplicates(stories_tokenizer):
    """This tokenizer has no asterisk."""
    _, report = one(stories_tokenizer, group("p", [" Yes", " No", " Yes*"], [1, 0, 1]))
    assert report.duplicates_merged == {"equal_tokens": 1}
    assert report.lost_characters == {"*": 1}


def test_what_the_template_makes_equal_is_equal_text(byte_tokenizer):
    assert one(byte_tokenizer, group("p", ["Yes", "No", " Yes"], [1, 0, 1]), template="raw")[1].duplicates_merged == {}
    for template in ("hh", "alpaca"):
        _, report = one(byte_tokenizer, group("p", ["Yes", "No", " Yes"], [1, 0, 1]), template=template)
        assert report.duplicates_merged == {"equal_text": 1}


def test_groups_without_a_pair_are_dropped_by_reason(byte_tokenizer):
    groups = [
        group("p", ["a", "b"], [1, 1]),
        group("p", ["a"]),
        group("p", ["", " "]),
        group("p", ["a", "a"]),
        group("p", ["a", "b"], [1, 1.4]),
        group("p", ["a", "b"], [1, 2]),
    ]
    kept, report = tokenize_groups(groups, byte_tokenizer, min_score_gap=0.5)
    assert [own.index for own in kept] == [5]
    assert report.groups_dropped == {"no_ordered_pair": 2, "single_response": 2, "no_response": 1}
    assert (report.groups_read, report.groups_kept, report.responses_in_dropped_groups) == (6, 1, 6)


def test_fine_tuning_needs_no_pair(byte_tokenizer):
    groups = [group("p", ["a", "b"], [1, 1]), group("p", ["a"]), group("p", [""])]
    kept, report = tokenize_groups(groups, byte_tokenizer, needs_pairs=False)
    assert ([own.index for own in kept], report.groups_dropped) == ([0, 1], {"no_response": 1})
    assert report.score_length_correlation is None


def test_no_data_left_says_why_and_what_to_do(byte_tokenizer):
    groups = [group("p", ["a", "b"], [1, 1]), group("p", ["a"]), group("p", [" "])]
    with pytest.raises(UserError, match=r"of 3 groups read, 1 have no two .*; 1 have a single .*; 1 have only"):
        tokenize_groups(groups, byte_tokenizer)
    with pytest.raises(UserError, match="no groups to train on"):
        tokenize_groups([], byte_tokenizer)


def test_lengths_beyond_the_models_are_not_warned_about(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.model_max_length = 8
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenize_groups([group("p" * 100, ["a" * 100, "b"])], tokenizer, max_tokens=300)
        assert heard == []
        tokenizer(["p" * 100])  # it would have been heard
        assert "longer than the specified maximum" in heard[0]
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def test_more_groups_than_one_batch_keep_their_order(byte_tokenizer):
    groups = [group(f"prompt {n}", [f"a{n}", f"b{n}", "c"][: 2 + n % 2]) for n in range(600)]
    kept, _ = tokenize_groups(groups, byte_tokenizer)
    assert [own.index for own in kept] == list(range(600))
    for own in (kept[0], kept[255], kept[256], kept[599]):
        assert byte_tokenizer.decode(own.prompt_ids[1:]) == f"prompt {own.index}"
        assert byte_tokenizer.decode(own.response_ids[1][:-1]) == f"b{own.index}"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
score = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1e9])
rows = st.lists(st.tuples(texts, score, st.sampled_from("xyz")), min_size=1, max_size=32)


@settings(deadline=None, max_examples=150)
@given(
    data=st.lists(st.tuples(texts, rows), min_size=1, max_size=5),
    max_tokens=st.integers(2, 40),
    needs_pairs=st.booleans(),
    gap=st.sampled_from([0.0, 0.6]),
    template=st.sampled_from(["raw", "hh", "alpaca"]),
    seed=st.integers(0, 99),
)
def test_what_always_holds(byte_tokenizer, data, max_tokens, needs_pairs, gap, template, seed):
    groups = [RankedGroup(prompt, *map(list, zip(*own, strict=True))) for prompt, own in data]
    keys = {"max_tokens": max_tokens, "needs_pairs": needs_pairs, "min_score_gap": gap, "template": template}
    try:
        kept, report = tokenize_groups(groups, byte_tokenizer, **keys)
    except UserError:
        assume(False)  # nothing is left
    for own in kept:
        assert isinstance(own.prompt_ids, array)
        assert own.prompt_ids[0] == BOS
        assert BOS not in own.prompt_ids[1:]
        assert all(1 <= len(ids) <= max_tokens - len(own.prompt_ids) for ids in own.response_ids)
        assert all(EOS not in ids[:-1] and BOS not in ids for ids in own.response_ids)
        assert len({ids.tobytes() for ids in own.response_ids}) == len(own.response_ids) == len(own.scores)
        assert not needs_pairs or max(own.scores) - min(own.scores) > gap
    assert report.groups_read == len(groups) == report.groups_kept + sum(report.groups_dropped.values())
    accounted = report.empty_responses + sum(report.duplicates_merged.values()) + report.responses_in_dropped_groups
    assert report.responses_read == report.responses_kept + accounted == sum(len(own) for _, own in data)
    assert report.responses_kept == sum(k * count for k, count in report.k_histogram.items())

    # The order of a group's responses changes neither what stays nor its scores.
    shuffler = random.Random(seed)
    mixed = [RankedGroup(prompt, *map(list, zip(*shuffler.sample(own, len(own)), strict=True))) for prompt, own in data]
    again, other = tokenize_groups(mixed, byte_tokenizer, **keys)
    assert [scored(own) for own in again] == [scored(own) for own in kept]
    assert other.duplicates_merged == report.duplicates_merged
    assert other.conflicting_duplicates == report.conflicting_duplicates


def scored(own):
    pairs = sorted(zip((ids.tobytes() for ids in own.response_ids), own.scores, strict=True))
    return own.index, [(ids, pytest.approx(score)) for ids, score in pairs]
