"""The report in a real browser: it is drawn, and it asks nobody for anything. See the fixture `chromium`."""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.conftest import policy, write_evaluation
from report.html_page import Page

from rrhf_peft.report.run import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.usefixtures("chromium")


class Listener:
    """A web server on this machine that answers nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self.asked = asked
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


def browse(page: Path, profile: Path, *options: str) -> str:
    """Open a page without a screen, and return what the browser prints."""
    quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic --no-first-run"
    command = [
        str(CHROMIUM),
        *"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-proxy-server".split(),
        *quiet.split(),
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout


def greedy(address: str) -> str:
    """Markup that would have a browser ask for four things."""
    return (
        f'<img src="{address}/image"><link rel="stylesheet" href="{address}/style">'
        f'<script src="{address}/script"></script><div style="background:url({address}/background)">x</div>'
    )


@pytest.fixture
def report(tmp_path: Path, listener: Listener) -> Path:
    """A report on a policy that answers with greedy markup."""
    folder = write_evaluation(tmp_path / "evaluation", {"base": policy(0.1), "after": policy(0.7)})
    for path in (folder / "scored").glob("*.jsonl"):
        markup = greedy(listener.address).replace('"', "'")
        path.write_text(path.read_text().replace("base 0", markup).replace("after 0", markup))
    return write_report([folder])


def test_it_asks_for_nothing_where_a_page_without_its_defences_would(
    report: Path, listener: Listener, tmp_path: Path
) -> None:
    text = report.read_text(encoding="utf-8")
    injected = tmp_path / "injected.html"  # as if escaping had failed: the policy in the head still holds
    injected.write_text(text.replace("</body>", greedy(listener.address) + "</body>"), encoding="utf-8")
    open_to_all = tmp_path / "open.html"  # as if both had failed: then the listener hears of it
    open_to_all.write_text(re.sub(r"<meta http-equiv=[^\n]*>\n", "", injected.read_text(encoding="utf-8")))
    shown = browse(report, tmp_path / "one", "--dump-dom")
    assert "&lt;img src='" in shown
    assert listener.asked == []
    browse(injected, tmp_path / "two", "--dump-dom")
    assert listener.asked == []
    browse(open_to_all, tmp_path / "three", "--dump-dom")
    assert {"/image", "/script", "/style"} <= set(listener.asked)  # the page's load event waits for these


def test_its_plots_are_drawn(report: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    browse(report, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,3000")
    pixels = imread(tmp_path / "page.png")[..., :3]
    swatch = next(own["style"] for own in reversed(Page(report).all("span")) if own.get("class") == "swatch")
    color = [int(swatch[-6:][place : place + 2], 16) / 255 for place in (0, 2, 4)]
    drawn = (abs(pixels - color) < 0.01).all(axis=-1)
    table_ends = 900  # pixels from the top; below it only plots have the policy's colour over such areas
    assert drawn[table_ends:].sum() > 500
