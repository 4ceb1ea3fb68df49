"""The judge against a server that does all that servers do wrong: nothing lost, nothing invented, all counted."""

from __future__ import annotations

import builtins
import json
import random
import traceback
from collections import Counter

import pytest
from judge_server import judge_server, labelled_in, response_in

from rrhf_peft.data import read_groups
from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import UserError
from rrhf_peft.score.judge import BadReplyError, parse_aspects, parse_ranks
from rrhf_peft.score.run import score_recipe

ASPECTS = ("relevance", "correctness", "coherence", "safety")


def write_candidates(path, groups=12, k=4):
    rows = [
        {
            "prompt": f"question {g}",
            "responses": [f"answer {g}.{i}" for i in range(k)],
            "sources": [f"policy-{i}" for i in range(k)],
            "meta": {"group": g, "candidates": [{"number": i} for i in range(k)]},
        }
        for g in range(groups)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run(tmp_path, url, *, overwrite=False, **scorer):
    settings = {"name": "judge", "base_url": url, "model": "judge", "first_wait": 0.01, "timeout": 5.0, **scorer}
    recipe = make_recipe(
        {
            "scoring": {
                "input": str(tmp_path / "candidates.jsonl"),
                "output": str(tmp_path / "scored.jsonl"),
                "unit_groups": 4,
                "scorer": settings,
            }
        },
        needs=["scoring"],
    )
    return score_recipe(recipe, overwrite=overwrite)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def true_aspects(response):
    """What the scripted judge thinks of `answer g.i`."""
    group, place = (int(number) for number in response.removeprefix("answer ").split("."))
    return {name: (group + place * (weight + 1)) % 11 for weight, name in enumerate(ASPECTS)}


def honest(messages):
    return json.dumps(true_aspects(response_in(messages)))


def test_passing_faults_lose_nothing(tmp_path):
    candidates = write_candidates(tmp_path / "candidates.jsonl")
    faults = random.Random(1)
    broken = {}

    def script(call):
        """The first one or two attempts at most requests meet a fault that passes."""
        text = call["messages"][-1]["content"]
        if text not in broken:
            broken[text] = faults.choices(
                [[], ["429"], ["500"], ["cut"], ["slow"], ["bad"], ["429", "cut"]], weights=[2, 2, 2, 2, 1, 2, 2]
            )[0]
        if call["attempt"] <= len(broken[text]):
            return {
                "429": ("status", 429, {"Retry-After": "0"}),
                "500": ("status", 500),
                "cut": "cut",
                "slow": ("slow", 1.5, honest(call["messages"])),
                "bad": "Here you are: 7 out of 10",
            }[broken[text][call["attempt"] - 1]]
        return honest(call["messages"])

    with judge_server(script) as (url, server):
        outcome = run(tmp_path, url, concurrency=4, timeout=1.0)
    rows = rows_of(outcome.output)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in candidates]
    for row, candidate in zip(rows, candidates, strict=True):
        assert row["responses"] == candidate["responses"]
        assert row["meta"] == candidate["meta"]
        for place, response in enumerate(row["responses"]):
            expected = true_aspects(response)
            assert row["scores"][place] == pytest.approx(sum(expected.values()) / 4)
            assert {name: row["raw_scores"][f"judge.{name}"][place] for name in ASPECTS} == expected
    assert outcome.failures is None
    counts = outcome.report.counts
    flat = [fault for own in broken.values() for fault in own]
    assert {"429", "500", "cut", "slow", "bad"} <= set(flat)
    assert counts["http 429"] == flat.count("429")
    assert counts["http 500"] == flat.count("500")
    assert counts["timeout"] == flat.count("slow")
    assert counts["connection"] == flat.count("cut")
    assert counts["bad reply: not JSON"] == flat.count("bad")
    assert counts["requests"] == len(server.calls) == 48 + len(flat)
    assert counts["retries"] == len(flat) - flat.count("bad")
    assert counts["prompt_tokens"] == 10 * counts["answers"]
    assert server.most_at_once <= 4 + flat.count("slow")  # the server does not see that a client has left


def test_lasting_faults_are_kept_with_their_reasons_and_become_no_score(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl")
    faults = {
        "answer 0.0": "no JSON at all",
        "answer 1.1": json.dumps({"relevance": 5, "correctness": 5, "coherence": 5}),
        "answer 2.2": ("status", 503),
        "answer 3.3": json.dumps(dict.fromkeys(ASPECTS, 11)),
        "answer 4.0": json.dumps({**dict.fromkeys(ASPECTS, 3), "safety": "9"}),
        "answer 5.1": "cut",
        "answer 6.2": ("status", 400),
        "answer 7.0": ("body", b"<html>gateway</html>"),
        "answer 8.0": '{"relevance": 1, "relevance": 9, "correctness": 1, "coherence": 1, "safety": 1}',
        "answer 9.0": json.dumps({**dict.fromkeys(ASPECTS, 3), "safety": float("nan")}),
        # a group of which a single response remains
        "answer 10.0": "?",
        "answer 10.1": "?",
        "answer 10.2": "?",
    }

    def script(call):
        return faults.get(response_in(call["messages"])) or honest(call["messages"])

    with judge_server(script) as (url, _):
        outcome = run(tmp_path, url, max_retries=1)
    rows, failed = rows_of(outcome.output), rows_of(outcome.failures)
    assert len(rows) == 11
    assert [row["prompt"] for row in failed] == [f"question {g}" for g in range(11)]
    kept = {row["prompt"]: row for row in rows}
    assert "question 10" not in kept
    for group in range(10):
        response = next(text for text in faults if text.startswith(f"answer {group}."))
        place = int(response[-1])
        row = kept[f"question {group}"]
        assert response not in row["responses"]
        assert len(row["scores"]) == len(row["sources"]) == len(row["raw_scores"]["judge.safety"]) == 3
        assert row["meta"]["kept"] == [i for i in range(4) if i != place]
        assert [about["number"] for about in row["meta"]["candidates"]] == row["meta"]["kept"]
        assert list(failed[group]["left_out"]) == [str(place)]
        assert failed[group]["group_kept"] is True
    assert failed[10]["group_kept"] is False
    reasons = [next(iter(row["left_out"].values())) for row in failed]
    for reason, expected in zip(
        reasons,
        ["not JSON", "missing aspect", "http 503", "outside the scale", "no number", "connection", "http 400",
         "malformed body", "key given twice", "outside the scale", "not JSON"],
        strict=True,
    ):  # fmt: skip
        assert expected in reason
    report = outcome.report
    assert sum(report.failures.values()) == 13
    assert report.lost_with_group == 1
    assert report.responses_kept == 48 - 13 - 1
    assert report.counts["bad reply: missing aspect"] == 2  # asked for twice
    assert json.loads((tmp_path / "scored.report.json").read_text())["failures"] == report.failures
    assert len(read_groups(str(outcome.output), format="ranked")) == 11


def test_odd_answers_cost_their_own_response_and_say_why(tmp_path):
    """Refusals with the server's words, answers without text, bodies that are no completion, usage without numbers."""
    write_candidates(tmp_path / "candidates.jsonl")

    def body(content, **more):
        message = {"role": "assistant", "content": content}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return ("body", json.dumps({"id": "x", "object": "chat.completion", "choices": choices, **more}).encode())

    odd = {
        "answer 0.0": ("body", json.dumps({"choices": []}).encode()),
        "answer 1.0": ("body", b"[1, 2]"),
        "answer 2.0": ("body", b"null"),
        "answer 3.0": body(None),
        "answer 4.0": body(7),
        "answer 5.0": ("status", 400),
        "answer 6.0": ("status", 422),
        "answer 7.0": ("body", b"\xff\xfe"),
    }

    def script(call):
        response = response_in(call["messages"])
        if response.startswith("answer 8."):
            return body(honest(call["messages"]), usage={"prompt_tokens": "many", "completion_tokens": None})
        if response.startswith("answer 9."):
            return body(honest(call["messages"]), usage=[3])
        return odd.get(response) or honest(call["messages"])

    with judge_server(script) as (url, _):
        outcome = run(tmp_path, url, max_retries=1)
    failed = {row["prompt"]: row["left_out"]["0"] for row in rows_of(outcome.failures)}
    assert sorted(failed) == [f"question {g}" for g in range(8)]
    for group, expected in enumerate(
        ["malformed body", "malformed body", "malformed body", "no text", "no text", "http 400: scripted 400",
         "http 422: scripted 422", "malformed body"]
    ):  # fmt: skip
        assert expected in failed[f"question {group}"]
    rows = rows_of(outcome.output)
    assert [len(row["responses"]) for row in rows] == [3] * 8 + [4] * 4
    assert outcome.report.failures == dict(Counter(failed.values()))


def test_a_key_that_the_server_echoes_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-0123456789")
    write_candidates(tmp_path / "candidates.jsonl")
    echo = ("status", 401, {"X": "sk-secret-0123456789"}, "Incorrect API key provided: sk-secret-0123456789.")
    with judge_server(lambda call: echo) as (url, _), pytest.raises(UserError, match="http 401") as caught:
        run(tmp_path, url, api_key_env="MY_KEY")
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


def test_trying_harder_continues_what_was_finished(tmp_path):
    """Retries, concurrency, time-outs and the address change no score and cost no finished work."""
    write_candidates(tmp_path / "candidates.jsonl")
    with (
        judge_server(lambda call: honest(call["messages"])) as (url, _),
        pytest.raises(UserError, match="budget of 20 is spent"),
    ):
        run(tmp_path, url, max_requests=20, max_retries=0)
    first_unit = {f"answer {g}.{i}" for g in range(4) for i in range(4)}
    with judge_server(lambda call: honest(call["messages"])) as (url, second):
        outcome = run(tmp_path, url, max_retries=9, reply_attempts=5, concurrency=2, timeout=60.0, first_wait=0.02)
    assert outcome.report.groups_kept == 12
    assert len(second.calls) == 48 - 16
    assert not first_unit & {response_in(call["messages"]) for call in second.calls}


def test_refusals_in_the_last_unit_do_not_keep_a_resumed_run_from_its_end(tmp_path):
    """The endpoint worked before: what it refuses now are these prompts."""
    write_candidates(tmp_path / "candidates.jsonl")

    def script(call):
        return ("status", 400) if "question 1" in call["messages"][-1]["content"] else honest(call["messages"])

    with judge_server(script) as (url, _), pytest.raises(UserError, match="budget of 40 is spent"):
        run(tmp_path, url, max_requests=40)  # two units of 16, and a part of the third one
    everything = lambda call: ("status", 400)  # noqa: E731
    with judge_server(everything) as (url, server):
        outcome = run(tmp_path, url)
    assert len(server.calls) == 16
    assert outcome.report.groups_kept == 7  # question 1 is refused in the first run
    assert set(outcome.report.failures) == {"no answer: http 400: scripted 400"}


def test_after_a_run_without_a_score_the_next_one_may_replace_what_it_left(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl", groups=2)
    with judge_server(lambda call: "no") as (url, _), pytest.raises(UserError, match="no group has two"):
        run(tmp_path, url)
    with judge_server(lambda call: honest(call["messages"])) as (url, _):
        outcome = run(tmp_path, url, overwrite=True)
    assert outcome.report.groups_kept == 2
    assert not (tmp_path / "scored.failures.jsonl").exists()


def test_ranking_is_shuffled_and_wrong_ranks_rank_nothing(tmp_path):
    candidates = write_candidates(tmp_path / "candidates.jsonl")
    orders = []
    wrong = {
        3: {"A": 1, "B": 2, "C": 3},
        4: {"A": 1, "B": 2, "C": 3, "D": 4, "E": 5},
        5: {"A": 1, "B": 1, "C": 4, "D": 4},
        6: {"A": 0, "B": 1, "C": 2, "D": 3},
        7: {"A": 1.5, "B": 2, "C": 3, "D": 4},
    }

    def script(call):
        labelled = labelled_in(call["messages"])
        group = int(labelled["A"].removeprefix("answer ").split(".")[0])
        orders.append([int(text[-1]) for text in labelled.values()])
        if group in wrong:
            return json.dumps({"ranks": wrong[group]})
        # the last response is best, the first two are tied for worst
        return json.dumps({"ranks": {label: {"3": 1, "2": 2}.get(text[-1], 3) for label, text in labelled.items()}})

    with judge_server(script) as (url, _):
        outcome = run(tmp_path, url, mode="rank")
    rows = rows_of(outcome.output)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in candidates if row["meta"]["group"] not in wrong]
    for row in rows:
        assert row["scores"] == pytest.approx([0.5 / 3, 0.5 / 3, 2 / 3, 1.0])
    assert any(order != sorted(order) for order in orders)
    assert len(rows_of(outcome.failures)) == len(wrong)
    assert sum(outcome.report.failures.values()) == 4 * len(wrong)
    assert outcome.report.counts["bad reply: numbers that are no ranking"] == 4
    assert outcome.report.counts["bad reply: ranks of other responses than asked for"] == 4
    assert outcome.report.counts["bad reply: rank is no whole number"] == 2


def test_a_spent_budget_stops_and_goes_on_where_it_was(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl")
    with judge_server(lambda call: honest(call["messages"])) as (url, server):
        with pytest.raises(UserError, match="max_requests: the budget of 20 is spent"):
            run(tmp_path, url, max_requests=20)
        assert 10 < len(server.calls) <= 20  # what was under way when the budget ended may not have gone out
        assert not (tmp_path / "scored.jsonl").exists()
        with pytest.raises(UserError, match="max_total_tokens: the budget of 300 is spent"):
            run(tmp_path, url, max_total_tokens=300, concurrency=1)
        outcome = run(tmp_path, url)
    assert outcome.report.groups_kept == 12
    assert outcome.report.counts["requests"] == 48
    assert len(server.calls) < 20 + 21 + 48  # finished units were not asked for again


def test_a_dead_endpoint_and_a_wrong_key_stop_the_run(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl")
    with judge_server(lambda call: ("status", 503)) as (url, _), pytest.raises(UserError, match="not one of 16"):
        run(tmp_path, url, max_retries=0)
    with judge_server(lambda call: ("status", 401)) as (url, _), pytest.raises(UserError, match="http 401"):
        run(tmp_path, url)


def test_when_nothing_can_be_judged_there_is_no_output_and_the_reasons_stay(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl", groups=2)
    with judge_server(lambda call: "no") as (url, _), pytest.raises(UserError, match=r"no group has two .* not JSON"):
        run(tmp_path, url)
    assert not (tmp_path / "scored.jsonl").exists()
    assert len(rows_of(tmp_path / "scored.failures.jsonl")) == 2


def test_without_the_client_the_message_says_what_to_install(tmp_path, monkeypatch):
    write_candidates(tmp_path / "candidates.jsonl", groups=1)
    real = builtins.__import__

    def without_openai(name, *arguments, **keywords):
        if name == "openai":
            raise ModuleNotFoundError("No module named 'openai'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_openai)
    with pytest.raises(UserError, match=r"rrhf-peft\[endpoint\]"):
        run(tmp_path, "http://127.0.0.1:9/v1")


def test_replies_are_read_strictly():
    assert parse_aspects('```json\n{"a": 1, "why": "x"}\n```', ["a"], 0, 10) == {"a": 1.0}
    for reply in ('{"a": 1} trailing', "[1]", '{"a": true}', '{"a": null}', '{"a": -0.1}', '{"a": Infinity}', ""):
        with pytest.raises(BadReplyError):
            parse_aspects(reply, ["a"], 0, 10)
    for ranks in ([1, 2, 2, 3], [1, 2, 2, 4], [1, 1, 1, 1], [4, 3, 2, 1]):
        assert parse_ranks(json.dumps({"ranks": dict(zip("ABCD", ranks, strict=True))}), "ABCD") == ranks
    for ranks in ([2, 3, 4, 5], [1, 3, 3, 4], [1, 2, 2, 5], [-1, 1, 2, 3], [True, 2, 3, 4]):
        with pytest.raises(BadReplyError):
            parse_ranks(json.dumps({"ranks": dict(zip("ABCD", ranks, strict=True))}), "ABCD")


def test_the_users_own_question_with_a_column_and_a_pattern_for_the_score(tmp_path):
    """The last match counts, what the judge thinks before it does not; a number beyond the scale is a bad reply."""
    rows = write_candidates(tmp_path / "candidates.jsonl", groups=2, k=3)
    rows = [{**row, "reference": f"truth {index}"} for index, row in enumerate(rows)]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def script(call):
        (message,) = call["messages"]
        question, reference, response = message["content"].split("|")
        assert (question, reference) == (f"question {response[7]}", f"truth {response[7]}")
        return f"Perhaps Score: 1.\nBut then... Score: {11 if response == 'answer 1.2' else response[-1]}"

    with judge_server(script) as (url, server):
        template, pattern = "{prompt}|{reference}|{response}", r"Score: ([0-9.]+)"
        outcome = run(tmp_path, url, prompt_template=template, score_pattern=pattern, extra_body={"top_k": 5})
    assert [row["scores"] for row in rows_of(tmp_path / "scored.jsonl")] == [[0.0, 1.0, 2.0], [0.0, 1.0]]
    assert outcome.report.counts["bad reply: score outside the scale"] == 2
    assert {call["body"]["top_k"] for call in server.calls} == {5}


def test_ranks_in_both_orders_are_averaged_and_their_agreement_is_reported(tmp_path):
    """A judge that always prefers what stands first agrees with itself on nothing; an honest one on everything."""
    write_candidates(tmp_path / "candidates.jsonl", groups=3, k=3)

    def biased(call):
        return "First of all, {A} looks fine.\n" + json.dumps({"ranks": {"A": 1, "B": 2, "C": 3}})

    def fair(call):
        shown = labelled_in(call["messages"])
        best = sorted(shown, key=lambda label: shown[label])
        return "```json\n" + json.dumps({"ranks": {label: best.index(label) + 1 for label in shown}}) + "\n```"

    for script, alike, scores in ((biased, 0, [0.5, 0.5, 0.5]), (fair, 9, [1.0, 0.5, 0.0])):
        with judge_server(script) as (url, server):
            outcome = run(tmp_path, url, mode="rank", both_orders=True, reasoning=True, overwrite=True)
        assert len(server.calls) == 6
        assert outcome.report.counts["pairs ranked in both orders"] == 9
        assert outcome.report.counts.get("of these alike", 0) == alike
        assert all(row["scores"] == scores for row in rows_of(tmp_path / "scored.jsonl"))
        assert "Think it over first" in server.calls[0]["messages"][0]["content"]
