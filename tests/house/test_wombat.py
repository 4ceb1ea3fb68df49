"""Wombat in miniature: five sources, four aspects, one step; a local server stands for the endpoints and the judge."""

from __future__ import annotations

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from house.recipe_checks import ROOT

from rrhf_peft.recipe import make_recipe
from rrhf_peft.sample.run import sample_recipe
from rrhf_peft.score.run import score_recipe
from rrhf_peft.train.run import train_recipe

pytest.importorskip("openai")

FOLDER = ROOT / "recipes" / "wombat"
ASPECTS = {"relevance": 9, "correctness": 4, "coherence": 7, "safety": 10}
SOURCES = ["alpaca-data", "chatgpt", "davinci", "llama", "alpaca"]


class Server:
    """Answers as an assistant, continues as a completions model, and judges: longer responses are more correct."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append((self.path, body))
                data = json.dumps(outer.reply(body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reply(self, body: dict) -> dict:
        choice: dict = {"index": 0, "finish_reason": "stop"}
        if "prompt" in body:
            choice["text"] = " A completion, as it were."
        else:
            text = body["messages"][-1]["content"]
            judged = re.search(r"<response>\n(.*)\n</response>", text, flags=re.DOTALL)
            answer = json.dumps({**ASPECTS, "correctness": len(judged[1]) % 11}) if judged else "Certainly, an answer."
            choice["message"] = {"role": "assistant", "content": answer}
        usage = {"completion_tokens": 5, "prompt_tokens": 1, "total_tokens": 6}
        return {"id": "1", "object": "o", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README's program makes of rows in the layout of Alpaca's data."""
    rows = [
        {"instruction": "Name a marsupial.", "input": "", "output": "The wombat."},
        {"instruction": "Translate to French.", "input": "Good day", "output": "Bonjour"},
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "They make five."},
    ]
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert program is not None
    assert "tatsu-lab/alpaca" in program[1]
    monkeypatch.chdir(tmp_path)
    exec(program[1].replace("tatsu-lab/alpaca", str(tmp_path / "alpaca")), {})  # noqa: S102 - the README's own
    return tmp_path / "runs" / "wombat" / "prompts.jsonl"


def test_all_sources_and_aspects_arrive_and_are_trained_on(tiny_model_folder, tmp_path, prompts, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    values = yaml.safe_load((FOLDER / "wombat.yaml").read_text(encoding="utf-8"))
    values["model"]["name"] = str(tiny_model_folder)
    for entry in values["sampling"]["candidates"]:
        entry["max_new_tokens"] = 8
        if "endpoint" in entry:
            entry["endpoint"]["base_url"] = server.url
        elif "model" in entry:
            entry["model"] = str(tiny_model_folder)
    values["scoring"]["scorer"]["base_url"] = server.url
    values["training"].update(max_steps=1, gradient_accumulation_steps=1, use_cpu=True, bf16=False)
    values["training"].update(save_strategy="no", disable_tqdm=True)
    recipe = make_recipe(values)
    assert recipe.sampling.prompts == str(prompts.relative_to(tmp_path))

    sample_recipe(recipe)
    score_recipe(recipe)
    rows = [json.loads(line) for line in (tmp_path / recipe.scoring.output).read_text().splitlines()]
    questions = ["Name a marsupial.", "Translate to French.\n\nGood day", "Add the numbers.\n\n2 and 3"]
    assert [row["prompt"] for row in rows] == questions
    for row in rows:
        assert row["sources"] == SOURCES
        kept = {name.rpartition(".")[2]: scores for name, scores in row["raw_scores"].items()}
        expected = {name: [score] * len(SOURCES) for name, score in ASPECTS.items()}
        expected["correctness"] = [len(response) % 11 for response in row["responses"]]
        assert {name: kept[name] for name in ASPECTS} == expected
        means = [sum(own) / len(ASPECTS) for own in zip(*expected.values(), strict=True)]
        assert row["scores"] == pytest.approx(means)

    completions = [body["prompt"] for path, body in server.asked if path.endswith("/completions") and "prompt" in body]
    assert len(completions) == 3
    assert all(text.startswith("Below is an instruction") and text.endswith("### Response:") for text in completions)
    systems = [body["messages"][0]["content"] for _, body in server.asked if len(body.get("messages", [])) == 2]
    assert len(systems) == 3 * len(SOURCES)
    assert all(f"- {name}: " in text for text in systems for name in ASPECTS)

    outcome = train_recipe(recipe)
    assert math.isfinite(outcome.metrics["train_loss"])
    assert (outcome.run_folder / "model.safetensors").is_file()
