"""From data of one's own to a model one can talk to: new, train --dry-run, chat, push, doctor."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from rrhf_peft import doctor
from rrhf_peft.chat import Decoding, Side, open_chat
from rrhf_peft.cli import app
from rrhf_peft.new import new_recipe
from rrhf_peft.recipe import load_recipe
from rrhf_peft.train.dry_run import DryRun

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def rrhf(*words: object, typed: str | None = None, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=typed)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"Question {n}?", "responses": ["Yes.", "No, not at all.", "Maybe."][:k], "scores": [2, 0, 1][:k]}
        for n in range(40)
        for k in [2 + n % 2]
    ]
    path = tmp_path_factory.mktemp("data") / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, ranked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter so strong that it answers otherwise than its base."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "mine.yaml"
    rrhf("new", "-m", tiny_model_folder, "-d", ranked, "-o", recipe)
    changes = [
        "training.max_steps=4",
        "training.learning_rate=0.5",
        "training.use_cpu=true",
        "training.logging_steps=1",
    ]
    rrhf("train", recipe, f"training.output_dir={folder / 'run'}", *changes)
    return folder / "run"


# new


def test_new_writes_what_it_saw_and_the_recipe_trains_as_it_stands(tiny_model_folder, ranked, tmp_path) -> None:
    said = rrhf("new", "--model", tiny_model_folder, "--data", ranked, "--output", tmp_path / "mine.yaml").output
    text = (tmp_path / "mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert json.loads((tmp_path / "recipe.schema.json").read_text())["title"] == "Recipe"
    assert "40 groups with k = 2 to 3" in text
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.data.template, recipe.data.max_tokens, recipe.data.eval_size) == ("raw", 64, 4)
    assert recipe.model.quantization == "none"
    assert recipe.training.output_dir == "runs/mine"
    assert "predicted peak" in said
    assert "instruct" not in said
    again = rrhf("new", "-m", tiny_model_folder, "-d", ranked, "-o", tmp_path / "mine.yaml", code=1)
    assert "is there already" in again.stderr
    assert (tmp_path / "mine.yaml").read_text() == text


def test_new_proposes_chat_where_the_tokenizer_has_a_template(tiny_model_folder, ranked, tmp_path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    assert "template: chat" in new_recipe(str(model), str(ranked), "x").text
    (tmp_path / "mine.yaml").write_text(new_recipe(str(model), str(ranked), "mine").text)
    changed = [
        "data.template=raw",
        "training.max_steps=1",
        "training.use_cpu=true",
        f"training.output_dir={tmp_path}/r",
    ]
    told = rrhf("train", tmp_path / "mine.yaml", *changed).stderr
    assert "data.template is raw, but" in told
    bare = tmp_path / "Tiny-Instruct"
    bare.symlink_to(tiny_model_folder)
    assert "named like an instruct model" in " ".join(new_recipe(str(bare), str(ranked), "x").notes)


def test_new_recognises_transcripts(tiny_model_folder, tmp_path) -> None:
    turns = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {}?\n\nAssistant:"
    rows = [{"prompt": turns.format(n), "responses": [" a", " b"], "scores": [1, 0]} for n in range(4)]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "template: hh" in new_recipe(str(tiny_model_folder), str(tmp_path / "hh.jsonl"), "x").text


def test_new_quantises_until_it_fits_and_says_where_nothing_does(ranked, tmp_path, tiny_model_folder) -> None:
    config = json.loads((tiny_model_folder / "config.json").read_text())
    config.update(hidden_size=512, intermediate_size=2048, num_hidden_layers=4, head_dim=128)
    for path in tiny_model_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    roomy = new_recipe(str(tmp_path), str(ranked), "x", fit_gib=24)
    assert "quantization: none" in roomy.text
    tight = new_recipe(str(tmp_path), str(ranked), "x", fit_gib=2 + 0.999 * roomy.plan.peak_bytes / 2**30)
    assert "quantization: nf4" in tight.text
    assert tight.plan.peak_bytes < roomy.plan.peak_bytes
    assert not tight.notes
    assert "do not fit" in new_recipe(str(tmp_path), str(ranked), "x", fit_gib=2.0001).notes[0]


# train --dry-run


def test_a_dry_run_measures_and_writes_nothing(tiny_model_folder, ranked, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(new_recipe(str(tiny_model_folder), str(ranked), "mine").text)
    before = sorted(tmp_path.rglob("*"))
    tried = json.loads(rrhf("train", "mine.yaml", "--dry-run", "--json", "training.use_cpu=true").stdout)
    assert sorted(tmp_path.rglob("*")) == before
    # 36 groups are trained on, 8 in a step, 3 epochs; the longest: 12 prompt tokens with BOS, 3 answers with EOS
    assert (tried["groups"], tried["groups_per_step"], tried["steps"]) == (36, 8, 15)
    assert tried["longest_tokens"] == len("Question 11?") + 1 + len("Yes.No, not at all.Maybe.") + 3
    assert 0 < tried["estimated_seconds"] <= tried["step_seconds"] * tried["steps"]
    assert tried["planned_bytes"] < tried["free_bytes"]
    measured = DryRun(**tried)
    assert ": fits" in measured.lines()[0]
    assert "DOES NOT FIT" in replace(measured, free_bytes=1000).lines()[0]
    assert "DOES NOT FIT" in replace(measured, peak_bytes=tried["free_bytes"] + 1).lines()[0]


# chat


def test_chat_answers_a_script_with_both_policies(run: Path) -> None:
    said = rrhf("chat", run, "--temperature", 0, "--max-new-tokens", 8, typed="Question 1?\n\n/new\nAgain?\n").stdout
    assert re.findall(r"^(> \S+|\w+):? ?", said, flags=re.MULTILINE)[:1] == ["> Question"]
    assert said.count("\nbase: ") == said.count("\ntrained: ") == 2
    short = ("--temperature", 0, "--max-new-tokens", 8, "--json")
    answers = json.loads(rrhf("chat", run, *short, typed="Q?\n").stdout)
    assert answers["base"] != answers["trained"]
    alone = json.loads(rrhf("chat", run, "--alone", *short, typed="Q?\n/quit\nno").stdout)
    assert alone == {"prompt": "Q?", "trained": answers["trained"]}


def test_the_base_beside_it_is_the_untrained_model(run: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    chat = open_chat(run)
    pieces: list[str] = []
    answer = chat.answer(chat.sides[0], "Hello", Decoding(temperature=0, max_new_tokens=6), pieces.append)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    ids = torch.tensor([[1, *chat.tokenizer("Hello")["input_ids"]]])
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert answer == chat.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert "".join(pieces).strip() == answer


def test_turns_are_remembered_where_the_template_has_them(run: Path) -> None:
    chat = open_chat(run)
    chat.template = "hh"
    side: Side = chat.sides[-1]
    for line in ("One", "Two"):
        chat.answer(side, line, Decoding(max_new_tokens=2), lambda text: None)
    assert [message["content"] for message in side.messages[::2]] == ["One", "Two"]


# push


def test_push_shows_the_files_and_the_card_and_sends_nothing(run: Path) -> None:
    upload = json.loads(rrhf("push", run, "me/mine", "--json").stdout)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "recipe.yaml"} <= set(upload["files"])
    assert not [name for name in upload["files"] if "checkpoint" in name or name == "training_args.bin"]
    assert upload["sent"] is None
    assert upload["figures"] == ["figures/training.png"]
    assert "## Results\n\n![" in upload["card"]
    assert str(run) not in upload["card"].split("## Recipe")[0]
    said = rrhf("push", run, "me/mine").stdout
    assert "Nothing was sent." in said
    assert "push it merged" in said  # its base is a folder here


class Hub(BaseHTTPRequestHandler):
    """Refuses whoever has no token, as the hub does."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    do_GET = do_HEAD = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_push_tells_who_is_not_logged_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "rrhf_peft.push.HfApi", lambda: huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
    )
    refused = rrhf("push", run, "me/mine", "--yes", code=1).stderr
    server.shutdown()
    assert "hf auth login" in refused


# doctor


def test_doctor_finds_this_installation_sound() -> None:
    findings = {finding["subject"]: finding for finding in json.loads(rrhf("doctor", "--json").stdout)}
    assert {"python", "torch", "4-bit weights", "extra plots", "disk", "hub"} <= set(findings)
    assert findings["4-bit weights"]["state"] == "ok"
    assert all(finding["remedy"] for finding in findings.values() if finding["state"] != "ok")


def test_doctor_names_what_is_too_old_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "no-such-package>=1", 'matplotlib>=99; extra == "plots"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    findings = {finding.subject: finding for finding in doctor.examine()}
    assert (findings["torch"].state, findings["torch"].remedy) == ("problem", "pip install 'torch>=99'")
    assert findings["no-such-package"].detail == "not installed"
    assert findings["extra plots"].state == "note"
    assert rrhf("doctor", code=1).stdout


def test_doctor_waits_for_the_hub_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "out of reach" in doctor._hub().detail
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(doctor.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert "answers 401" in doctor._hub().detail
    server.shutdown()
