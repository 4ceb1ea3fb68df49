"""Formats: a function for each, from rows to ranked groups, and how `auto` tells them apart.

To add a format: one function here, one line in `IMPORTERS`, one test, and its name in the recipe schema. Importers
keep every response, order, score and tie as the file has it; ranks become scores, higher is better; what has no
rating is kept apart and never becomes a number.

First the formats whose rows hold a prompt with a list of responses, then those that compare two responses, then those
that spread a group over several rows; each function is named after its format, and its docstring says where the layout
comes from. The table and the recognition of formats stand at the end.
"""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from rrhf_peft.data.rows import Row
from rrhf_peft.records import PER_RESPONSE, Message, RankedGroup, UserError


def score_of_rank(rank: float | None) -> float | None:
    """A rank, lower is better, as a score, higher is better; equal ranks stay a tie."""
    return None if rank is None else 0.0 - rank


def numbered_sources(count: int) -> list[str]:
    """Names for responses whose writers the file does not tell: their positions in its list."""
    return [f"response-{index}" for index in range(count)]


# ---- A prompt with a list of responses ----


def ranked(row: Row) -> RankedGroup:
    """Our own: prompt, responses[], scores[], and where known sources[] and the other columns of `RankedGroup`."""
    return _scored(row, "prompt", "responses")


def rrhf(row: Row) -> RankedGroup:
    """query, responses[], scores[] or prompt, response[], scores[]."""
    return _scored(row, "query", "responses") if row.has("query") else _scored(row, "prompt", "response")


def unranked(row: Row) -> RankedGroup:
    """Our own before it is ranked: a prompt alone, or with responses (perhaps none), scored or not."""
    responses = row.texts("responses", may_be_empty=True) if row.has("responses") else []
    scores = row.scores("scores", len(responses), may_lack=True) if responses and row.has("scores") else []
    return _own_form(row, "prompt", "responses", responses, scores)


def ultrafeedback(row: Row) -> RankedGroup:
    """openbmb/UltraFeedback: instruction, completions[] of response, model and annotations.<aspect>.Rating.

    The score is the mean of the aspects' ratings (the data set's own fine-grained score), because
    ``overall_score`` has had known errors. Ratings are text and may say "N/A". An aspect that is rated for no
    completion of the row is left out of the mean; a completion that misses an aspect which others have is
    unrated, since its mean would compare different things.
    """
    completions = row.objects("completions")
    ratings = [_aspect_ratings(completion) for completion in completions]
    aspects = {aspect for own in ratings for aspect, rating in own.items() if rating is not None}
    return row.group(
        row.text("instruction"),
        [completion.text("response") for completion in completions],
        [_mean_of(own, aspects) for own in ratings],
        [completion.text("model") for completion in completions],
        row.rest(("instruction", "completions", "models")),
    )


def nectar(row: Row) -> RankedGroup:
    """berkeley-nest/Nectar: prompt (an HH transcript), answers[] of answer, model and rank, 1 the best."""
    answers = row.objects("answers")
    return row.group(
        row.text("prompt"),
        [answer.text("answer") for answer in answers],
        [score_of_rank(answer.rating("rank")) for answer in answers],
        [answer.text("model") for answer in answers],
        row.rest(("prompt", "answers")),
    )


def lmflow(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """LMFlow's ``text_to_scored_textlist``: instances[] of input and output[] of text and score.

    The instances alone, one per row, are read as well.
    """
    for row in rows:
        if row.has("type") and row.values["type"] != "text_to_scored_textlist":
            raise row.problem(
                f"type is {row.values['type']!r}. Of LMFlow's types only text_to_scored_textlist has scores for lists "
                "of responses; convert the file, or use format preference for pairs."
            )
        whole = row.has("instances")
        for index, instance in enumerate(row.objects("instances") if whole else [row]):
            answers = instance.objects("output")
            rest: dict[str, Any] = row.rest(("type", "instances", "input", "output"))
            yield row.group(
                instance.text("input"),
                [answer.text("text") for answer in answers],
                [answer.rating("score") for answer in answers],
                numbered_sources(len(answers)),
                {**rest, "instance": index} if whole else rest,
            )


def pro(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """PRO (DAMO-ConvAI): prefix[][], suffix[], reward[]; a prefix for each suffix, usually all the same.

    A prefix is a list of turns marked <|prompter|> and <|assistant|>, which become an HH transcript as in PRO's
    trainer, or one text. Different prefixes make different groups. Files that PRO wrote without a reward model have
    reward 1 everywhere, and therefore nothing but ties: their order is not trusted.
    """
    for row in rows:
        responses = row.texts("suffix")
        rewards, prefixes = row.scores("reward", len(responses)), row.items("prefix")
        if len(prefixes) != len(responses):
            raise row.problem(
                f"prefix has {len(prefixes)} entries for {len(responses)} of suffix. Give every suffix its prefix."
            )
        groups: dict[str, list[int]] = {}
        for index, prefix in enumerate(prefixes):
            groups.setdefault(_transcript(row, prefix, f"prefix[{index}]"), []).append(index)
        for prompt, indices in groups.items():
            space = " " if prompt.endswith("Assistant:") else ""
            yield row.group(
                prompt,
                [space + responses[index] for index in indices],
                [rewards[index] for index in indices],
                [f"response-{index}" for index in indices],
                row.rest(("prefix", "suffix", "reward")),
            )


def _scored(row: Row, prompt: str, responses: str) -> RankedGroup:
    texts = row.texts(responses)
    return _own_form(row, prompt, responses, texts, row.scores("scores", len(texts)))


def _own_form(row: Row, prompt: str, responses: str, texts: list[str], scores: Sequence[float | None]) -> RankedGroup:
    sources: Sequence[str] = ()
    if texts and row.has("sources"):
        sources = row.texts("sources")
        if len(sources) != len(texts):
            raise row.problem(
                f"sources has {len(sources)} entries for {len(texts)} responses. Name every response's source, or "
                "leave the column out."
            )
    used = (prompt, responses, "scores", "sources", *PER_RESPONSE)
    about: dict[str, Any] = {
        name: row.items(name) if row.has(name) else _of_candidates(row, name, len(texts)) for name in PER_RESPONSE
    }
    if not texts:
        about = {}
    return RankedGroup(row.prompt(prompt), texts, scores, sources, row.rest(used), row.origin, **about)


def _of_candidates(row: Row, name: str, count: int) -> list[Any]:
    """What files of earlier versions say of each response, under `meta.candidates`; empty where they do not."""
    meta = row.values.get("meta")
    candidates = meta.get("candidates") if isinstance(meta, dict) else None
    key = {"finish_reasons": "finish_reason", "num_tokens": "num_tokens"}.get(name)
    if key is None or not isinstance(candidates, list) or len(candidates) != count:
        return []
    return [about.get(key) if isinstance(about, dict) else None for about in candidates]


def _aspect_ratings(completion: Row) -> dict[str, float | None]:
    annotations = completion.object("annotations")
    return {
        aspect: annotations.object(aspect).rating("Rating") if annotations.has(aspect) else None
        for aspect in annotations.values
    }


def _mean_of(ratings: dict[str, float | None], aspects: set[str]) -> float | None:
    values = [ratings.get(aspect) for aspect in sorted(aspects)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _transcript(row: Row, prefix: Any, field: str) -> str:
    turns = prefix if isinstance(prefix, list) else [prefix]
    text = "".join(row.as_text(turn, field) for turn in turns)
    if "<|prompter|>" not in text and "<|assistant|>" not in text:
        return text
    return text.replace("<|prompter|>", "\n\nHuman: ").replace("<|assistant|>", "\n\nAssistant: ").rstrip()


# ---- Two responses ----


_ASSISTANT = "\n\nAssistant:"


def preference(row: Row) -> RankedGroup:
    """TRL's prompt, chosen, rejected: text or chat messages; without a prompt, what the two have in common.

    The scores are ``score_chosen`` and ``score_rejected`` where the row has both, else 1 and 0.
    """
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
    "TL;DR:". Sources are the policies that wrote the summaries; the annotator stays in ``columns["worker"]``.
    """
    info, summaries = row.object("info"), row.objects("summaries")
    if info.has("post"):
        lines = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
        prompt = "\n\n".join(label + info.text(name) for label, name in lines if info.has(name))
    else:
        prompt = info.text("article")
    texts = [summary.text("text") for summary in summaries]
    choice = row.position("choice", len(texts))
    scores = [1.0 if index == choice else 0.0 for index in range(len(texts))]
    sources = [summary.text("policy") for summary in summaries]
    return row.group(f"{prompt}\n\nTL;DR:", texts, scores, sources, row.rest(("summaries", "choice")))


def pku_saferlhf(row: Row, *, by: str = "better_response_id") -> RankedGroup:
    """PKU-Alignment/PKU-SafeRLHF: prompt, response_0, response_1, better_response_id, safer_response_id.

    Helpfulness decides by default; format ``pku_saferlhf:safer`` takes safety. The other judgement, and which
    responses are safe, stay in `columns`.
    """
    texts = [row.text("response_0"), row.text("response_1")]
    chosen = row.position(by, 2)
    names = [f"response_{index}_source" for index in range(2)]
    sources = [row.text(name) if row.has(name) else f"response-{index}" for index, name in enumerate(names)]
    scores = [1.0 if index == chosen else 0.0 for index in range(2)]
    return row.group(
        row.text("prompt"), texts, scores, sources, row.rest(("prompt", "response_0", "response_1", by, *names))
    )


def alpaca_farm(row: Row) -> RankedGroup:
    """tatsu-lab/alpaca_farm: instruction, input, output_1, output_2, preference; AlpacaEval's annotations too.

    Preference 1 and 2 name the better output, values between them (AlpacaEval's weighted ones) how far it leans,
    1.5 and 0 are a draw, null is no rating. Sources are generator_1 and generator_2 where known; the annotator
    stays in `columns`.
    """
    texts = [row.text("output_1"), row.text("output_2")]
    names = ("generator_1", "generator_2")
    sources = [row.text(name) if row.has(name) else f"output_{index}" for index, name in enumerate(names, start=1)]
    preference = row.rating("preference")
    if preference == 0:
        preference = 1.5
    if preference is not None and not 1 <= preference <= 2:
        raise row.problem(
            f"preference is {preference:g}. It is 1 or 2 for the better output, between them for a leaning, or 0 for "
            "a draw; fix or remove that row."
        )
    scores = [None, None] if preference is None else [2 - preference, preference - 1]
    used = ("instruction", "input", "output_1", "output_2", "preference", *names)
    return row.group(_with_input(row, "\n\n"), texts, scores, sources, row.rest(used))


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
            raise row.problem("conversations must end with a message from human. Fix or remove that row.")
        messages += turns
    else:
        for index, turn in enumerate(row.items("history") if row.values.get("history") else []):
            if not isinstance(turn, list) or len(turn) != 2:
                raise row.problem(f"history[{index}] is not a pair of question and answer. Fix or remove that row.")
            roles = zip(("user", "assistant"), turn, strict=True)
            messages += [{"role": role, "content": row.as_text(text, f"history[{index}]")} for role, text in roles]
        messages.append({"role": "user", "content": _with_input(row, "\n")})
    bare = len(messages) == 1 and not row.has("conversations")
    answers = []
    for name in ("chosen", "rejected"):
        is_message = isinstance(row.values.get(name), dict)
        answers.append(_sharegpt_message(row.object(name))["content"] if is_message else row.text(name))
    used = ("instruction", "input", "system", "history", "conversations", "chosen", "rejected")
    prompt: str | list[Message] = messages[0]["content"] if bare else messages
    return row.group(prompt, answers, [1.0, 0.0], ["chosen", "rejected"], row.rest(used))


def _pair(row: Row, prompt: str | list[Message], chosen: str, rejected: str) -> RankedGroup:
    names = ("score_chosen", "score_rejected")
    scores = [row.rating(name) for name in names]
    if any(score is None for score in scores):
        scores = [1.0, 0.0]
    elif scores[0] < scores[1]:  # type: ignore[operator]
        raise row.problem(
            f"score_chosen is {scores[0]:g} and score_rejected {scores[1]:g}, but higher is better. Fix or remove that "
            "row, or rename the columns if they are something else."
        )
    rest = row.rest(("prompt", "chosen", "rejected", *names))
    return row.group(prompt, [chosen, rejected], scores, ["chosen", "rejected"], rest)


def _alone(row: Row, prompt: str | list[Message], chosen: str) -> RankedGroup:
    """Only the chosen response, where the rejected one answers another prompt and so is no comparison.

    Ranking objectives drop such a group, counted as a single response; fine-tuning keeps it.
    """
    return row.group(prompt, [chosen], [1.0], ["chosen"], row.rest(("prompt", "chosen", "rejected")))


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
    common = next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
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


# ---- A group over several rows ----


_HELPSTEER_ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_OASST_ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}


def helpsteer2(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """nvidia/HelpSteer2 (and HelpSteer): a response per row, rated 0 to 4 in five aspects; gathered by prompt.

    The score is helpfulness. All five ratings stay in ``columns["ratings"]``, one entry for each row.
    """
    for own in _gathered(rows, lambda row: row.text("prompt")):
        ratings = [{aspect: row.rating(aspect) for aspect in _HELPSTEER_ASPECTS} for row in own]
        yield own[0].group(
            own[0].text("prompt"),
            [row.text("response") for row in own],
            [rating["helpfulness"] for rating in ratings],
            numbered_sources(len(own)),
            {**own[0].rest(own[0].values), "ratings": ratings},
        )


def shp(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """stanfordnlp/SHP: two comments per row, with their votes; gathered by post_id, each comment once.

    The score is score_A or score_B, the comment's votes. `labels` (1: A is preferred) must agree with it. SHP
    itself only pairs a comment with later ones that have fewer votes; votes also order the other pairs.
    """
    for own in _gathered(rows, lambda row: row.text("post_id")):
        comments: dict[tuple[str, str, float], None] = {}
        for row in own:
            votes = {side: row.number(f"score_{side}") for side in "AB"}
            if votes["A"] != votes["B"] and (votes["A"] > votes["B"]) != (row.number("labels") == 1):
                raise row.problem(
                    "labels contradicts score_A and score_B (it is 1 where A is preferred). Fix or remove that row."
                )
            for side in "AB":
                text = row.text(f"human_ref_{side}")
                name = f"c_root_id_{side}"
                comments[row.text(name) if row.has(name) else text, text, votes[side]] = None
        rest = own[0].rest(name for name in own[0].values if name not in ("post_id", "domain"))
        yield own[0].group(
            own[0].text("history"),
            [text for _, text, _ in comments],
            [votes for _, _, votes in comments],
            ["human"] * len(comments),
            {**rest, "comments": [name for name, _, _ in comments]},
        )


def stack_exchange_paired(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """lvwerra/stack-exchange-paired: response_j is better than response_k; gathered by qid, or else question.

    The pairs of a question become one group where scores can say exactly what they say: pairs that are
    compared neither directly nor through others are ties. Where they cannot, each response that is better than
    others makes a group with those, which among themselves are ties; so no order is made up and none is lost.
    """
    for own in _gathered(rows, lambda row: str(row.values["qid"]) if row.has("qid") else row.text("question")):
        worse: dict[str, dict[str, None]] = {}
        for row in own:
            better, other = row.text("response_j"), row.text("response_k")
            worse.setdefault(better, {})
            worse.setdefault(other, {})
            if better != other:
                worse[better][other] = None
        rest = own[0].rest(("question", "response_j", "response_k"))
        prompt, levels = own[0].text("question"), _levels(worse)
        orders = [levels] if levels else [{one: 1, **dict.fromkeys(worse[one], 0)} for one in worse if worse[one]]
        for order in orders:
            scores = [float(level) for level in order.values()]
            yield own[0].group(prompt, list(order), scores, ["human"] * len(order), rest)


def oasst_trees(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """OpenAssistant's message trees: prompt.replies[].replies[] ..., with rank 0 the best of its siblings.

    Each message that has ranked replies of the assistant is a group; its prompt is the path to it. Sources are
    "human", or the model's name for synthetic messages. Deleted replies are left out, those without a rank are
    unrated, and messages none of whose replies has a rank, such as those with a single one, make no group.
    """
    for row in rows:
        rest = row.rest(("prompt",))
        pending: list[tuple[list[Message], Row]] = [([], row.object("prompt"))]
        while pending:
            path, node = pending.pop()
            path = [*path, _oasst_message(node)]
            replies = node.objects("replies") if node.has("replies") else []
            yield from _oasst_group(path, replies, {**rest, "message_id": node.values.get("message_id")})
            pending += [(path, reply) for reply in reversed(replies)]


def oasst_messages(rows: Iterable[Row]) -> Iterator[RankedGroup]:
    """OpenAssistant/oasst1 and oasst2 as flat messages, which name their parent_id; otherwise like the trees."""
    messages = {row.text("message_id"): row for row in rows}
    replies: dict[str, list[Row]] = {}
    for row in messages.values():
        if row.has("parent_id"):
            parent = row.text("parent_id")
            if parent not in messages:
                raise row.problem(f"parent_id {parent!r} is no message of this file. Read the trees' file instead.")
            replies.setdefault(parent, []).append(row)
    for parent, own in replies.items():
        path: list[Message] = []
        node: Row | None = messages[parent]
        for _ in messages:
            if node is None:
                break
            path.insert(0, _oasst_message(node))
            node = messages[node.text("parent_id")] if node.has("parent_id") else None
        rest = messages[parent].rest(name for name in messages[parent].values if name != "message_tree_id")
        yield from _oasst_group(path, own, {**rest, "message_id": parent})


def _gathered(rows: Iterable[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    """The rows of each key, keys in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _levels(worse: dict[str, dict[str, None]]) -> dict[str, int] | None:
    """Scores that order exactly the pairs which `worse` orders, directly or through others; None if none can.

    Of every response `worse` holds those it is better than. In an order that scores can express, a response
    is better than exactly those on lower levels, so what is better than more is higher.
    """
    below = {one: _reachable(worse, one) for one in worse}
    sizes = sorted({len(own) for own in below.values()})
    levels = {one: sizes.index(len(own)) for one, own in below.items()}
    exact = all(below[one] == {other for other in worse if levels[other] < levels[one]} for one in worse)
    return levels if exact else None


def _reachable(worse: dict[str, dict[str, None]], start: str) -> set[str]:
    found: set[str] = set()
    pending = [start]
    while pending:
        new = worse[pending.pop()].keys() - found
        found |= new
        pending += new
    return found


def _oasst_message(node: Row) -> Message:
    role = node.text("role")
    if role not in _OASST_ROLES:
        raise node.problem(f"{node.prefix}role is {role!r}, not prompter or assistant. Fix or remove that message.")
    return {"role": _OASST_ROLES[role], "content": node.text("text")}


def _oasst_group(path: list[Message], replies: list[Row], rest: dict[str, Any]) -> Iterator[RankedGroup]:
    answers = [reply for reply in replies if reply.text("role") == "assistant" and not reply.values.get("deleted")]
    scores = [score_of_rank(reply.rating("rank")) for reply in answers]
    if any(score is not None for score in scores):
        sources = [
            reply.text("model_name") if reply.values.get("synthetic") and reply.has("model_name") else "human"
            for reply in answers
        ]
        yield replies[0].group(path, [reply.text("text") for reply in answers], scores, sources, rest)


# ---- Which function reads which format ----


class Importer(NamedTuple):
    """A format: how the rows of a file are read, and how its columns look.

    Attributes:
        read: The rows of one file into groups.
        columns: The sets of columns that it can read; further columns go to the group's `columns`.
        recognises: What `auto` asks beyond the columns.
    """

    read: Callable[[Iterable[Row]], Iterable[RankedGroup]]
    columns: tuple[tuple[str, ...], ...]
    recognises: Callable[[Row], bool] = lambda row: True


def _each(read: Callable[[Row], RankedGroup]) -> Callable[[Iterable[Row]], Iterable[RankedGroup]]:
    """The reader of a format in which every row is a group."""
    return partial(map, read)


def _is_scored_list(row: Row) -> bool:
    output = row.values.get("output")
    return row.has("instances") or (isinstance(output, list) and all(isinstance(answer, dict) for answer in output))


def _oasst(rows: Iterable[Row]) -> Iterable[RankedGroup]:
    """Trees or flat messages, whichever the file's first row shows."""
    rows = iter(rows)
    first = next(rows)
    read = oasst_messages if first.has("message_id") else oasst_trees
    return read(row for own in ([first], rows) for row in own)


_PKU = ("prompt", "response_0", "response_1")

#: Format name -> importer, in the order in which `auto` tries them. A name with a colon is a variant that
#: takes another judgement from the same columns; `auto` takes the one before it.
IMPORTERS: dict[str, Importer] = {
    "ranked": Importer(_each(ranked), (("prompt", "responses", "scores"),)),
    "rrhf": Importer(_each(rrhf), (("query", "responses", "scores"), ("prompt", "response", "scores"))),
    "rm_static": Importer(_each(rm_static), (("prompt", "response", "chosen", "rejected"),)),
    "llama_factory": Importer(
        _each(llama_factory),
        (("instruction", "chosen", "rejected"), ("conversations", "chosen", "rejected")),
        lambda row: not row.has("prompt") and not isinstance(row.values["chosen"], list),
    ),
    "hh": Importer(_each(hh), (("chosen", "rejected"),), are_transcripts),
    "preference": Importer(_each(preference), (("prompt", "chosen", "rejected"), ("chosen", "rejected"))),
    "ultrafeedback": Importer(_each(ultrafeedback), (("instruction", "completions"),)),
    "nectar": Importer(_each(nectar), (("prompt", "answers"),)),
    "helpsteer2": Importer(
        helpsteer2,
        (("prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"),),
    ),
    "summarize_comparisons": Importer(_each(summarize_comparisons), (("info", "summaries", "choice"),)),
    "stack_exchange_paired": Importer(stack_exchange_paired, (("question", "response_j", "response_k"),)),
    "shp": Importer(
        shp,
        (("post_id", "history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),),
    ),
    "pku_saferlhf": Importer(_each(pku_saferlhf), ((*_PKU, "better_response_id"),)),
    "pku_saferlhf:safer": Importer(
        _each(partial(pku_saferlhf, by="safer_response_id")), ((*_PKU, "safer_response_id"),)
    ),
    "pro": Importer(pro, (("prefix", "suffix", "reward"),)),
    "oasst": Importer(_oasst, (("message_tree_id", "prompt"), ("message_id", "parent_id", "text", "role", "rank"))),
    "alpaca_farm": Importer(_each(alpaca_farm), (("instruction", "output_1", "output_2", "preference"),)),
    "lmflow": Importer(lmflow, (("instances",), ("input", "output")), _is_scored_list),
}


def importer_for(row: Row, format: str) -> Importer:
    """The importer of `format`; for ``auto`` the first one whose columns and look this row has.

    Raises:
        UserError: unknown format, or the columns do not fit; names the columns found and the nearest format.
    """
    if format == "auto":
        for importer in IMPORTERS.values():
            if _fits(row, importer) and importer.recognises(row):
                return importer
        nearest = max(IMPORTERS, key=lambda name: _likeness(row, name))
        raise row.problem(
            f"no format fits the columns {_listed(row.values)}. The nearest, {_what_is_missing(row, nearest)}"
        )
    check_format(format)
    if not _fits(row, IMPORTERS[format]):
        others = [name for name, other in IMPORTERS.items() if _fits(row, other) and other.recognises(row)]
        hint = f" They fit format {others[0]}." if others else ""
        raise row.problem(f"the columns are {_listed(row.values)}; {_what_is_missing(row, format)}{hint}")
    return IMPORTERS[format]


def check_format(format: str) -> None:
    """Raise `UserError` unless `format` is ``auto`` or the name of an importer."""
    known = ["auto", *IMPORTERS]
    if format not in known:
        nearest = difflib.get_close_matches(format, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known formats: {', '.join(known)}."
        raise UserError(f"format {format!r}: there is no such importer; {hint}")


def _fits(row: Row, importer: Importer) -> bool:
    return any(all(name in row.values for name in columns) for columns in importer.columns)


def _likeness(row: Row, format: str) -> float:
    return max(_column_likeness(row, columns) for columns in IMPORTERS[format].columns)


def _column_likeness(row: Row, columns: tuple[str, ...]) -> float:
    """How far the row's columns resemble these, from 0 to 1."""
    best = [
        max((difflib.SequenceMatcher(None, name, found).ratio() for found in row.values), default=0.0)
        for name in columns
    ]
    return sum(best) / len(best)


def _what_is_missing(row: Row, format: str) -> str:
    """What the format needs and this row has not, with the nearest column for each."""
    columns = max(IMPORTERS[format].columns, key=lambda columns: _column_likeness(row, columns))
    missing = []
    for name in columns:
        if name not in row.values:
            unused = [found for found in row.values if found not in columns]
            nearest = difflib.get_close_matches(name, unused, n=1, cutoff=0.6)
            missing.append(name + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    return f"format {format}, needs {_listed(columns)} and misses {', '.join(missing)}. Rename the columns."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "(none)"
