"""What has to be computed with a model or asked of a judge, besides sampling and scoring, into the folder's files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rrhf_peft.data import TEMPLATES, continuation_ids, encode_prompts, transcript
from rrhf_peft.evaluate.folder import OutputFolder, file_name
from rrhf_peft.evaluate.inputs import Plan
from rrhf_peft.jobs import Processes, ShardedOutput, fingerprint_of
from rrhf_peft.modeling import TokenBudget, attach_adapter, base_of, tokenizer_of
from rrhf_peft.progress import progress
from rrhf_peft.recipe import ModelSection
from rrhf_peft.recipe.stages import JudgeScorer
from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError
from rrhf_peft.score.judge import Judge, parse_ranks, ranking_messages
from rrhf_peft.score.policy import PolicyScores

Row = dict[str, Any]


def policy_log_probs(plan: Plan, folder: OutputFolder, name: str, processes: Processes, console: Console) -> None:
    """Log-prob and tokens of the references and of the labelled responses under one policy."""
    loaded: list[PolicyScores] = []  # the weights are the same for both

    def begin(groups: Sequence[RankedGroup]) -> Callable[[Sequence[RankedGroup]], list[Row]]:
        if not loaded:
            loaded.append(_policy(plan, name))
        loaded[0].prove(groups)

        def work(items: Sequence[RankedGroup]) -> list[Row]:
            return [{"log_probs": group} for group in loaded[0].log_probs(items)]

        return work

    for stage, groups in (("references", plan.references), ("pairs", plan.pairs)):
        if groups:
            rows_of_all(
                folder.file(stage, name),
                groups,
                lambda groups=groups: begin(groups),  # type: ignore[misc]
                settings=folder.settings[file_name(stage, name)],
                processes=processes,
                console=console,
                title=f"{stage} under {name}",
            )


def judge_perplexity(plan: Plan, folder: OutputFolder, processes: Processes, console: Console) -> None:
    """Log-prob and tokens of every policy's responses under the judge model."""
    section, judge = plan.section, plan.section.perplexity
    assert judge is not None
    loaded: list[tuple[Any, Any]] = []

    def begin() -> Callable[[Sequence[Row]], list[Row]]:
        if not loaded:
            loaded.append(_judge_model(plan))
        model, tokenizer = loaded[0]
        is_plain = plan.judge_template == "chat" and not tokenizer.chat_template  # gpt2 judges what chat models say
        form = TEMPLATES["raw" if is_plain else plan.judge_template]

        def work(rows: Sequence[Row]) -> list[Row]:
            texts = [form.response(text) for row in rows for text in row["responses"]]
            prompts = [form.prompt(row["prompt"], tokenizer) for row in rows for _ in row["responses"]]
            pairs = iter(text_log_probs(model, tokenizer, prompts, texts, batch_tokens=section.batch_tokens))
            return [{"log_probs": [next(pairs) for _ in row["responses"]]} for row in rows]

        return work

    for name in plan.policies:
        rows_of_all(
            folder.file("perplexity", name),
            folder.rows("samples", name),
            begin,
            settings=folder.settings[file_name("perplexity", name)],
            processes=processes,
            console=console,
            title=f"perplexity of {name}",
        )


def judge_wins(plan: Plan, folder: OutputFolder, processes: Processes, console: Console) -> None:
    """The judge's verdict on each policy's response i against response i of the one it is compared with."""
    wins = plan.section.wins
    assert wins is not None
    assert isinstance(wins.by, JudgeScorer)
    section = wins.by
    other = folder.rows("samples", wins.against)

    def begin() -> Callable[[Sequence[tuple[Row, Row]]], list[Row]]:
        judge = PairJudge(section)

        def work(items: Sequence[tuple[Row, Row]]) -> list[Row]:
            comparisons = [
                (transcript(row["prompt"]), list(zip(row["responses"], theirs["responses"])))  # noqa: B905 - as many as both have
                for row, theirs in items
            ]
            return judge.compare(comparisons)

        return work

    for name in plan.policies:
        if name != wins.against:
            rows_of_all(
                folder.file("wins", name),
                list(zip(folder.rows("samples", name), other, strict=True)),
                begin,
                settings=folder.settings[file_name("wins", name)],
                processes=processes,
                console=console,
                title=f"judging {name} against {wins.against}",
            )


def _policy(plan: Plan, name: str) -> PolicyScores:
    policy = plan.policies[name]
    model, tokenizer = _loaded(policy.model)
    if policy.stage.adapter is not None:
        model = attach_adapter(model, None, init_adapter=policy.stage.adapter)
    return PolicyScores(
        model.eval().requires_grad_(False),
        tokenizer,
        template=policy.template,
        max_prompt_tokens=policy.max_prompt_tokens,
        max_tokens=policy.max_tokens,
        batch_tokens=plan.section.batch_tokens,
    )


def _judge_model(plan: Plan) -> tuple[Any, Any]:
    judge = plan.section.perplexity
    assert judge is not None
    if judge.model is not None:
        model, tokenizer = _loaded(ModelSection(name=judge.model, dtype=judge.dtype))
    else:
        section = plan.recipe.model
        model, tokenizer = _loaded(
            section if judge.dtype == "auto" else section.model_copy(update={"dtype": judge.dtype})
        )
    return model.eval(), tokenizer


def _loaded(section: ModelSection) -> tuple[Any, Any]:
    """Base model and tokenizer, as sampling loads them."""
    tokenizer = tokenizer_of(section)
    return base_of(section, tokenizer), tokenizer


Item = TypeVar("Item")

#: Items finished and saved at a time: what a kill can lose.
UNIT = 16


def rows_of_all(
    output: Path,
    items: Sequence[Item],
    begin: Callable[[], Callable[[Sequence[Item]], list[dict[str, Any]]]],
    *,
    settings: Any,
    processes: Processes,
    console: Console,
    title: str,
) -> None:
    """Write one row for each item to `output`, unless it is there.

    Args:
        output: the .jsonl file.
        items: what there is to do, the same list on all processes.
        begin: loads what the work needs and returns the work: items -> rows. Called by every process or by none,
            because what it loads may agree with the other processes on something.
        settings: JSON values that the rows depend on.
        processes: of this launch; all of them call this.
        console: where the main process shows progress.
        title: what the progress calls it.
    """
    units = [items[start : start + UNIT] for start in range(0, len(items), UNIT)]
    shards = ShardedOutput(
        output, verb="evaluate", fingerprint=fingerprint_of(settings), units=len(units), processes=processes
    )
    if shards.open():
        return
    if shards.is_work_left:
        work = begin()
        pending = shards.pending()
        shown = console if processes.is_main else None
        with progress(shown, title, sum(len(units[unit]) for unit in pending)) as advance:
            for unit in pending:
                shards.write(unit, work(units[unit]))
                advance(len(units[unit]))
    shards.merge()


# ---- A judge of pairs ----

_LABELS = ("A", "B")


class PairJudge:
    """Compares pairs of responses with up to `concurrency` requests at a time.

    Args:
        section: the judge; its aspects are what it is told to consider, its scale is not used.
    """

    def __init__(self, section: JudgeScorer) -> None:
        self.judge = Judge(section, at="evaluation.wins.by")

    def compare(self, groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> list[dict[str, Any]]:
        """Compare (prompt, pairs of responses) groups.

        Returns:
            For each group `verdicts`: 1 where the first response of a pair wins in both orders, -1 where the
            second does, 0 for a tie, which is also a verdict that changes with the order; None where judging
            failed. `failures`: index of the pair, as text -> the reason.

        Raises:
            UserError: nothing is answered, or the budget is spent.
        """
        pairs = [(prompt, pair) for prompt, pairs in groups for pair in pairs]
        orders = [(prompt, order) for prompt, (one, two) in pairs for order in ((one, two), (two, one))]
        answers = self.judge.client.gather(lambda order: self._preferred(*order), orders)
        verdicts = iter(map(_verdict, answers[::2], answers[1::2]))
        rows = []
        for _, compared in groups:
            answered = [next(verdicts) for _ in compared]
            failures = {str(index): verdict for index, verdict in enumerate(answered) if isinstance(verdict, str)}
            kept = [None if isinstance(verdict, str) else verdict for verdict in answered]
            rows.append({"verdicts": kept, "failures": failures})
        return rows

    async def _preferred(self, prompt: str, pair: tuple[str, str]) -> int | str:
        """1 where the first is ranked better, -1 where the second is, 0 for equal ranks; or why there is no answer."""
        if pair[0] == pair[1]:
            return 0  # nothing to ask
        messages = ranking_messages(prompt, pair, _LABELS, self.judge.aspects, self.judge.section.instructions)
        ranks = await self.judge.answer(messages, lambda reply: parse_ranks(reply, _LABELS))
        return ranks if isinstance(ranks, str) else (ranks[0] < ranks[1]) - (ranks[0] > ranks[1])


def _verdict(given: int | str, swapped: int | str) -> int | str:
    """Both orders together: a side wins where both say so."""
    for answer in (given, swapped):
        if isinstance(answer, str):
            return answer
    return given if given == -int(swapped) else 0


# ---- How likely texts are ----
# One padded row per response through the model's ordinary forward, so that any causal LM can judge.

#: (prompt ids, response ids)
_Pair = tuple[Sequence[int], Sequence[int]]
#: Logits that the judge makes at a time, in numbers: 512 MiB of float32.
_LOGITS_AT_ONCE = 2**27


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    batch_tokens: int = 16384,
) -> float:
    """exp of the mean negative log-likelihood per token of `texts`, each after its prompt, under a judge.

    Every token weighs the same, whichever text it stands in. Prompt tokens are conditioned on and not
    counted; EOS is not counted, because another model's texts know nothing of the judge's.

    Args:
        model: The judge: any causal LM.
        tokenizer: The judge's own tokenizer, with a BOS token if prompts may be empty.
        prompts: One for each text.
        texts: Texts to judge. Empty ones have no tokens and do not count.
        batch_tokens: Padded tokens judged together.

    Raises:
        UserError: no text has a token, or one does not fit into the judge's context.
    """
    encoded = continuation_ids(tokenizer, prompts, texts)
    pairs = [(prompt, ids) for prompt, ids in zip(encode_prompts(tokenizer, prompts), encoded, strict=True) if ids]
    if not pairs:
        raise UserError("perplexity: every text is empty, so there is nothing to judge.")
    sums = _sums(model, pairs, batch_tokens)
    return math.exp(-math.fsum(sums) / sum(len(ids) for _, ids in pairs))


def mean_log_probs(model: Any, groups: Sequence[TokenizedGroup], *, batch_tokens: int = 16384) -> list[list[float]]:
    """p_i of every response: its mean log-prob per token, EOS included, in nats (Eq. 1 of arXiv 2304.05302).

    Raises:
        UserError: a response does not fit into the model's context.
    """
    pairs = [(group.prompt_ids, ids) for group in groups for ids in group.response_ids]
    means = iter([total / len(ids) for total, (_, ids) in zip(_sums(model, pairs, batch_tokens), pairs, strict=True)])
    return [[next(means) for _ in group.response_ids] for group in groups]


def text_log_probs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    batch_tokens: int = 16384,
) -> list[tuple[float, int]]:
    """(log-prob in nats, tokens) of each text after its prompt, as `perplexity` sums them up; (0, 0) for an empty one.

    What does not fit into the judge's context is cut: the prompt's beginning, then the text's end. The arguments are
    those of `perplexity`.
    """
    context = _context(model)
    pairs: list[_Pair] = []
    for prompt, ids in zip(
        encode_prompts(tokenizer, prompts), continuation_ids(tokenizer, prompts, texts), strict=True
    ):
        kept = ids if context is None else ids[: context - 1]
        pairs.append((prompt if context is None else prompt[-(context - len(kept)) :], kept))
    sums = iter(_sums(model, [pair for pair in pairs if pair[1]], batch_tokens))
    return [(next(sums), len(ids)) if ids else (0.0, 0) for _, ids in pairs]


def _context(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def _sums(model: Any, pairs: Sequence[_Pair], batch_tokens: int) -> list[float]:
    """Sum of log P(token | past) over each response, in nats; batches are smaller where the vocabulary is large."""
    lengths = [len(prompt) + len(ids) for prompt, ids in pairs]
    context = _context(model)
    if context is not None and max(lengths, default=0) > context:
        raise UserError(
            f"a prompt with its response has {max(lengths)} tokens, and the judging model reads {context}. Shorten "
            "the texts, or judge with a model of a longer context."
        )
    vocabulary = int(model.config.get_text_config().vocab_size)
    budget = TokenBudget(max(1, min(batch_tokens, _LOGITS_AT_ONCE // vocabulary)))
    was_training = model.training
    model.eval()
    try:
        return budget.map(lengths, lambda batch: _batch_sums(model, [pairs[index] for index in batch]))
    finally:
        model.train(was_training)


def _batch_sums(model: Any, pairs: Sequence[_Pair]) -> list[float]:
    """Padding is on the right, where nothing sees it."""
    width = max(len(prompt) + len(ids) for prompt, ids in pairs)
    rows = torch.zeros(len(pairs), width, dtype=torch.long)
    real, counted = torch.zeros_like(rows), torch.zeros(len(pairs), width - 1)
    for row, (prompt, ids) in enumerate(pairs):
        length = len(prompt) + len(ids)
        rows[row, :length] = torch.tensor([*prompt, *ids])
        real[row, :length] = 1
        counted[row, len(prompt) - 1 : length - 1] = 1  # the position before each response token predicts it
    rows, real, counted = rows.to(model.device), real.to(model.device), counted.to(model.device)
    logits = model(input_ids=rows, attention_mask=real, use_cache=False).logits[:, :-1].float()
    chosen = logits.gather(-1, rows[:, 1:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
    return (chosen * counted).sum(dim=-1, dtype=torch.float64).tolist()
