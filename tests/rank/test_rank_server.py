"""The pages' server over HTTP: who is let in, from where, and what it takes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from rank.conftest import Served, write_candidates

from rrhf_peft.rank.server import markdown


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    write_candidates(folder / "candidates.jsonl", count=4)
    running = Served("candidates.jsonl", "--port", "0", "--annotator", "ann", "--annotator", "bob", cwd=folder)
    yield running
    running.end()


def ask(served: Served, path: str, body: Any = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, text, headers); a body is posted as a page of the server would."""
    connection = http.client.HTTPConnection("127.0.0.1", int(served.port), timeout=30)
    here = f"127.0.0.1:{served.port}"
    sent = {"Host": here}
    if body is not None:
        sent |= {"Origin": f"http://{here}", "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, str) else None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, sent)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def secret(served: Served, name: str = "ann") -> str:
    link = served.links[name] if name else served.overview
    return "/" + link.split("/")[3]


def test_without_the_secret_there_is_nothing(served: Served) -> None:
    for path in ("/", "/x/", "/x/task", "/x/page.js", secret(served)[:-1] + "/task", "/favicon.ico/"):
        assert ask(served, path)[0] == 404, path
    for path in ("/", "/page.css", "/page.js", "/task"):
        assert ask(served, secret(served) + path)[0] == 200, path
    for path in ("/page.html", "/../run.py", "/%2e%2e/run.py", "/static/page.js", "/answers.sqlite"):
        assert ask(served, secret(served) + path)[0] == 404, path


def test_annotators_and_the_overview_do_not_see_each_others(served: Served) -> None:
    assert ask(served, secret(served) + "/overview")[0] == 404
    assert ask(served, secret(served) + "/export", {})[0] == 404
    assert json.loads(ask(served, secret(served, "") + "/task")[1]) == {"overview": True}
    assert ask(served, secret(served, "") + "/answer", {})[0] == 404
    shown = ask(served, secret(served) + "/task")[1]
    assert "policy-" not in shown  # blind
    assert "reward_model" not in shown


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "0.0.0.0"])
def test_other_hosts_are_refused(served: Served, host: str) -> None:
    assert ask(served, secret(served) + "/task", Host=host)[0] in (400, 403)


def test_tunnels_are_not(served: Served) -> None:
    for host in ("localhost:99", "127.0.0.1", "[::1]:8642"):
        assert ask(served, secret(served) + "/task", Host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
        {"Content_Type": "text/plain"},  # what a form of another page can send
        {"Content_Length": "99999999"},
    ],
)
def test_changes_come_from_pages_of_this_server(served: Served, headers: dict[str, str]) -> None:
    body = {"group": json.loads(ask(served, secret(served) + "/task")[1])["group"], "state": "skipped", "note": ""}
    body["ranks"] = [None] * 3
    assert ask(served, secret(served) + "/answer", body, **headers)[0] == 403
    assert ask(served, secret(served) + "/answer", body | {"state": "open"})[0] == 200


def test_every_answer_has_the_headers_that_keep_pages_in(served: Served) -> None:
    for path in (secret(served) + "/", "/nowhere", secret(served) + "/task?group=99"):
        headers = ask(served, path)[2]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_nonsense_is_refused_and_changes_nothing(served: Served) -> None:
    task = json.loads(ask(served, secret(served, "bob") + "/task")[1])
    good = {"group": task["group"], "state": "ranked", "ranks": [1, 1, 2], "note": "x"}
    other = next(number for number in range(4) if number != task["group"])
    bodies: list[Any] = [
        "", "{", "[]", "null", "[" * 30000, '"\\ud800"', {}, [good], *(
            good | change for change in (
                {"group": other}, {"group": 99}, {"group": -1}, {"group": True}, {"group": 10**30}, {"group": "0"},
                {"state": "done"}, {"state": []}, {"ranks": [1, 2]}, {"ranks": [1, 2, None]}, {"ranks": [0, 1, 2]},
                {"ranks": [1, 2, 4]}, {"ranks": [1, 2, True]}, {"ranks": [1, 2, 2.0]}, {"ranks": [1, 2, [3]]},
                {"ranks": None}, {"ranks": "123"}, {"note": None}, {"note": "x" * 4001}, {"note": ["x"]},
            )
        ),
    ]  # fmt: skip
    for body in bodies:
        assert ask(served, secret(served, "bob") + "/answer", body)[0] == 400, body
    for number in ("99", "-1", "x", "%D9%A3", "9" * 5000, str(other)):
        assert ask(served, f"{secret(served, 'bob')}/task?group={number}")[0] == 404
    assert json.loads(ask(served, secret(served, "bob") + "/task")[1]) == task
    assert ask(served, secret(served, "bob") + "/answer", good | {"note": "\ud800"})[0] == 200
    facts = json.loads(ask(served, secret(served, "") + "/overview")[1])
    assert facts["annotators"][1] == {"name": "bob", "ranked": 1, "skipped": 0, "open": 0}


def test_markdown_passes_no_markup_through() -> None:
    html = markdown(
        "<img src=x onerror=1> ![a](http://b/c) [d](javascript:e) [f](data:text/html,x) [g](https://h)\n\n`<b>`"
    )
    assert "<img" not in html
    assert html.count("<a ") == 2  # the image is a link like any other, and what runs is text
    assert "&lt;img src=x" in html
    assert 'href="javascript:' not in html
    assert 'href="data:' not in html
    assert "<code>&lt;b&gt;</code>" in html
