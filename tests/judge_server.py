"""An OpenAI-compatible server for tests that answers as well or as badly as its script says.

`script(call)` gets a dict (number, attempt, messages) and returns what to send: a string (the reply's
text), ("status", code[, headers]), "cut", ("slow", seconds, text), ("body", bytes) or ("text", str).
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

    def answer(self, body):
        text = json.dumps(body["messages"])
        with self.lock:
            self.attempts[text] += 1
            call = {"number": len(self.calls), "attempt": self.attempts[text], "messages": body["messages"]}
            self.calls.append({**call, "body": body})
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


def _completion(text):
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
    ).encode()


@contextlib.contextmanager
def judge_server(script):
    """Yield (base url, JudgeServer)."""
    judge = JudgeServer(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = judge.answer(body)
            if sent == "cut":
                # A reset instead of an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            code, headers, payload = 200, {}, b""
            if isinstance(sent, str):
                payload = _completion(sent)
            elif sent[0] == "status":
                code, headers = sent[1], sent[2] if len(sent) > 2 else {}
                payload = json.dumps({"error": {"message": f"scripted {code}", "type": "x"}}).encode()
            elif sent[0] == "slow":
                payload = _completion(sent[2])
            elif sent[0] == "text":
                payload = _completion(sent[1])
            else:
                payload = sent[1]
            with contextlib.suppress(OSError):  # a client that timed out is gone
                self.send_response(code)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

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
