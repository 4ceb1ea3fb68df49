"""An OpenAI-compatible server for tests that answers as well or as badly as its script says.

`script(call)` gets a dict (number, attempt, messages or prompt, body, path, key) and returns what to send: a
string (the reply's text), ("status", code[, headers[, words]]), "cut", ("slow", seconds, text), ("body", bytes),
("text", str), ("answer", JSON value) or ("drip", seconds), which sends a byte now and then for so long.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """Counts what came and what was sent; `most_at_once` is the greatest number of open requests."""

    def __init__(self, script):
        self.script, self.calls, self.attempts, self.kinds = script, [], Counter(), Counter()
        self.lock, self.open, self.most_at_once = threading.Lock(), 0, 0

    def answer(self, body, path, key):
        text = json.dumps([body.get("messages"), body.get("prompt"), body.get("seed")])
        with self.lock:
            self.attempts[text] += 1
            call = {"number": len(self.calls), "attempt": self.attempts[text], "body": body, "path": path, "key": key}
            call |= {name: body[name] for name in ("messages", "prompt") if name in body}
            self.calls.append(call)
            self.open += 1
            self.most_at_once = max(self.most_at_once, self.open)
        try:
            sent = self.script(call)
            kind = "text" if isinstance(sent, str) and sent != "cut" else sent if sent == "cut" else sent[0]
            with self.lock:
                self.kinds[f"{kind} {sent[1]}" if kind == "status" else kind] += 1
            if kind == "slow":
                time.sleep(sent[1])
            return sent
        finally:
            with self.lock:
                self.open -= 1


def response_in(messages):
    """The response that a scoring request is about."""
    return re.search(r"<response>\n(.*)\n</response>", messages[-1]["content"], flags=re.DOTALL).group(1)


def labelled_in(messages):
    """Label -> response of a ranking request."""
    found = re.findall(r'<response label="(\w+)">\n(.*?)\n</response>', messages[-1]["content"], flags=re.DOTALL)
    return dict(found)


def completion(text, *, chat=True, **choice):
    """The JSON of an answer; `choice` changes its one choice."""
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "x",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", **said, **choice}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


@contextlib.contextmanager
def judge_server(script):
    """Yield (base url, JudgeServer)."""
    judge = JudgeServer(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = judge.answer(body, self.path, self.headers["Authorization"])
            if sent == "cut":
                # A reset instead of an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            code, headers, answer = 200, {}, None
            if isinstance(sent, str):
                answer = completion(sent, chat="messages" in body)
            elif sent[0] == "status":
                code, headers = sent[1], sent[2] if len(sent) > 2 else {}
                answer = {"error": {"message": sent[3] if len(sent) > 3 else f"scripted {code}", "type": "x"}}
            elif sent[0] in ("slow", "text"):
                answer = completion(sent[-1], chat="messages" in body)
            elif sent[0] == "answer":
                answer = sent[1]
            elif sent[0] == "drip":
                self.drip(sent[1])
                return
            payload = sent[1] if sent[0] == "body" else json.dumps(answer).encode()
            with contextlib.suppress(OSError):  # a client that timed out is gone
                self.send_response(code)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        def drip(self, seconds):
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.end_headers()
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    self.wfile.write(b" ")
                    time.sleep(0.05)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
