"""Prompts and responses become exactly the text that each template promises."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_peft.data import TEMPLATES, tokenize_groups
from rrhf_peft.data.templates import hh_prompt, hh_response
from rrhf_peft.records import RankedGroup, UserError

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{% if not loop.last or m.role != 'assistant' %}[/]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def m(role, content):
    return {"role": role, "content": content}


DIALOGUE = [m("system", "Be brief."), m("user", "q"), m("assistant", "a"), m("user", "r")]


@pytest.fixture
def chat_tokenizer(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def text(template, prompt, tokenizer=None):
    return TEMPLATES[template].prompt(prompt, tokenizer)


def test_raw():
    assert text("raw", " as it is ") == " as it is "
    assert text("raw", [m("user", "q")]) == "q"
    assert text("raw", DIALOGUE) == "Be brief.\n\nq\n\na\n\nr"
    assert TEMPLATES["raw"].response("  as it is ") == "  as it is "


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("q", "\n\nHuman: q\n\nAssistant:"),
        ("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant:"),
        ("\n\nHuman: q \n\nAssistant:", "\n\nHuman: q \n\nAssistant:"),
        ("\n\nHuman: q\n\nAssistant: ", "\n\nHuman: q\n\nAssistant:"),
        ("Human: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant:"),
        ("\n\nHuman: q", "\n\nHuman: q\n\nAssistant:"),
        ("\n\nHuman: q\n\nAssistant: Sure,", "\n\nHuman: q\n\nAssistant: Sure,"),
        ("Be brief.\n\nHuman: q", "\n\nBe brief.\n\nHuman: q\n\nAssistant:"),
        ("Which Human: label?", "\n\nHuman: Which Human: label?\n\nAssistant:"),
        (DIALOGUE, "\n\nBe brief.\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"),
        ([m("user", "q"), m("assistant", "Sure,")], "\n\nHuman: q\n\nAssistant: Sure,"),
    ],
)
def test_hh_ends_with_an_open_assistant_turn(prompt, expected):
    assert text("hh", prompt) == expected
    assert text("hh", expected) == expected  # and stays as it is


def test_hh_responses_stand_after_one_space():
    assert hh_response("Hello") == hh_response(" Hello") == " Hello"
    assert hh_response("\n1. one") == "\n1. one"


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters=":")), min_size=1, max_size=5), st.text(min_size=1))
def test_hh_leaves_a_transcript_exactly_as_it_is(turns, response):
    labels = ["\n\nHuman: ", "\n\nAssistant: "]
    transcript = "".join(labels[n % 2] + turn for n, turn in enumerate(turns)) + "\n\nAssistant:"
    assert hh_prompt(transcript, None) + hh_response(" " + response) == transcript + " " + response


def test_alpaca_is_the_stanford_prompt():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {hi}.\n\n### Response:"
    )
    assert text("alpaca", "Say {hi}.") == text("alpaca", [m("user", "Say {hi}.")]) == expected
    assert TEMPLATES["alpaca"].response(" Hi. ") == "Hi. "


def test_chat_uses_the_tokenizers_template(chat_tokenizer):
    assert text("chat", "q", chat_tokenizer) == "<s>[user]q[/][assistant]"
    assert text("chat", DIALOGUE, chat_tokenizer) == (
        "<s>[system]Be brief.[/][user]q[/][assistant]a[/][user]r[/][assistant]"
    )
    assert TEMPLATES["chat"].response("\n Hi. ") == "Hi. "


def test_chat_continues_an_assistant_message_that_has_begun(chat_tokenizer):
    assert text("chat", [m("user", "q"), m("assistant", "Sure,")], chat_tokenizer) == "<s>[user]q[/][assistant]Sure,"


def test_chat_reads_a_transcript_as_turns(chat_tokenizer):
    transcript = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r: s?\n\nAssistant:"
    assert text("chat", transcript, chat_tokenizer) == "<s>[user]q[/][assistant]a[/][user]r: s?[/][assistant]"
    for prompt in ("\n\nHuman: q", "x\n\nHuman: q\n\nAssistant:", "\n\nAssistant:", "\n\nHuman: q\n\nAssistant: b"):
        assert text("chat", prompt, chat_tokenizer) == f"<s>[user]{prompt.strip()}[/][assistant]"


def test_chat_without_a_template_says_what_to_do(byte_tokenizer):
    group = RankedGroup("q", ["a", "b"], [1, 0], ["s", "s"], origin={"file": "f.jsonl", "line": 3})
    with pytest.raises(UserError, match=r"f\.jsonl:3: .* has no chat template\. Set data\.template to raw"):
        tokenize_groups([group], byte_tokenizer, template="chat")


def test_a_template_that_refuses_the_messages_names_the_group(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    group = RankedGroup(DIALOGUE, ["a", "b"], [1, 0], ["s", "s"], origin={"file": "hub/id", "row": 3})
    with pytest.raises(UserError, match=r"hub/id: row 3 \(from 0\): .* system, user, assistant, user \(roles must"):
        tokenize_groups([group], tokenizer, template="chat")


def test_an_unknown_template_is_answered_with_the_nearest(byte_tokenizer):
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        tokenize_groups([], byte_tokenizer, template="alpacca")


@pytest.mark.parametrize("writes_bos", [True, False])
def test_chat_prompts_have_the_tokens_of_inference(chat_tokenizer, writes_bos):
    if not writes_bos:
        chat_tokenizer.chat_template = CHAT.removeprefix("{{ bos_token }}")
    (own,), _ = tokenize_groups([RankedGroup("q", ["a", "b"], [1, 0], ["s", "s"])], chat_tokenizer, template="chat")
    messages = [m("user", "q")]
    expected = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(own.prompt_ids) == expected
    assert (expected[0] == chat_tokenizer.bos_token_id) == writes_bos


@pytest.mark.parametrize(("template", "first"), [(CHAT, "<s>"), (CHAT.removeprefix("{{ bos_token }}"), "n")])
def test_a_cut_chat_prompt_keeps_the_bos_that_the_template_wrote(chat_tokenizer, template, first):
    chat_tokenizer.chat_template = template
    own = RankedGroup("q", ["a", "b"], [1, 0], ["s", "s"])
    (cut,), _ = tokenize_groups([own], chat_tokenizer, template="chat", max_prompt_tokens=3)
    assert chat_tokenizer.convert_ids_to_tokens(list(cut.prompt_ids)) == [first, "t", "]"]


def test_a_chat_template_that_writes_nothing_leaves_the_bos(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ '' }}"
    own = RankedGroup("q", ["a", "b"], [1, 0], ["s", "s"])
    (tokenized,), report = tokenize_groups([own], chat_tokenizer, template="chat")
    assert list(tokenized.prompt_ids) == [chat_tokenizer.bos_token_id]
    assert report.empty_prompts == 1
