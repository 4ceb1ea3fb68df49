"""A server that answers slowly, wrongly or not at all: nothing lost, nothing invented."""

from __future__ import annotations

from collections import Counter

import pytest
from judge_server import completion, judge_server

from rrhf_peft.recipe.stages import EndpointSection
from rrhf_peft.records import RankedGroup, UserError
from rrhf_peft.sample.endpoint import EndpointPolicy
from rrhf_peft.sample.policies import Decoding

pytest.importorskip("openai")


def said(call):
    """The prompt's text, the request's seed and the stop string."""
    text = call["prompt"] if "prompt" in call else call["messages"][-1]["content"]
    return f"{text} {call['body']['seed']}#rest"


def policy_of(url, template="raw", **settings):
    pauses = []
    section = EndpointSection(base_url=url, model="m", **{"timeout": 60.0, **settings})
    return EndpointPolicy(section, template, at="here", pause=pauses.append), pauses


def respond(policy, *asked):
    """The answers in the order of the prompts."""
    return [answers for _, answers in sorted(policy.respond(*asked), key=lambda item: item[0])]


def prompts_of(*texts):
    return [RankedGroup(text, index=index) for index, text in enumerate(texts)]


DECODING = Decoding("top_p", k=3, max_new_tokens=7, temperature=0.7, top_p=0.9, stop=("#",))


def test_each_candidate_has_its_own_seed_which_depends_on_its_key_alone():
    with judge_server(said) as (url, server):
        policy, pauses = policy_of(url)
        first = respond(policy, prompts_of("a", "long b"), ["0/0", "0/1"], DECODING)
        again = respond(policy, prompts_of("long b"), ["0/1"], DECODING)
    assert first[1] == again[0]
    texts = [item.text for answer in first for item in answer.candidates]
    assert len(set(texts)) == 6
    assert all(text.startswith(("a ", "long b ")) and "#" not in text for text in texts)
    assert {item.finish_reason for answer in first for item in answer.candidates} == {"stop"}
    assert {item.num_tokens for answer in first for item in answer.candidates} == {5}
    body = server.calls[0]["body"]
    assert server.calls[0]["path"] == "/v1/chat/completions"
    assert {key: body[key] for key in ("max_tokens", "temperature", "top_p", "stop")} == {
        "max_tokens": 7,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["#"],
    }
    assert pauses == []


def test_plain_completions_and_finish_reasons(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")

    def script(call):
        reason = {"long": "length", "short": "stop"}[call["prompt"]]
        return ("answer", completion("text", chat=False, finish_reason=reason))

    with judge_server(script) as (url, server):
        policy, _ = policy_of(url, api="completions", api_key_env="MY_KEY")
        found = respond(policy, prompts_of("long", "short"), ["0", "1"], Decoding("top_p", k=1, max_new_tokens=7))
    assert [answer.candidates[0].finish_reason for answer in found] == ["length", "eos"]
    assert (server.calls[0]["path"], server.calls[0]["key"]) == ("/v1/completions", "Bearer secret")


def test_faults_are_tried_again_and_nothing_is_lost():
    faults = [429, 500, "cut", "not json", "no choice", 503, 408]

    def script(call):
        waiting = faults if call["messages"][-1]["content"] == "a" and is_faulty else []
        if not waiting:
            return said(call)
        fault = waiting.pop(0)
        if isinstance(fault, int):
            return ("status", fault, {"retry-after": "3"})
        return {"cut": "cut", "not json": ("body", b"<html>"), "no choice": ("answer", {"choices": []})}[fault]

    is_faulty = False
    with judge_server(script) as (url, server):
        policy, pauses = policy_of(url, concurrency=2)
        expected = respond(policy, prompts_of("a", "b"), ["0", "1"], DECODING)
        is_faulty, count = True, len(faults)
        server.calls.clear()
        assert respond(policy, prompts_of("a", "b"), ["0", "1"], DECODING) == expected
    asked = Counter(call["messages"][0]["content"] for call in server.calls)
    assert asked == {"a": 3 + count, "b": 3}
    assert len(pauses) == count
    assert all(pause <= 60 for pause in pauses)
    assert max(pauses) >= 3  # the server asked for it
    assert all(not answer.failures for answer in expected)


@pytest.mark.parametrize("status", [400, 422, 403])
def test_what_the_server_refuses_is_missing_with_its_reason(status):
    def script(call):
        is_refused = call["messages"][-1]["content"] == "a" and call["number"] < 2
        return ("status", status, {}, "maximum context length is 4096") if is_refused else said(call)

    with judge_server(script) as (url, _):
        policy, _ = policy_of(url, concurrency=1)
        found = respond(policy, prompts_of("a", "b"), ["0", "1"], DECODING)
    assert [len(answer.candidates) for answer in found] == [1, 3]
    assert [answer.failures for answer in found] == [[f"http {status}: maximum context length is 4096"] * 2, []]


@pytest.mark.parametrize(
    "odd",
    [
        completion(None),
        completion(None, message={"role": "assistant", "content": None, "refusal": "no"}),
        {**completion("fine"), "usage": {"completion_tokens": "many"}},
        {**completion("fine"), "usage": None},
        [],
        {"choices": [{"message": None}]},
    ],
)
def test_odd_answers_end_no_run(odd):
    with judge_server(lambda call: ("answer", odd) if call["number"] == 0 else said(call)) as (url, _):
        policy, _ = policy_of(url, concurrency=1, max_retries=0)
        (answer,) = respond(policy, prompts_of("a"), ["0"], DECODING)
    if (
        isinstance(odd, dict)
        and odd.get("choices", [{}])[0].get("message") == completion("fine")["choices"][0]["message"]
    ):
        assert (len(answer.candidates), answer.candidates[0].num_tokens) == (3, None)
    else:
        assert (len(answer.candidates), len(answer.failures)) == (2, 1)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (400, "scripted 400"),
        (401, "OPENAI_API_KEY"),
        (404, "knows no model m"),
        (422, "scripted 422"),
        (500, "http 500 after 3 attempts"),
    ],
)
def test_a_server_that_answers_nothing_ends_the_run_with_a_remedy(fault, part):
    with judge_server(lambda call: ("status", fault)) as (url, _):
        policy, _ = policy_of(url, max_retries=2, concurrency=1)
        with pytest.raises(UserError) as caught:
            respond(policy, prompts_of("a"), ["0"], DECODING)
    assert part in str(caught.value)
    assert url in str(caught.value)


def test_no_server_at_all():
    with judge_server(said) as (url, _):
        pass
    policy, pauses = policy_of(url, max_retries=1)
    with pytest.raises(UserError, match="after 2 attempts"):
        respond(policy, prompts_of("a"), ["0"], DECODING)
    assert pauses


def test_the_chat_template_is_the_servers():
    with pytest.raises(UserError, match=r"sampling\.template: chat needs a tokenizer"):
        policy_of("http://localhost:1/v1", "chat", api="completions")


def test_all_candidates_of_a_prompt_in_one_request():
    """One without text is missing with its reason; a server that takes no n is told, and nothing is made up."""

    def script(call):
        texts = ["one", None, "three"][: call["body"]["n"]]
        choices = [completion(text)["choices"][0] for text in texts]
        return ("answer", {**completion("x"), "choices": choices})

    with judge_server(script) as (url, server):
        policy, _ = policy_of(url, use_n=True)
        (answer,) = respond(policy, prompts_of("a"), ["0"], DECODING)
    assert [call["body"]["n"] for call in server.calls] == [3]
    assert [(item.text, item.num_tokens) for item in answer.candidates] == [("one", None), ("three", None)]
    assert answer.failures == ["no text: finish_reason stop"]
    with judge_server(said) as (url, server):
        policy, _ = policy_of(url, use_n=True, max_retries=0)
        with pytest.raises(UserError, match=r"1 of 3 choices; a server that takes no n needs use_n: false"):
            respond(policy, prompts_of("a"), ["0"], DECODING)


def test_requests_of_all_prompts_are_under_way_together():
    """As many as `concurrency`, also where a slow prompt is not done yet."""

    def script(call):
        return ("slow", 0.3, said(call))

    with judge_server(script) as (url, server):
        policy, _ = policy_of(url, concurrency=6)
        respond(policy, prompts_of(*"abcdefgh"), [str(index) for index in range(8)], DECODING)
    assert len(server.calls) == 24
    assert server.most_at_once == 6
