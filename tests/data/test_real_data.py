"""On real files the report says what an independent count finds: duplicates, empties, ties, lengths."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from rrhf_peft.data import GroupCollator, read_groups, source_names, tokenize_groups

FILES = {"fgrlhf_dev_k4": 500, "hh_harmless_test_k2": 2307, "alpaca_eval_k16_300": 300}
NO_LIMIT = 10**6


@pytest.fixture(scope="module", params=FILES)
def rows(request, shared_data):
    """The file's rows as json reads them, and the path."""
    path = shared_data / "ranked" / f"{request.param}.jsonl"
    return path, [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("kind", ["stories_tokenizer", "llama2_tokenizer"])
def test_the_report_tells_the_truth(rows, kind, request):
    path, raw = rows
    tokenizer = request.getfixturevalue(kind)
    assert len(raw) == FILES[path.stem]
    groups = read_groups(path)
    kept, report = tokenize_groups(groups, tokenizer, max_tokens=NO_LIMIT)

    def ids_of(text, prompt=""):
        """The text behind its prompt; behind a line break or full stop, where it would merge with that."""
        for before in (prompt, "\n", "."):
            start, whole = (tokenizer.encode(part, add_special_tokens=False) for part in (before, before + text))
            if whole[: len(start)] == start:
                return tuple(whole[len(start) :])
        raise AssertionError(text)

    counts = Counter()
    for row in raw:
        filled = [(text, score) for text, score in zip(row["responses"], row["scores"], strict=True) if text.strip()]
        scores: dict[tuple[int, ...], list[float]] = {}
        for text, score in filled:
            scores.setdefault(ids_of(text, row["prompt"]), []).append(score)
        counts["empty"] += len(row["responses"]) - len(filled)
        counts["equal_text"] += len(filled) - len({text for text, _ in filled})
        counts["equal_tokens"] += len({text for text, _ in filled}) - len(scores)
        counts["conflicts"] += sum(len(set(own)) > 1 for own in scores.values())
        counts["dropped"] += len({sum(own) / len(own) for own in scores.values()}) < 2
    pairs = [pair for row in raw for pair in itertools.combinations(row["scores"], 2)]

    assert report.groups_read == len(raw)
    assert report.responses_read == sum(len(row["responses"]) for row in raw)
    assert report.empty_responses == counts["empty"]
    assert report.duplicates_merged == {how: counts[how] for how in ("equal_text", "equal_tokens") if counts[how]}
    assert report.conflicting_duplicates == counts["conflicts"]
    assert report.tie_rate_read == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert sum(report.groups_dropped.values()) == counts["dropped"] == len(raw) - report.groups_kept
    assert (report.prompts_truncated, report.responses_truncated) == (0, 0)

    for own in kept[:: len(kept) // 20]:
        row = raw[own.index]
        assert list(own.prompt_ids) == [tokenizer.bos_token_id, *ids_of(row["prompt"])]
        expected = dict.fromkeys(ids_of(text, row["prompt"]) for text in row["responses"] if text.strip())
        assert [tuple(ids) for ids in own.response_ids] == [(*ids, tokenizer.eos_token_id) for ids in expected]
        if kind == "llama2_tokenizer":  # which can write every character
            assert text_of(tokenizer, own.prompt_ids[1:]) == row["prompt"].strip()
            assert text_of(tokenizer, own.response_ids[0][:-1]) in {text.strip() for text in row["responses"]}


def text_of(tokenizer, ids):
    return tokenizer.decode(list(ids)).strip()


def test_truncated_lengths_keep_the_limit(rows, llama2_tokenizer):
    path, _ = rows
    kept, report = tokenize_groups(read_groups(path), llama2_tokenizer, max_tokens=192, max_prompt_tokens=128)
    longest = [len(own.prompt_ids) + max(map(len, own.response_ids)) for own in kept]
    assert max(longest) == 192
    assert max(len(own.prompt_ids) for own in kept) <= 128
    cut = sum(ids[-1] != llama2_tokenizer.eos_token_id for own in kept for ids in own.response_ids)
    assert 0 < cut <= report.responses_truncated
    assert report.tokens == sum(len(own.prompt_ids) + sum(map(len, own.response_ids)) for own in kept)


def test_what_is_known_about_these_files(shared_data, stories_tokenizer):
    """Counted by hand once, so that reader and count cannot be wrong together."""
    folder = shared_data / "ranked"
    report = tokenize_groups(read_groups(folder / "alpaca_eval_k16_300.jsonl"), stories_tokenizer, max_tokens=NO_LIMIT)[
        1
    ]
    assert report.empty_responses == 5
    assert set(report.k_histogram) <= set(range(2, 17))
    assert len(report.sources) == 16
    report = tokenize_groups(read_groups(folder / "hh_harmless_test_k2.jsonl"), stories_tokenizer, max_tokens=NO_LIMIT)[
        1
    ]
    assert (report.empty_responses, report.groups_dropped) == (4, {"single_response": 4})
    assert report.repeated_prompts == 2


def test_a_batch_of_sixteen_responses(shared_data, stories_tokenizer):
    groups = read_groups(shared_data / "ranked" / "alpaca_eval_k16_300.jsonl", max_groups=8)
    kept, _ = tokenize_groups(groups, stories_tokenizer, template="alpaca")
    batch = GroupCollator(source_names(kept))(kept)
    assert Counter(batch["group"].tolist()) == {n: len(own.response_ids) for n, own in enumerate(kept)}
    assert len(batch["input_ids"]) == batch["prompt_lengths"].sum() + batch["response_lengths"].sum()
