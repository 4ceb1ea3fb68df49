"""A server in the test process that answers slowly, wrongly or not at all: nothing lost, nothing invented."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rrhf_peft.records import UserError
from rrhf_peft.sample.candidate import Decoding
from rrhf_peft.sample.endpoint import EndpointPolicy

pytest.importorskip("openai")


class Server:
    """Answers with the prompt, the request's seed and the stop string; `faults` come first, one a request."""

    def __init__(self):
        self.faults, self.requests, self.lock = {}, [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.requests.append((self.path, body, self.headers["authorization"]))
                    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
                    waiting = outer.faults.get(text, [])
                    fault = waiting.pop(0) if waiting else None
                outer.answer(self, body, text, fault)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler, body, text, fault):
        if fault == "cut":
            handler.connection.close()
            return
        status, payload = 200, self.good(body, f"{text} {body['seed']}#rest")
        if isinstance(fault, int):
            status, payload = fault, json.dumps({"error": {"message": "no"}})
        elif fault == "not json":
            payload = "<html>"
        elif fault == "no choice":
            payload = json.dumps({"choices": []})
        data = payload.encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("retry-after", "3")
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def good(self, body, text):
        choice = {"index": 0, "finish_reason": "length" if "long" in text else "stop"}
        choice |= {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        usage = {"completion_tokens": 5, "prompt_tokens": 1, "total_tokens": 6}
        return json.dumps({"id": "1", "object": "o", "created": 1, "model": "m", "choices": [choice], "usage": usage})


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def policy_of(server, **settings):
    pauses = []
    policy = EndpointPolicy(base_url=server.url, model="m", pause=pauses.append, **{"timeout": 5.0, **settings})
    return policy, pauses


def messages(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


DECODING = Decoding("top_p", k=3, max_new_tokens=7, temperature=0.7, top_p=0.9, stop=("#",))


def test_each_candidate_has_its_own_seed_which_depends_on_its_key_alone(server):
    policy, pauses = policy_of(server)
    first = policy.respond(messages("a", "long b"), ["0/0", "0/1"], DECODING)
    again = policy.respond(messages("long b"), ["0/1"], DECODING)
    assert first[1] == again[0]
    texts = [item.text for own in first for item in own]
    assert len(set(texts)) == 6
    assert all(text.startswith(("a ", "long b ")) and "#" not in text for text in texts)
    assert {item.finish_reason for own in first for item in own} == {"stop"}
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert {key: body[key] for key in ("max_tokens", "temperature", "top_p", "stop")} == {
        "max_tokens": 7,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["#"],
    }
    assert pauses == []


def test_plain_completions_and_finish_reasons(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    policy, _ = policy_of(server, api="completions", api_key_env="MY_KEY")
    found = policy.respond(["long", "short"], ["0", "1"], Decoding("top_p", k=1, max_new_tokens=7))
    assert [own[0].finish_reason for own in found] == ["length", "eos"]
    path, _, key = server.requests[0]
    assert (path, key) == ("/v1/completions", "Bearer secret")


def test_faults_are_tried_again_and_nothing_is_lost(server):
    policy, pauses = policy_of(server, concurrency=2)
    expected = policy.respond(messages("a", "b"), ["0", "1"], DECODING)
    server.requests.clear()
    faults = [429, 500, "cut", "not json", "no choice", 503, 408]
    server.faults["a"] = list(faults)
    assert policy.respond(messages("a", "b"), ["0", "1"], DECODING) == expected
    assert Counter(body["messages"][0]["content"] for _, body, _ in server.requests) == {"a": 3 + len(faults), "b": 3}
    assert len(pauses) == len(faults)
    assert all(pause <= 60 for pause in pauses)
    assert max(pauses) >= 3  # the server asked for it
    assert policy.refused == 0


def test_what_the_server_refuses_is_missing_and_counted(server):
    policy, _ = policy_of(server, concurrency=1)
    server.faults["a"] = [400, 422]
    found = policy.respond(messages("a", "b"), ["0", "1"], DECODING)
    assert [len(own) for own in found] == [1, 3]
    assert policy.refused == 2


@pytest.mark.parametrize(
    ("fault", "part"),
    [(401, "OPENAI_API_KEY"), (404, "knows no model m"), (500, "after 3 attempts (status 500)")],
)
def test_what_stays_wrong_ends_the_run_with_a_remedy(server, fault, part):
    policy, _ = policy_of(server, max_retries=2, concurrency=1)
    server.faults["a"] = [fault] * 20
    with pytest.raises(UserError) as caught:
        policy.respond(messages("a"), ["0"], DECODING)
    assert part in str(caught.value)
    assert server.url in str(caught.value)


def test_no_server_at_all(server):
    policy, pauses = policy_of(server, max_retries=1)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="after 2 attempts"):
        policy.respond(messages("a"), ["0"], DECODING)
    assert pauses
