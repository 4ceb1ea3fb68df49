"""From prompts and policies to candidates: every kind of prompt file, mixed policies, adapters, provided responses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from judge_server import judge_server
from rich.console import Console
from sample.sample_recipes import MIXED, read_rows, sample_recipe_of, sample_values, write_prompts
from transformers import AutoTokenizer

from rrhf_peft.data import read_groups, tokenize_groups
from rrhf_peft.jobs import Processes, ShardedOutput
from rrhf_peft.modeling import attach_adapter, load_base_model
from rrhf_peft.recipe import make_recipe
from rrhf_peft.records import UserError
from rrhf_peft.sample.policies import Decoding, PolicyLoader, make_stages
from rrhf_peft.sample.run import refuse_several_vllm, sample_recipe

TRANSCRIPT = "\n\nHuman: q\n\nAssistant:"
TOP_P = {"strategy": "top_p", "k": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    """Two adapters on different layers, each a large change; the initialisation of the second changes the base."""
    folders = []
    for number, fields in enumerate(
        [{"init_lora_weights": True}, {"init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"]}]
    ):
        torch.manual_seed(number)
        model = attach_adapter(load_base_model(tiny_model_folder), {"r": 4, **fields})
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.add_(torch.randn_like(weight))
        folder = tmp_path_factory.mktemp("adapters") / f"adapter-{number}"
        model.save_pretrained(folder)
        folders.append(folder)
    return folders


def test_strategies_mix_in_one_row_for_each_prompt(tiny_model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.json", 10)
    output = tmp_path / "out" / "candidates.jsonl"
    outcome = sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output))
    rows = read_rows(output)
    assert [row["prompt"] for row in rows] == json.loads(prompts.read_text(encoding="utf-8"))
    assert sorted(path.name for path in output.parent.iterdir()) == [
        ".candidates.jsonl.rrhf-peft.json",  # the mark
        "candidates.jsonl",
    ]
    name = tiny_model_folder.name
    for index, row in enumerate(rows):
        details, removed = row["meta"]["candidates"], row["meta"]["removed"]
        assert row["meta"]["prompt_index"] == index
        assert len(row["responses"]) == len(row["sources"]) == len(details) == 9 - len(removed)
        assert len(set(row["responses"])) == len(row["responses"])
        for source, detail in zip(row["sources"], details, strict=True):
            assert source == f"{detail['strategy']}:{name}"
            assert detail["policy"] == name
            assert detail["log_prob"] < 0
            assert 1 <= detail["num_tokens"] <= 10
    assert outcome.report.prompts == 10
    assert outcome.report.responses == sum(len(row["responses"]) for row in rows)
    assert set(outcome.report.sources) == {f"{entry['strategy']}:{name}" for entry in MIXED}
    for source, report in outcome.report.sources.items():
        own = [item for row in rows for item in row["meta"]["removed"] if item["source"] == source]
        assert report.duplicates == sum(item["reason"] == "duplicate" for item in own)
        assert report.empty == sum(item["reason"] == "empty" for item in own)
    with pytest.raises(UserError, match="already exists, and was made from other input or with other settings"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, seed=1))
    written = output.stat().st_mtime_ns
    assert sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output)).report == outcome.report
    assert output.stat().st_mtime_ns == written  # the same work is done once
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output), overwrite=True)
    assert read_rows(output) == rows


def test_rows_do_not_depend_on_units_or_budget_but_on_the_seed(tiny_model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.json", 8)
    settings = {"base": {}, "other": {"unit_prompts": 5, "batch_tokens": 5000}, "seed": {"seed": 1}}
    rows = {}
    for name, changes in settings.items():
        output = tmp_path / f"{name}.jsonl"
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, **changes))
        rows[name] = [row["responses"] for row in read_rows(output)]
    assert rows["base"] == rows["other"]
    assert rows["base"] != rows["seed"]


def test_adapters_take_turns_on_one_base(tiny_model_folder, adapters, tmp_path, monkeypatch):
    from rrhf_peft.sample import policies

    loads = []
    load = policies.base_of
    monkeypatch.setattr(policies, "base_of", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    prompts = write_prompts(tmp_path / "prompts.json", 4)
    variants = {
        "base": TOP_P,
        "plain": {**TOP_P, "adapter": str(adapters[0])},
        "pissa": {**TOP_P, "adapter": str(adapters[1])},
    }
    order = ["base", "plain", "pissa", "base", "plain"]  # entries of one policy share a stage
    entries = [{**variants[name], "source": f"{name}-{place}"} for place, name in enumerate(order)]
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "all.jsonl", entries))
    assert len(loads) == 1
    together = by_source(tmp_path / "all.jsonl")
    for place, name in enumerate(order):
        alone = [{**TOP_P, "temperature": 1e-4}] * place + [{**variants[name], "source": "it"}]
        output = tmp_path / f"alone-{place}.jsonl"
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, alone, keep_provided=False))
        assert by_source(output)["it"] == together[f"{name}-{place}"], name
    assert together["base-0"] != together["plain-1"] != together["pissa-2"]


def test_after_an_adapter_that_changes_the_base_the_base_is_loaded_again(tiny_model_folder, adapters, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.json", 4)
    entries = [{**TOP_P, "adapter": str(adapters[1]), "source": "pissa"}, {**TOP_P, "source": "base"}]
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "both.jsonl", entries))
    alone = [{**TOP_P, "temperature": 1e-4}, {**TOP_P, "source": "base"}]
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "alone.jsonl", alone))
    assert by_source(tmp_path / "both.jsonl")["base"] == by_source(tmp_path / "alone.jsonl")["base"]


def by_source(path):
    found = {}
    for row in read_rows(path):
        for source, text in zip(row["sources"], row["responses"], strict=True):
            found.setdefault(source, []).append((row["meta"]["prompt_index"], text))
    return found


def test_stages_with_one_base_stand_side_by_side():
    entry = {"strategy": "top_p"}
    candidates = [entry, {**entry, "model": "other/model"}, {**entry, "adapter": "runs/a"}, {**entry, "model": "my/m"}]
    values = {
        "model": {"name": "my/m", "quantization": "nf4", "init_adapter": "runs/b"},
        "sampling": {"prompts": "p", "output": "o.jsonl", "candidates": candidates},
    }
    stages = make_stages(make_recipe(values, needs=["sampling"]))
    assert [(stage.name, stage.adapter, sorted(stage.entries)) for stage in stages] == [
        ("b", "runs/b", [0]),
        ("a", "runs/a", [2]),
        ("m", None, [3]),
        ("model", None, [1]),
    ]
    assert stages[3].model.quantization == "nf4"


def test_provided_responses_stay_in_front_with_their_scores(tiny_model_folder, tmp_path):
    ranked = tmp_path / "ranked.jsonl"
    group = {"prompt": "Why?", "responses": ["Because.", " ", "Because.", "Ask."], "scores": [1.0, 3.0, 0.5, 2.0]}
    ranked.write_text(json.dumps({**group, "sources": ["human", "x", "model", "chosen"]}) + "\n")
    sample_recipe(sample_recipe_of(tiny_model_folder, ranked, tmp_path / "a.jsonl", [TOP_P]))
    (row,) = read_rows(tmp_path / "a.jsonl")
    assert row["responses"][:2] == ["Because.", "Ask."]
    assert row["sources"][:2] == ["human", "chosen"]
    assert [detail["provided_score"] for detail in row["meta"]["candidates"][:3]] == [1.0, 2.0, None]
    assert row["meta"]["removed"] == [{"source": "x", "reason": "empty"}, {"source": "model", "reason": "duplicate"}]
    assert row["meta"]["line"] == 1

    sample_recipe(sample_recipe_of(tiny_model_folder, ranked, tmp_path / "b.jsonl", [TOP_P], keep_provided=False))
    (without,) = read_rows(tmp_path / "b.jsonl")
    assert without["responses"] == row["responses"][2:]

    # P: provided responses only, and no model at all
    values = {"sampling": {"prompts": str(ranked), "output": str(tmp_path / "p.jsonl")}}
    sample_recipe(make_recipe(values, needs=["sampling"]))
    assert read_rows(tmp_path / "p.jsonl")[0]["responses"] == ["Because.", "Ask."]

    # its output is a prompt file again
    (prompt,) = read_groups(str(tmp_path / "b.jsonl"), needs="prompt")
    assert (prompt.responses, list(prompt.scores)) == (without["responses"], [None, None])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\nzwei 🙂\r\n", ["one", "zwei 🙂"]),
        ("a.json", '["one", "two\\nlines"]', ["one", "two\nlines"]),
        ("b.json", '[{"prompt": "one"}, {"prompt": "two", "id": 7}]', ["one", "two"]),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": [{"role": "user", "content": "hi"}]}\n', None),
        ("b.jsonl", '{"prompt": "one", "chosen": "y", "rejected": "n"}\n', ["one"]),
        ("c.jsonl", json.dumps({"chosen": f"{TRANSCRIPT} y", "rejected": f"{TRANSCRIPT} n"}) + "\n", [TRANSCRIPT]),
    ],
)
def test_prompt_files(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = read_groups(str(tmp_path / name), needs="prompt")
    if expected is not None:
        assert [prompt.prompt for prompt in found] == expected
    else:
        assert found[1].prompt == [{"role": "user", "content": "hi"}]
    provided = {"b.jsonl": ["y", "n"], "c.jsonl": [" y", " n"]}.get(name, [])
    assert found[0].responses == provided
    assert [prompt.index for prompt in found] == list(range(len(found)))
    assert len(read_groups([str(tmp_path / name)] * 2, max_groups=len(found) + 1, needs="prompt")) == len(found) + 1


@pytest.mark.parametrize(
    ("text", "part"),
    [('["a", 3]', "row 1 (from 0) is not text"), ("[]", "no rows"), ('{"prompt": 3}', "prompt"), ('["a', "JSON")],
)
def test_wrong_prompt_files(tmp_path, text, part):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_groups(str(tmp_path / "a.json"), needs="prompt")
    assert part in str(caught.value)
    assert "a.json" in str(caught.value)


TOP_P_ONCE = Decoding("top_p", k=1, max_new_tokens=4)


def test_templates_shape_what_the_policy_reads(tiny_model_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n")
    seen = {}
    for template in ("raw", "hh", "alpaca"):
        recipe = sample_recipe_of(tiny_model_folder, prompts, tmp_path / "x.jsonl", [TOP_P], template=template)
        policy = PolicyLoader(recipe.sampling).load(make_stages(recipe)[0])
        policy.answer = lambda encoded, *rest, template=template, **more: seen.update({template: encoded[0]}) or [[]]
        assert list(policy.respond(read_groups(str(prompts), needs="prompt"), ["0"], TOP_P_ONCE, None)) == [
            (0, ([], []))
        ]
    decode = AutoTokenizer.from_pretrained(tiny_model_folder).decode
    assert decode(seen["raw"]) == "<s>Why?"
    assert decode(seen["hh"]) == "<s>\n\nHuman: Why?\n\nAssistant:"
    assert decode(seen["alpaca"]).endswith("### Instruction:\nWhy?\n\n### Response:")


def test_a_missing_model_extra_or_adapter_is_told_before_anything_is_sampled(tiny_model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.json", 2)
    output = tmp_path / "o.jsonl"
    values = {"sampling": {"prompts": str(prompts), "output": str(output), "candidates": [TOP_P]}}
    recipe = make_recipe(values, needs=["sampling"])
    with pytest.raises(UserError, match=r"sampling\.candidates\.0: names no model"):
        sample_recipe(recipe)
    entries = [TOP_P, {**TOP_P, "adapter": str(tmp_path / "none")}]
    with pytest.raises(UserError, match="no such adapter folder"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, entries))
    assert not output.with_name("o.jsonl.stages").exists()
    with pytest.raises(UserError, match=r"must end with \.jsonl"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.json"))


def test_vllm_is_asked_for_in_one_sentence(tiny_model_folder, tmp_path):
    try:
        import vllm  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("vllm is installed here")
    prompts = write_prompts(tmp_path / "prompts.json", 2)
    entries = [{**TOP_P, "backend": "vllm"}]
    with pytest.raises(UserError, match="pip install 'rrhf-peft\\[vllm\\]'"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.jsonl", entries))


def test_a_server_answers_beside_a_model(tiny_model_folder, tmp_path):
    pytest.importorskip("openai")
    (tmp_path / "prompts.json").write_text(json.dumps(["5", "6"]))
    output, faults = tmp_path / "o.jsonl", ["cut", ("status", 400, {}, "too long for me")]

    def script(call):
        return faults.pop(0) if call["messages"][-1]["content"] == "6" and faults else f"text {call['number']}"

    with judge_server(script) as (url, _):
        endpoint = {"base_url": url, "model": "org/served", "concurrency": 1}
        entries = [TOP_P, {**TOP_P, "k": 3, "backend": "endpoint", "endpoint": endpoint}]
        outcome = sample_recipe(sample_recipe_of(tiny_model_folder, tmp_path / "prompts.json", output, entries))
    rows = read_rows(output)
    assert [row["sources"].count("top_p:served") for row in rows] == [3, 2]
    missing = {"source": "top_p:served", "reason": "missing", "why": "http 400: too long for me"}
    assert missing in rows[1]["meta"]["removed"]
    assert outcome.report.sources["top_p:served"].missing == 1
    assert outcome.report.reasons == {"http 400: too long for me": 1}
    assert all(row["sources"][0] == f"top_p:{tiny_model_folder.name}" for row in rows)


def test_more_effort_another_address_or_another_entry_throw_nothing_away(tmp_path, monkeypatch):
    """The server goes away after some prompts; the second run has another address, more retries and one more entry."""
    pytest.importorskip("openai")
    (tmp_path / "prompts.json").write_text(json.dumps([f"p{number}" for number in range(30)]))
    output = tmp_path / "o.jsonl"

    def recipe_of(url, entries, **effort):
        endpoint = {"base_url": url, "model": "served", "concurrency": 1, **effort}
        candidates = [{**TOP_P, **entry, "backend": "endpoint", "endpoint": endpoint} for entry in entries]
        values = sample_values("unused", tmp_path / "prompts.json", output, candidates)
        return make_recipe({"sampling": values["sampling"]}, needs=["sampling"])

    def first(call):
        return f"first {call['number']}" if call["number"] < 24 else ("status", 401, {}, "key expired")

    with judge_server(first) as (url, _), pytest.raises(UserError, match=r"key expired.*finished before is kept"):
        sample_recipe(recipe_of(url, [{"temperature": 0.5}], max_retries=0))
    monkeypatch.setenv("OTHER_KEY", "x")
    effort = {"max_retries": 9, "concurrency": 4, "timeout": 60, "api_key_env": "OTHER_KEY"}
    with judge_server(lambda call: f"second {call['number']}") as (url, server):
        sample_recipe(recipe_of(url, [{"temperature": 0.5}, {"temperature": 0.7}], **effort))
        asked = {(call["messages"][-1]["content"], call["body"]["temperature"]) for call in server.calls}
    rows = read_rows(output)
    assert [row["responses"][0].split()[0] for row in rows] == ["first"] * 12 + ["second"] * 18
    assert asked == {(f"p{n}", 0.5) for n in range(12, 30)} | {(f"p{n}", 0.7) for n in range(30)}


def test_prompts_without_a_response_are_set_apart_and_counted(tiny_model_folder, tmp_path):
    """Two prompts are longer than the model's context; the others, and what trains on them, go on."""
    (tmp_path / "prompts.json").write_text(json.dumps(["short", "long " * 400, "also short", "words " * 400]))
    output = tmp_path / "o.jsonl"
    outcome = sample_recipe(sample_recipe_of(tiny_model_folder, tmp_path / "prompts.json", output, [TOP_P]))
    assert [row["prompt"] for row in read_rows(output)] == ["short", "also short"]
    assert outcome.failures == tmp_path / "o.failures.jsonl"
    failed = read_rows(outcome.failures)
    assert [(row["prompt"][:5], row["meta"]["prompt_index"], row["responses"]) for row in failed] == [
        ("long ", 1, []),
        ("words", 3, []),
    ]
    assert "context of 512" in failed[0]["meta"]["removed"][0]["why"]
    report = outcome.report
    assert (report.prompts, report.without, sum(report.reasons.values())) == (2, 2, 4)
    with (shown := Console(width=200)).capture() as text:
        shown.print(report.table())
    assert "2 more prompts have no response" in text.get()
    # Who measures a policy keeps a row for every prompt.
    measured = tmp_path / "all.jsonl"
    recipe = sample_recipe_of(tiny_model_folder, tmp_path / "prompts.json", measured, [TOP_P])
    assert sample_recipe(recipe, keep_all=True).failures is None
    assert [len(row["responses"]) for row in read_rows(measured)] == [2, 0, 2, 0]


def test_when_no_prompt_gets_a_response_there_is_no_output(tiny_model_folder, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(["long " * 400]))
    with pytest.raises(UserError, match=r"none of 1 prompts has a response .*context of 512"):
        sample_recipe(sample_recipe_of(tiny_model_folder, tmp_path / "prompts.json", tmp_path / "o.jsonl", [TOP_P]))
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("strategy", ["top_p", "beam", "diverse_beam"])
def test_a_base_of_nans_is_an_error(tiny_model_folder, tmp_path, strategy):
    model = load_base_model(tiny_model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "broken")
    prompts = write_prompts(tmp_path / "prompts.json", 3)
    entry = {"strategy": strategy, "k": 2, "max_new_tokens": 4}
    with pytest.raises(UserError, match=r"not numbers|not finite|NaN"):
        sample_recipe(sample_recipe_of(tmp_path / "broken", prompts, tmp_path / "o.jsonl", [entry]))
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("strategy", ["beam", "diverse_beam"])
def test_more_beams_than_tokens_are_refused(tiny_model_folder, tmp_path, strategy):
    vocabulary = load_base_model(tiny_model_folder).config.vocab_size
    prompts = write_prompts(tmp_path / "prompts.json", 1)
    entry = {"strategy": strategy, "k": vocabulary + 1, "max_new_tokens": 2}
    with pytest.raises(UserError, match=f"{vocabulary + 1} beams are more than the {vocabulary} tokens"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.jsonl", [entry]))


def test_no_two_candidates_of_a_run_share_a_random_stream(tiny_model_folder, tmp_path, monkeypatch):
    """Several entries, of one model and of two, and several prompts."""
    from rrhf_peft.sample import transformers_policy

    streams = []
    stream = transformers_policy.uniform_stream
    monkeypatch.setattr(
        transformers_policy, "uniform_stream", lambda key, length: streams.append(key) or stream(key, length)
    )
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_folder, copy)
    entries = [TOP_P, TOP_P, {**TOP_P, "model": str(copy)}, {**TOP_P, "temperature": 0.5, "model": str(copy)}]
    entries = [{**entry, "source": str(index)} for index, entry in enumerate(entries)]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["the same"] * 12))
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.jsonl", entries), keep_all=True)
    assert len(streams) == len(set(streams)) == 12 * 4 * 2


def test_what_was_sampled_is_kept_token_for_token(tiny_model_folder, tmp_path):
    """`token_ids` are what the model wrote, and its text; columns of the prompts stay."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Why?", "answer": 42}) + "\n")
    entry = {"strategy": "top_p", "k": 64, "max_new_tokens": 6, "temperature": 2.0}
    beams = {"strategy": "beam", "k": 2, "max_new_tokens": 6}
    recipe = sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.jsonl", [entry, beams], stop=list("aeiost"))
    sample_recipe(recipe)
    (row,) = read_rows(tmp_path / "o.jsonl")
    assert row["answer"] == 42
    (group,) = read_groups(str(tmp_path / "o.jsonl"), needs="responses")
    assert set(group.finish_reasons) <= {"eos", "stop", "length"}
    assert len(set(group.finish_reasons)) > 1
    for text, ids, reason, count in zip(
        group.responses, group.token_ids, group.finish_reasons, group.num_tokens, strict=True
    ):
        if reason == "stop":
            assert ids is None  # the text is not all that was sampled
            continue
        assert len(ids) == count
        assert (ids[-1] == tokenizer.eos_token_id) == (reason == "eos")
        assert (count == 6) or reason == "eos"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_prompts_are_not_overwritten(tiny_model_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "mine"}\n')
    with pytest.raises(UserError, match="is what this run reads"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, prompts, [TOP_P]), overwrite=True)
    assert prompts.read_text() == '{"prompt": "mine"}\n'
    failed = tmp_path / "o.failures.jsonl"  # which a run without failures removes
    prompts.rename(failed)
    with pytest.raises(
        UserError, match=r"o\.failures\.jsonl, which is written beside .*o\.jsonl: is what this run reads"
    ):
        sample_recipe(sample_recipe_of(tiny_model_folder, failed, tmp_path / "o.jsonl", [TOP_P]))
    assert failed.read_text() == '{"prompt": "mine"}\n'


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("sibling", ["o.jsonl.stages", "o.failures.jsonl", "o.jsonl"])
def test_siblings_that_are_the_users_stay(tiny_model_folder, tmp_path, sibling, overwrite):
    prompts = write_prompts(tmp_path / "prompts.json", 2)
    mine = tmp_path / sibling
    if sibling.endswith("stages"):
        mine.mkdir()
        mine = mine / "notes.txt"
    mine.write_text("mine\n")
    with pytest.raises(UserError) as caught:
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.jsonl", [TOP_P]), overwrite=overwrite)
    assert sibling in str(caught.value)
    assert mine.read_text() == "mine\n"


def test_sampling_stops_where_the_chat_template_ends_a_turn(tiny_model_folder, tmp_path):
    """Its end is another token than EOS; it is the last of the sampled ids and no part of the text."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model_folder), load_base_model(tiny_model_folder)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():  # untrained, a model writes all tokens alike: now it ends a turn now and then
        model.lm_head.weight.mul_(0)
        hidden = model(torch.arange(3, 60)[None], output_hidden_states=True).hidden_states[-1][0].mean(0)
        model.lm_head.weight[end] = 6 * hidden / hidden.square().sum()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "chat")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n")
    entry = {"strategy": "top_p", "k": 40, "max_new_tokens": 12}
    recipe = sample_recipe_of(tmp_path / "chat", prompts, tmp_path / "o.jsonl", [entry], template="chat")
    sample_recipe(recipe, keep_all=True)
    (group,) = read_groups(str(tmp_path / "o.jsonl"), needs="responses")
    ended = [ids for ids, reason in zip(group.token_ids, group.finish_reasons, strict=True) if reason == "eos"]
    assert len([ids for ids in ended if ids[-1] == end]) > 5
    assert not any(end in ids[:-1] for ids in group.token_ids)
    assert not any("im_end" in text for text in group.responses)
    assert "length" in group.finish_reasons
    # What is trained on is what was sampled, with the end of turn where there was one.
    (tokenized,), _ = tokenize_groups(
        [replace(group, scores=[float(number) for number in range(40)])], tokenizer, template="chat"
    )
    trained = {tuple(ids) for ids in tokenized.response_ids}
    assert trained == {tuple(ids) for ids, text in zip(group.token_ids, group.responses, strict=True) if text.strip()}


def test_killed_before_the_stages_were_removed_then_run_with_another_seed(tiny_model_folder, tmp_path, monkeypatch):
    """The output is whole and the stages are still there: another seed's run must not call the old rows its own."""
    prompts = write_prompts(tmp_path / "prompts.json", 3)
    output = tmp_path / "o.jsonl"
    with monkeypatch.context() as killing:

        def kill(path):
            raise KeyboardInterrupt

        killing.setattr("rrhf_peft.sample.run.remove_work_folder", kill)
        with pytest.raises(KeyboardInterrupt):
            sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]))
    written = output.read_bytes()
    with pytest.raises(UserError, match="made from other input or with other settings"):
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P], seed=1))
    assert output.read_bytes() == written
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]))
    assert not (tmp_path / "o.jsonl.stages").exists()


@pytest.mark.parametrize("damage", ["rows", "mark", "no JSON"])
def test_damaged_intermediate_files_are_one_paragraph_or_done_again(tiny_model_folder, tmp_path, monkeypatch, damage):
    prompts = write_prompts(tmp_path / "prompts.json", 3)
    output, expected = tmp_path / "o.jsonl", tmp_path / "expected.jsonl"
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, expected, [TOP_P]))
    with monkeypatch.context() as killing:

        def kill(*arguments, **keywords):
            raise KeyboardInterrupt

        killing.setattr("rrhf_peft.sample.run.write_files", kill)
        with pytest.raises(KeyboardInterrupt):
            sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]))
    (finished,) = (tmp_path / "o.jsonl.stages").glob("*.jsonl")
    if damage == "rows":
        finished.write_bytes(finished.read_bytes()[:-20])
    elif damage == "no JSON":
        finished.write_text("{{{\n")
    else:
        (mark,) = (tmp_path / "o.jsonl.stages").glob(".*.jsonl.rrhf-peft.json")
        mark.write_text("[1, 2")
    with pytest.raises(UserError) as caught:
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]))
    assert str(finished) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]), overwrite=True)
    assert read_rows(output) == read_rows(expected)


def test_vllm_in_several_processes_is_refused(tiny_model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.json", 2)
    recipe = sample_recipe_of(tiny_model_folder, prompts, tmp_path / "o.jsonl", [{**TOP_P, "backend": "vllm"}])
    with pytest.raises(UserError, match="data-parallel-size"):
        refuse_several_vllm(make_stages(recipe), Processes(0, 2))
    refuse_several_vllm(make_stages(recipe), Processes(0, 1))


def test_a_full_disk_in_mid_run_is_one_paragraph_and_nothing_sampled_is_lost(tiny_model_folder, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "prompts.json", 9)  # three units
    output, expected = tmp_path / "o.jsonl", tmp_path / "expected.jsonl"
    sample_recipe(sample_recipe_of(tiny_model_folder, prompts, expected, [TOP_P]))
    write, written = ShardedOutput.write, []

    def until_full(shards, unit, rows):
        if len(written) == 2:
            monkeypatch.setattr(os, "fsync", full)
        written.append(unit)
        write(shards, unit, rows)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as filling:
        filling.setattr(ShardedOutput, "write", until_full)
        with pytest.raises(UserError, match=r"disk is full.*finished is kept") as caught:
            sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]))
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert not output.exists()
    with monkeypatch.context() as counting:
        counting.setattr(ShardedOutput, "write", lambda *arguments: written.append(arguments[1]) or write(*arguments))
        sample_recipe(sample_recipe_of(tiny_model_folder, prompts, output, [TOP_P]))
    assert written in ([0, 1, 2, 2], [0, 1, 2])  # the last one may have reached the disk all the same
    assert read_rows(output) == read_rows(expected)
