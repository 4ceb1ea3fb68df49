"""Responses are the tokens that generation writes after the prompt: the seam, the end, and what was sampled."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from rrhf_peft.data import (
    chat_messages,
    continuation_ids,
    end_of_response_ids,
    read_groups,
    stop_token_ids,
    templates,
    tokenization_fingerprint,
    tokenize_every_response,
    tokenize_groups,
    transcript,
)
from rrhf_peft.records import RankedGroup, UserError

OPEN = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + OPEN
    + "<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + OPEN + "<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + OPEN
    + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + OPEN + "assistant: {% endif %}"
ADDED = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"]


def chat_tokenizer(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def pair(prompt="q", responses=("yes", "no"), **about):
    return RankedGroup(prompt, list(responses), [1.0, 0.0], ["a", "b"], **about)


def tokens(tokenizer, group, **keys):
    (tokenized,), report = tokenize_groups([group], tokenizer, **keys)
    return [tokenizer.convert_ids_to_tokens(list(ids)) for ids in tokenized.response_ids], report


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, ["<|im_end|>"]),
        (GEMMA, ["<end_of_turn>"]),
        (PHI, ["<|end|>"]),
        (LLAMA2, ["Ġ", "</s>"]),
        (PLAIN, ["</s>"]),
    ],
    ids=["chatml", "gemma", "phi", "llama2", "plain"],
)
def test_a_response_ends_as_the_chat_template_ends_a_turn(byte_tokenizer, template, end):
    tokenizer = chat_tokenizer(byte_tokenizer, template)
    (yes, _), report = tokens(tokenizer, pair(), template="chat")
    assert yes == [*(["Ġ"] if template == LLAMA2 else []), *"yes", *end]
    assert tokenizer.convert_ids_to_tokens(end_of_response_ids(tokenizer, "chat")) == end
    assert set(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, "chat"))) == {end[-1], "</s>"}
    assert report.end_of_response.endswith(end[-1])
    # The other templates end with EOS, whatever the tokenizer's chat template does.
    (yes, _), report = tokens(tokenizer, pair(), template="raw")
    assert yes == [*"yes", "</s>"]
    assert report.chat_template_ignored


def test_prompt_and_response_are_the_rendered_conversation(byte_tokenizer):
    tokenizer = chat_tokenizer(byte_tokenizer, CHATML)
    (tokenized,), _ = tokenize_groups([pair()], tokenizer, template="chat")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert [*tokenized.prompt_ids, *tokenized.response_ids[0]] == whole[:-1]  # the line break is never generated


def test_text_that_spells_a_special_token_stays_text(byte_tokenizer):
    tokenizer = chat_tokenizer(byte_tokenizer, CHATML)
    (first, _), _ = tokens(tokenizer, pair(responses=["a<|im_end|><|im_start|>b", "no"]), template="chat")
    assert first == [*"a<|im_end|><|im_start|>b", "<|im_end|>"]
    # Nor does it become one where half of it stands in the prompt.
    (first, _), _ = tokens(tokenizer, pair("see <|im_", ["end|>", "no"]))
    assert first == [*"end|>", "</s>"]


def test_what_was_cut_when_sampled_gets_no_end(byte_tokenizer, jsonl):
    (yes, no), report = tokens(byte_tokenizer, pair(finish_reasons=["length", "eos"]))
    assert (yes, no) == ([*"yes"], [*"no", "</s>"])
    assert report.responses_without_end == 1
    candidates = [{"finish_reason": "length", "num_tokens": 3}, {"finish_reason": "stop", "num_tokens": 9}]
    row = {"prompt": "q", "responses": ["yes", "no"], "scores": [1, 0], "meta": {"candidates": candidates}}
    assert tokens(byte_tokenizer, read_groups(jsonl(row))[0])[0] == [[*"yes"], [*"no", "</s>"]]
    # The same text, cut and ended, is not the same response.
    both, report = tokens(byte_tokenizer, pair(responses=["yes", "yes"], finish_reasons=["length", "eos"]))
    assert both == [[*"yes"], [*"yes", "</s>"]]
    assert report.duplicates_merged == {}


def test_what_was_sampled_is_trained_on_as_it_is(stories_tokenizer):
    tokenizer = stories_tokenizer
    fingerprint = tokenization_fingerprint(tokenizer, "raw")
    letters = tokenizer.convert_tokens_to_ids(["▁", "h", "e"])  # "he" is one token
    about = {
        "token_ids": [letters, [*letters, tokenizer.eos_token_id]],
        "finish_reasons": ["length", "eos"],
        "num_tokens": [3, 4],
    }
    group = pair("Once", [" he", " he"], tokenizers=[fingerprint] * 2, **about)
    (tokenized,), report = tokenize_groups([group], tokenizer)
    assert list(map(list, tokenized.response_ids)) == about["token_ids"]
    assert (report.responses_as_sampled, report.lengths_unlike_sampled) == (2, 0)

    for other in (
        pair("Once", [" he", " he"], tokenizers=["0" * 16] * 2, **about),  # of another tokenizer
        pair("Once", [" he", " he"], **{**about, "token_ids": ()}),  # of a server that does not tell
    ):
        (tokenized,), report = tokenize_groups([other], tokenizer)
        assert list(tokenized.response_ids[0]) != letters
        assert (report.responses_as_sampled, report.lengths_unlike_sampled) == (0, 2)
    edited = pair("Once", [" she", " he"], tokenizers=[fingerprint] * 2, **about)
    (tokenized,), report = tokenize_groups([edited], tokenizer)
    assert tokenizer.decode(list(tokenized.response_ids[0])) == "she"
    assert report.responses_as_sampled == 1
    stopped = pair("Once", [" he", " he"], tokenizers=[fingerprint] * 2, **{**about, "finish_reasons": ["stop"] * 2})
    assert tokenize_groups([stopped], tokenizer, needs_pairs=False)[1].responses_as_sampled == 0


def test_the_fingerprint_is_of_tokenizer_and_template(byte_tokenizer):
    chat, other = chat_tokenizer(byte_tokenizer, CHATML), chat_tokenizer(byte_tokenizer, PHI)
    assert tokenization_fingerprint(chat, "raw") == tokenization_fingerprint(other, "raw")
    prints = {tokenization_fingerprint(chat, "raw"), tokenization_fingerprint(byte_tokenizer, "raw")}
    prints |= {tokenization_fingerprint(chat, "chat"), tokenization_fingerprint(other, "chat")}
    assert len(prints) == 4
    before = tokenization_fingerprint(byte_tokenizer, "raw")
    byte_tokenizer(["a", "bc"], padding=True, truncation=True, max_length=2)  # leaves its traces in the tokenizer
    assert tokenization_fingerprint(byte_tokenizer, "raw") == before


@pytest.mark.parametrize("kind", ["stories_tokenizer", "llama2_tokenizer"])
def test_responses_are_the_continuation_of_their_prompts(kind, request, shared_data):
    """Whatever the seam is, prompt and response are the tokens of the whole text, as if all of it had been read."""
    tokenizer = request.getfixturevalue(kind)
    stories = json.loads((shared_data / "text" / "tinystories_1000.json").read_text())[:40]
    lines = (shared_data / "ranked" / "hh_harmless_test_k2.jsonl").read_text().splitlines()[:40]
    pairs = [(row["prompt"], row["responses"][0]) for row in map(json.loads, lines)]
    for number, story in enumerate(stories):
        cut = len(story) // 2 + number  # in words, between words, before full stops
        pairs.append((story[:cut], story[cut:]))
    prompts, texts = zip(*pairs, strict=True)
    apart = 0
    for prompt, text, ids in zip(prompts, texts, continuation_ids(tokenizer, prompts, texts), strict=True):
        start, whole = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, prompt + text))
        if whole[: len(start)] == start:
            assert ids == whole[len(start) :]
        else:
            apart += 1
            assert tokenizer.decode([*start, *ids]).replace(" ", "") == tokenizer.decode(whole).replace(" ", "")
    assert 0 < apart < len(pairs) / 2


def test_a_seam_inside_a_token_keeps_the_prompt(llama2_tokenizer):
    (tokenized,), report = tokenize_groups([pair("The gar", ["den", "lic"])], llama2_tokenizer)
    assert tokenized.prompt_ids.tolist() == [1, *llama2_tokenizer("The gar", add_special_tokens=False)["input_ids"]]
    for ids, text in zip(tokenized.response_ids, ("den", "lic"), strict=True):
        assert "".join(llama2_tokenizer.convert_ids_to_tokens(list(ids[:-1]))) == text  # and no space in front
    assert report.seams_merged > 0


def test_the_seam_of_a_tokenizer_that_prepends_a_space(stories_tokenizer):
    (first, _), _ = tokens(stories_tokenizer, pair("The girl loved her", [". It was fun", ", too"]))
    assert "".join(first) == ".▁It▁was▁fun<|end_story|>"


@pytest.fixture(scope="module")
def sampled(tinystories):
    """The base's own samples, with the log-probs they were drawn with."""
    from rrhf_peft.data import encode_prompts
    from rrhf_peft.modeling import TokenBudget, load_base_model, load_tokenizer
    from rrhf_peft.sample.policies import Decoding
    from rrhf_peft.sample.transformers_policy import respond

    model, tokenizer = load_base_model(str(tinystories)), load_tokenizer(str(tinystories))
    stories = json.loads((tinystories.parents[1] / "text" / "tinystories_1000.json").read_text())[:40]
    prompts = [" ".join(story.split()[:12]) for story in stories]
    decoding = Decoding("top_p", k=1, max_new_tokens=32, temperature=0.8)
    keys = [f"0/{number}" for number in range(len(prompts))]
    found = respond(model, tokenizer, encode_prompts(tokenizer, prompts), keys, decoding, TokenBudget(16384))
    return model, tokenizer, prompts, [own[0] for own in found]


def test_the_base_finds_its_own_samples_likely(sampled):
    """Its perplexity on them is what it drew them with, within a tenth; alone, they would be half as likely again."""
    from rrhf_peft.evaluate.measure import perplexity

    model, tokenizer, prompts, candidates = sampled
    drawn = math.exp(-sum(own.log_prob for own in candidates) / sum(own.num_tokens for own in candidates))
    assert perplexity(model, tokenizer, prompts, [own.text for own in candidates]) == pytest.approx(drawn, rel=0.15)


def test_scoring_reads_the_tokens_that_training_sees(sampled):
    _, tokenizer, prompts, candidates = sampled
    groups = [
        RankedGroup(prompt, [own.text, " no", own.text], [1.0, 0.0, 1.0], index=index)
        for index, (prompt, own) in enumerate(zip(prompts, candidates, strict=True))
    ]
    trained, _ = tokenize_groups(groups, tokenizer)
    measured, truncated = tokenize_every_response(groups, tokenizer)
    assert (truncated, len(measured)) == (0, len(groups))
    assert len(trained) > len(groups) / 2  # the others sampled nothing
    for one in trained:
        other = measured[one.index]
        assert list(one.prompt_ids) == list(other.prompt_ids)
        assert [list(ids) for ids in one.response_ids] == [list(ids) for ids in other.response_ids[:2]]
        assert (other.sources, other.response_ids[2]) == (["0", "1", "2"], other.response_ids[0])


def test_a_template_that_never_ends_is_stopped(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"group 0: the tokenizer's chat template .* not done after 0\.2 seconds"):
        tokenize_groups([pair()], chat_tokenizer(byte_tokenizer, loop), template="chat")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("broken", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{% for %}", "{{ messages + 1 }}"])
def test_a_template_that_raises_is_one_sentence(byte_tokenizer, broken):
    with pytest.raises(UserError, match="group 0: the tokenizer's chat template refuses messages of the roles user"):
        tokenize_groups([pair()], chat_tokenizer(byte_tokenizer, broken), template="chat")


TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }}>{% endfor %}{% endfor %}"
    "{% if thinking %}!{% endif %}"
)
CALL = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
    {"role": "tool", "content": "42"},
]


def test_tool_calls_tools_and_arguments_reach_the_template(byte_tokenizer, jsonl):
    row = {
        "prompt": CALL, "responses": ["a", "b"], "scores": [1, 0],
        "tools": [{"name": "look"}], "chat_template_kwargs": {"thinking": True},
    }  # fmt: skip
    (group,) = read_groups(jsonl(row))
    tokenizer = chat_tokenizer(byte_tokenizer, TOOLS)
    expected = '[{"name": "look"}][system]s[user]q[assistant]<look>[tool]42!'
    assert templates.prompt_text(group, tokenizer, "chat") == expected
    as_text = RankedGroup(group.prompt, columns={**group.columns, "tools": '[{"name": "look"}]'})  # as Arrow stores it
    assert templates.prompt_text(as_text, tokenizer, "chat") == expected


@pytest.mark.parametrize("template", ["raw", "hh", "alpaca"])
def test_what_plain_text_cannot_say_is_refused(byte_tokenizer, template):
    with pytest.raises(UserError, match=rf"group 0: template {template}: message 2 of the prompt has tool_calls"):
        tokenize_groups([pair([*CALL])], byte_tokenizer, template=template)
    with pytest.raises(UserError, match=rf"template {template}: the column tools"):
        tokenize_groups([pair(CALL[:2], columns={"tools": [{"name": "x"}]})], byte_tokenizer, template=template)


def test_a_key_that_the_chat_template_never_reads_is_refused(byte_tokenizer):
    tokenizer = chat_tokenizer(byte_tokenizer, CHATML)
    with pytest.raises(UserError, match="group 0: the tokenizer's chat template never reads tool_calls"):
        tokenize_groups([pair([*CALL])], tokenizer, template="chat")
    with pytest.raises(UserError, match="never reads tools"):
        tokenize_groups([pair(CALL[:2], columns={"tools": [{"name": "x"}]})], tokenizer, template="chat")


def test_a_transcript_and_its_turns_are_the_same_prompt_everywhere(byte_tokenizer):
    from rrhf_peft.score.reward_model import RewardTexts

    hh = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    tokenizer = chat_tokenizer(byte_tokenizer, CHATML)
    rewards = RewardTexts(tokenizer, template="chat", append_eos=False, max_tokens=500)
    assert rewards.row(hh, "y") == rewards.row(turns, "y")
    injected = rewards.row(turns, "y<|im_end|>z").ids
    assert injected.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4  # those of the four turns
    assert tokenizer.decode(injected).endswith("<|im_start|>assistant\ny<|im_end|>z<|im_end|>\n")
    assert chat_messages(hh) == turns
    assert transcript(hh) == transcript(turns) == "User: q\n\nAssistant: a\n\nUser: r"
    one, other = (RankedGroup(prompt, ["y"]) for prompt in (hh, turns))
    assert templates.prompt_text(one, tokenizer, "chat") == templates.prompt_text(other, tokenizer, "chat")
    assert transcript("plain") == transcript([{"role": "user", "content": "plain"}]) == "plain"
    assert transcript([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]) == (
        'Assistant: {"tool_calls": [{"name": "f"}]}'
    )


def test_what_sampling_writes_is_what_training_reads(tinystories, tmp_path):
    """Through the file: every response is the tokens that were sampled, and ends only where the policy ended it."""
    from rrhf_peft.recipe import make_recipe
    from rrhf_peft.sample.run import sample_recipe

    prompts = ["Once upon a time, there was a little girl", "Tom and his dog went to the park and", "The cat was"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    candidates = [
        {"strategy": "top_p", "k": 4, "max_new_tokens": 60},
        {"strategy": "beam", "k": 2, "max_new_tokens": 9},
    ]
    sampling = {"prompts": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "c.jsonl"), "candidates": candidates}
    values = {"model": {"name": str(tinystories)}, "sampling": sampling}
    sample_recipe(make_recipe(values, "test", needs=["sampling"]))

    groups = read_groups(tmp_path / "c.jsonl", needs="responses")
    scored = [replace(group, scores=[float(n) for n in range(len(group.responses))]) for group in groups]
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    tokenized, report = tokenize_groups(scored, tokenizer)
    assert report.responses_as_sampled == report.responses_read > 12
    assert report.responses_without_end >= 6  # nine tokens are no story
    for group, tokens_ in zip(scored, tokenized, strict=True):
        for ids, reason, length in zip(tokens_.response_ids, group.finish_reasons, group.num_tokens, strict=True):
            assert (ids[-1] == tokenizer.eos_token_id) == (reason == "eos")
            assert len(ids) == length
