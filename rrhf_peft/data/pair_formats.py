"""Formats whose rows compare two responses to a prompt: each row is a group of two.

Each function is named after its format; its docstring says where the layout comes from.
"""

from __future__ import annotations

import re

from rrhf_peft.data.rated_groups import rated_group
from rrhf_peft.data.rows import Row
from rrhf_peft.records import Message, RankedGroup

_ASSISTANT = "\n\nAssistant:"


def preference(row: Row) -> RankedGroup:
    """TRL's prompt, chosen, rejected: text or chat messages; without a prompt, what the two have in common."""
    if isinstance(row.values.get("chosen"), list) or isinstance(row.values.get("rejected"), list):
        return _conversations(row)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if row.has("prompt"):
        return _pair(row, row.prompt("prompt"), chosen, rejected)
    start = _common_words(chosen, rejected)
    return _pair(row, chosen[:start], chosen[start:], rejected[start:])


def hh(row: Row) -> RankedGroup:
    """Anthropic HH: two full transcripts, split at the last "Assistant:", so that prompt + response is exact."""
    prompts, responses = zip(*(_split_transcript(row, name) for name in ("chosen", "rejected")), strict=True)
    return _pair(row, prompts[0], *responses) if prompts[0] == prompts[1] else _alone(row, prompts[0], responses[0])


def rm_static(row: Row) -> RankedGroup:
    """prompt, response, chosen, rejected; `response` repeats the chosen one for fine-tuning and has no score."""
    return _pair(row, row.prompt("prompt"), row.text("chosen"), row.text("rejected"))


def are_transcripts(row: Row) -> bool:
    """Whether chosen and rejected are dialogues in Anthropic's form, without a prompt column."""
    texts = [row.values[name] for name in ("chosen", "rejected")]
    return not row.has("prompt") and all(isinstance(text, str) and _ASSISTANT in text for text in texts)


def summarize_comparisons(row: Row) -> RankedGroup:
    """openai/summarize_from_feedback, comparisons: info.post or info.article, two summaries[], choice 0 or 1.

    The prompt is the one of the paper (arXiv 2009.01325): subreddit, title and post, or the article, then
    "TL;DR:". Sources are the policies that wrote the summaries; the annotator stays in ``meta["worker"]``.
    """
    info, summaries = row.object("info"), row.objects("summaries")
    if info.has("post"):
        lines = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
        prompt = "\n\n".join(label + info.text(name) for label, name in lines if info.has(name))
    else:
        prompt = info.text("article")
    texts = [summary.text("text") for summary in summaries]
    choice = row.place("choice", len(texts))
    scores = [1.0 if place == choice else 0.0 for place in range(len(texts))]
    sources = [summary.text("policy") for summary in summaries]
    return RankedGroup(f"{prompt}\n\nTL;DR:", texts, scores, sources, row.meta(("summaries", "choice")))


def pku_saferlhf(row: Row, *, by: str = "better_response_id") -> RankedGroup:
    """PKU-Alignment/PKU-SafeRLHF: prompt, response_0, response_1, better_response_id, safer_response_id.

    Helpfulness decides by default; format ``pku_saferlhf:safer`` takes safety. The other judgement, and which
    responses are safe, stay in `meta`.
    """
    texts = [row.text("response_0"), row.text("response_1")]
    chosen = row.place(by, 2)
    names = [f"response_{place}_source" for place in range(2)]
    sources = [row.text(name) if row.has(name) else f"response-{place}" for place, name in enumerate(names)]
    scores = [1.0 if place == chosen else 0.0 for place in range(2)]
    return RankedGroup(
        row.text("prompt"), texts, scores, sources, row.meta(("prompt", "response_0", "response_1", by, *names))
    )


def alpaca_farm(row: Row) -> RankedGroup:
    """tatsu-lab/alpaca_farm: instruction, input, output_1, output_2, preference; AlpacaEval's annotations too.

    Preference 1 and 2 name the better output, values between them (AlpacaEval's weighted ones) how far it leans,
    1.5 and 0 are a draw, null is no rating. Sources are generator_1 and generator_2 where known; the annotator
    stays in `meta`.
    """
    texts = [row.text("output_1"), row.text("output_2")]
    names = ("generator_1", "generator_2")
    sources = [row.text(name) if row.has(name) else f"output_{place}" for place, name in enumerate(names, start=1)]
    preference = row.rating("preference")
    if preference == 0:
        preference = 1.5
    if preference is not None and not 1 <= preference <= 2:
        raise row.problem(
            f"preference is {preference:g}. It is 1 or 2 for the better output, between them for a leaning, or 0 for "
            "a draw; mend or remove that row."
        )
    scores = [None, None] if preference is None else [2 - preference, preference - 1]
    used = ("instruction", "input", "output_1", "output_2", "preference", *names)
    return rated_group(_with_input(row, "\n\n"), texts, scores, sources, row.meta(used))


def llama_factory(row: Row) -> RankedGroup:
    """LLaMA-Factory's preference data: instruction, input, chosen, rejected, or conversations, chosen, rejected.

    As there, instruction and input are joined by a line break, `system` and `history` come before them, and a
    chosen or rejected message is the assistant's ``{"from": "gpt", "value": ...}`` or its bare text.
    """
    messages: list[Message] = []
    if row.has("system"):
        messages.append({"role": "system", "content": row.text("system")})
    if row.has("conversations"):
        turns = [_sharegpt_message(turn) for turn in row.objects("conversations")]
        if not turns or turns[-1]["role"] != "user":
            raise row.problem("conversations must end with a message from human. Mend or remove that row.")
        messages += turns
    else:
        for place, turn in enumerate(row.items("history") if row.values.get("history") else []):
            if not isinstance(turn, list) or len(turn) != 2:
                raise row.problem(f"history[{place}] is not a pair of question and answer. Mend or remove that row.")
            roles = zip(("user", "assistant"), turn, strict=True)
            messages += [{"role": role, "content": row.as_text(text, f"history[{place}]")} for role, text in roles]
        messages.append({"role": "user", "content": _with_input(row, "\n")})
    bare = len(messages) == 1 and not row.has("conversations")
    answers = []
    for name in ("chosen", "rejected"):
        is_message = isinstance(row.values.get(name), dict)
        answers.append(_sharegpt_message(row.object(name))["content"] if is_message else row.text(name))
    used = ("instruction", "input", "system", "history", "conversations", "chosen", "rejected")
    prompt: str | list[Message] = messages[0]["content"] if bare else messages
    return RankedGroup(prompt, answers, [1.0, 0.0], ["chosen", "rejected"], row.meta(used))


def _pair(row: Row, prompt: str | list[Message], chosen: str, rejected: str) -> RankedGroup:
    meta = row.meta(("prompt", "chosen", "rejected"))
    return RankedGroup(prompt, [chosen, rejected], [1.0, 0.0], ["chosen", "rejected"], meta)


def _alone(row: Row, prompt: str | list[Message], chosen: str) -> RankedGroup:
    """Only the chosen response, where the rejected one answers another prompt and so is no comparison.

    Ranking objectives drop such a group, counted as a single response; fine-tuning keeps it.
    """
    return RankedGroup(prompt, [chosen], [1.0], ["chosen"], row.meta(("prompt", "chosen", "rejected")))


def _conversations(row: Row) -> RankedGroup:
    """A preference whose answers are message lists: alone, or with the conversation in front of them."""
    histories, answers = [], []
    for name in ("chosen", "rejected"):
        *history, last = row.messages(name)
        if last["role"] != "assistant":
            raise row.problem(f"{name} ends with a message of role {last['role']!r}. The last must be the assistant's.")
        histories.append(history)
        answers.append(last["content"])
    history = histories[0]
    prompt: str | list[Message] = history
    if row.has("prompt"):
        given = row.prompt("prompt")
        if isinstance(given, list):
            # Some data sets repeat the prompt in front of the answers, some do not.
            prompt = history if history[: len(given)] == given else [*given, *history]
        elif not history:
            prompt = given
    elif not history:
        raise row.problem("no prompt: chosen is a single message. Add a prompt column, or the messages before it.")
    return _pair(row, prompt, *answers) if histories[0] == histories[1] else _alone(row, prompt, answers[0])


def _split_transcript(row: Row, name: str) -> tuple[str, str]:
    text = row.text(name)
    prompt, marker, response = text.rpartition(_ASSISTANT)
    if not marker:
        raise row.problem(
            f'{name} has no "\\n\\nAssistant:" turn. Set data.format: preference if it is not a transcript.'
        )
    return prompt + marker, response


def _common_words(one: str, other: str) -> int:
    """Length of the common beginning without its last, perhaps split, word and the white space before that."""
    common = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    last_word = re.search(r"\s+\S*\Z", one[: min(len(one), len(other)) if common is None else common])
    return last_word.start() if last_word else 0


def _with_input(row: Row, join: str) -> str:
    """The instruction, followed by its input where it has one."""
    instruction = row.text("instruction")
    return instruction + join + row.text("input") if row.values.get("input") else instruction


def _sharegpt_message(turn: Row) -> Message:
    """A ``{"from": ..., "value": ...}`` message, the key names of ShareGPT, in ours."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    role = turn.text("from")
    if role not in roles:
        raise turn.problem(
            f"{turn.prefix}from is {role!r}. Only human, gpt and system messages can be read; remove that conversation."
        )
    return {"role": roles[role], "content": turn.text("value")}
