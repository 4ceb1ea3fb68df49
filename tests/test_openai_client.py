"""The one client of OpenAI-compatible servers: what is tried again, what is counted, what stops a run."""

from __future__ import annotations

import builtins
import email.utils
import http.server
import json
import threading
import time

import pytest
from judge_server import completion, judge_server

from rrhf_peft.openai_client import FAILURES_IN_A_ROW, OpenAIClient, RequestFailedError
from rrhf_peft.recipe.stages import ServerSection
from rrhf_peft.records import UserError

pytest.importorskip("openai")


def client_of(url, **settings):
    pauses = []
    settings = {"at": "here", "timeout": 60.0, "max_retries": 2, "known_to_answer": True, "first_wait": 0.5, **settings}
    how = {name: settings.pop(name) for name in ("at", "api", "known_to_answer") if name in settings}
    return OpenAIClient(ServerSection(base_url=url, model="m", **settings), pause=pauses.append, **how), pauses


def ask(client, prompt, **options):
    """One answer, as `each` gives it."""
    ((_, reply),) = client.each(lambda prompt: client.ask(prompt, **options), [prompt])
    return reply


def asked(text):
    return [{"role": "user", "content": text}]


def reason_of(client, prompt="q", **options):
    with pytest.raises(RequestFailedError) as caught:
        ask(client, asked(prompt), **options)
    return str(caught.value)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529, 599])
def test_passing_faults_are_tried_again(status):
    with judge_server(lambda call: ("status", status) if call["attempt"] < 3 else "fine") as (url, server):
        client, pauses = client_of(url)
        reply = ask(client, asked("q"), temperature=0.5)
        assert (reply.text, reply.finish_reason, reply.num_tokens) == ("fine", "stop", 5)
        assert len(server.calls) == 3
        assert len(pauses) == 2
        assert server.calls[0]["body"]["temperature"] == 0.5
        assert client.counts[f"http {status}"] == 2
        assert client.counts["failures"] == 0


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 422, 451])
def test_other_statuses_are_not_tried_again_and_keep_the_servers_words(status):
    with judge_server(lambda call: ("status", status, {}, "prompt has 9 tokens")) as (url, server):
        client, pauses = client_of(url)
        assert reason_of(client) == f"http {status}: prompt has 9 tokens"
        assert len(server.calls) == 1
        assert pauses == []
        assert client.counts["failures"] == client.counts[f"http {status}"] == 1


@pytest.mark.parametrize(
    ("said", "pause"),
    [("7", 7), ("3600", 60), ("nan", 0), ("-5", 0), ("inf", 0), ("soon", 0), ("date", 20), ("9" * 400, 0)],
)
def test_retry_after_is_honoured_and_capped(said, pause):
    if said == "date":
        said = email.utils.formatdate(time.time() + 20, usegmt=True)
    script = lambda call: ("status", 429, {"Retry-After": said}) if call["attempt"] == 1 else "fine"  # noqa: E731
    with judge_server(script) as (url, _):
        client, pauses = client_of(url)
        ask(client, asked("q"))
        (waited,) = pauses
        assert pause - 2 <= waited <= max(pause, 0.5)


def test_pauses_double_and_end_at_a_minute():
    with judge_server(lambda call: ("status", 503)) as (url, server):
        client, pauses = client_of(url, max_retries=12)
        assert reason_of(client) == "http 503 after 13 attempts: scripted 503"
        assert len(server.calls) == 13
        assert pauses[0] <= 0.5
        assert 30 <= pauses[-1] <= 60


def test_cut_lines_and_timeouts_are_tried_again():
    faults = ["cut", ("slow", 2.0, "late"), ("drip", 8.0)]
    with judge_server(lambda call: faults[call["attempt"] - 1] if call["attempt"] < 4 else "fine") as (url, _):
        client, _ = client_of(url, timeout=1.0, max_retries=3)
        start = time.monotonic()
        assert ask(client, asked("q")).text == "fine"
        assert time.monotonic() - start < 7  # the server that sends a byte now and then is not waited for
        assert (client.counts["connection"], client.counts["timeout"]) == (1, 2)


ODD = {
    "html": (("body", b"<html>gateway</html>"), "malformed body after 3 attempts: not JSON: <html>gateway</html>"),
    "a list": (("answer", [1, 2]), "malformed body after 3 attempts: no choices"),
    "a number": (("body", b"1e999"), "malformed body after 3 attempts: no choices"),
    "null": (("answer", None), "malformed body after 3 attempts: no choices"),
    "no choices": (("answer", {"choices": []}), "malformed body after 3 attempts: no choices"),
    "choices null": (("answer", {"choices": None}), "malformed body after 3 attempts: no choices"),
    "an odd choice": (("answer", {"choices": ["x"]}), "malformed body after 3 attempts: no choices"),
    "no message": (("answer", {"choices": [{}]}), "malformed body after 3 attempts: a choice without a message"),
    "error with 200": (("answer", {"error": {"message": "busy"}}), "malformed body after 3 attempts: busy"),
    "deep": (("body", b"[" * 200_000), "malformed body after 3 attempts: not JSON"),
    "not UTF-8": (("body", b'"\xff\xfe\xfa'), "malformed body after 3 attempts: not JSON"),
    "nothing": (("body", b""), "malformed body after 3 attempts: not JSON"),
    "megabytes": (("body", b" " * (9 << 20)), "malformed body after 3 attempts: an answer of more than 8 MiB"),
    "content null": (("answer", completion(None)), "no text: finish_reason stop"),
    "content a list": (("answer", completion(["a"])), "no text: finish_reason stop"),
    "a refusal": (
        ("answer", completion(None, message={"content": None, "refusal": "I will not."})),
        "no text: I will not",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_bodies_are_counted_failures(case):
    sent, expected = ODD[case]
    with judge_server(lambda call: sent) as (url, _):
        client, _ = client_of(url)
        reason = reason_of(client)
        assert reason.startswith(expected)
        assert len(reason) < 300
        assert client.counts["failures"] == 1


@pytest.mark.parametrize("usage", [None, [], "many", {}, {"completion_tokens": None}, {"completion_tokens": "5"}])
def test_usage_without_numbers_is_no_failure(usage):
    with judge_server(lambda call: ("answer", {**completion("fine"), "usage": usage})) as (url, _):
        client, _ = client_of(url)
        assert ask(client, asked("q")).num_tokens is None
        assert client.counts["completion_tokens"] == 0


def test_half_a_surrogate_pair_becomes_a_mark_that_a_file_can_hold():
    with judge_server(lambda call: ("body", json.dumps(completion("a\ud800b \U0001f642")).encode())) as (url, _):
        assert ask(client_of(url)[0], asked("q")).text == "a\ufffdb \U0001f642"


def test_a_prompt_that_is_no_unicode_is_a_failure_of_its_own():
    with judge_server(lambda call: "fine") as (url, _):
        assert reason_of(client_of(url)[0], "a\ud800") == "no request: the prompt is not valid Unicode"


def test_the_key_and_control_sequences_of_a_servers_words_are_not_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret-0123\n")
    words = "\x1b[31mIncorrect key sk-very-secret-0123\r\nprovided\x07\u202e" + "x" * 5000
    with judge_server(lambda call: ("status", 401, {}, words)) as (url, server):
        client, _ = client_of(url, api_key_env="MY_KEY")
        reason = reason_of(client)
    assert server.calls[0]["key"] == "Bearer sk-very-secret-0123"
    assert reason.startswith("http 401: [31mIncorrect key [key] provided xxx")
    assert reason.isprintable()
    assert len(reason) <= 210
    monkeypatch.setenv("MY_KEY", "sk-Grüße")
    with pytest.raises(UserError, match="MY_KEY holds characters that no key has"):
        client_of(url, api_key_env="MY_KEY")


def test_a_redirect_does_not_take_the_prompt_elsewhere():
    taken = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            taken.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(500)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    other = http.server.HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
    try:
        with judge_server(lambda call: ("status", 307, {"Location": address})) as (url, _):
            client, _ = client_of(url, known_to_answer=False)
            assert reason_of(client) == f"http 307: redirects to {address}"
            with pytest.raises(UserError, match=r"Redirects are not followed: set here\.base_url to that address"):
                client.gather(lambda text: failed(client, text), ["q"])
    finally:
        other.shutdown()
        other.server_close()
    assert taken == []


async def failed(client, text):
    """An answer's text, or why there is none, as those who use the client keep it."""
    try:
        return (await client.ask(asked(text))).text
    except RequestFailedError as error:
        return str(error)


def test_failures_stay_with_their_requests_and_order_is_kept():
    def script(call):
        text = call["messages"][-1]["content"]
        return ("status", 400, {}, "too long") if text == "q3" else f"about {text}"

    with judge_server(script) as (url, server):
        client, _ = client_of(url, concurrency=3, known_to_answer=False)
        texts = [f"q{number}" for number in range(40)]
        done = list(client.each(lambda text: failed(client, text), texts))
        found = client.gather(lambda text: failed(client, text), texts)
    assert found == ["http 400: too long" if text == "q3" else f"about {text}" for text in texts]
    assert sorted(done) == list(enumerate(found))
    assert server.most_at_once <= 3


def test_the_first_requests_all_failing_stops_the_run_with_the_servers_words():
    with judge_server(lambda call: ("status", 422, {}, "temperature must be 1")) as (url, server):
        client, _ = client_of(url, concurrency=2, known_to_answer=False)
        with pytest.raises(UserError) as caught:
            client.gather(lambda text: failed(client, text), [f"q{number}" for number in range(500)])
    assert f"not one of {FAILURES_IN_A_ROW} requests in a row was answered (http 422: temperature must be 1)" in str(
        caught.value
    )
    assert len(server.calls) <= FAILURES_IN_A_ROW + 2


def test_refusals_of_one_prompt_do_not_stop_the_others():
    """The first prompt is too long, and its 30 candidates are refused before any other is asked for."""

    def script(call):
        return ("status", 400, {}, "too long") if call["messages"][-1]["content"] == "long" else "fine"

    with judge_server(script) as (url, _):
        client, _ = client_of(url, concurrency=1, known_to_answer=False)
        found = client.gather(lambda text: failed(client, text), ["long"] * 30 + ["short"])
        assert (found[0], found[-1]) == ("http 400: too long", "fine")
        # Later on, refusals say nothing about the endpoint, however many they are.
        assert set(client.gather(lambda text: failed(client, text), ["long"] * 40)) == {"http 400: too long"}


@pytest.mark.parametrize(("status", "remedy"), [(503, "See to the endpoint"), (401, "MY_KEY"), (404, "no model m")])
def test_an_endpoint_that_goes_away_in_mid_run_stops_it(status, remedy):
    with judge_server(lambda call: "fine" if call["number"] < 5 else ("status", status)) as (url, server):
        client, _ = client_of(url, concurrency=2, max_retries=0, api_key_env="MY_KEY")
        with pytest.raises(UserError, match=f"http {status}.*{remedy}.*finished before is kept"):
            client.gather(lambda text: failed(client, text), [f"q{number}" for number in range(500)])
    assert len(server.calls) <= 5 + FAILURES_IN_A_ROW + 2


def test_an_error_does_not_wait_for_requests_under_way():
    with judge_server(lambda call: ("slow", 3.0, "late")) as (url, _):
        client, _ = client_of(url, concurrency=2)

        async def answer(text):
            if text == "wrong":
                raise KeyError("a defect")
            return await client.ask(asked(text))

        start = time.monotonic()
        with pytest.raises(KeyError):
            client.gather(answer, ["slow", "wrong", "more"])
        assert time.monotonic() - start < 2


def test_budgets():
    with judge_server(lambda call: "fine") as (url, server):
        client, _ = client_of(url, max_requests=3, concurrency=1)
        with pytest.raises(UserError, match=r"here\.max_requests: the budget of 3 is spent"):
            client.gather(lambda text: failed(client, text), ["q"] * 9)
        assert len(server.calls) == 3
        client, _ = client_of(url, max_total_tokens=30, concurrency=1)
        with pytest.raises(UserError, match=r"here\.max_total_tokens: the budget of 30 is spent"):
            client.gather(lambda text: failed(client, text), ["q"] * 9)
        assert len(server.calls) == 5


def test_a_budget_of_money_counts_tokens_by_their_prices():
    prices = {"prompt_price": 1e5, "completion_price": 2e5}  # of a million: 10 and 5 tokens cost 2
    with judge_server(lambda call: "fine") as (url, server):
        client, _ = client_of(url, max_cost=5.0, concurrency=1, **prices)
        with pytest.raises(UserError, match=r"here\.max_cost: the budget of 5 is spent"):
            client.gather(lambda text: failed(client, text), ["q"] * 9)
        assert (len(server.calls), client.cost) == (3, 6.0)


def test_completions_send_text():
    with judge_server(lambda call: f"{call['prompt']}!") as (url, server):
        client, _ = client_of(url, api="completions")
        assert ask(client, "once", max_tokens=3).text == "once!"
        assert (server.calls[0]["path"], server.calls[0]["body"]["max_tokens"]) == ("/v1/completions", 3)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:99999/v1", "http://[::"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match=r"here\.base_url.*http://localhost:8000/v1"):
        client_of(url)


def test_a_password_in_the_address_is_not_shown():
    assert client_of("http://me:secret@localhost:1/v1")[0].base_url == "http://localhost:1/v1"


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_openai(name, *arguments, **keywords):
        if name == "openai":
            raise ModuleNotFoundError("No module named 'openai'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_openai)
    with pytest.raises(UserError, match=r"rrhf-peft\[endpoint\]"):
        client_of("http://localhost:1/v1")
