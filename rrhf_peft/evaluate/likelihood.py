"""How likely texts are under a model: perplexity of responses, and the policy's own preference p_i.

One padded row per response through the model's ordinary forward, so that any causal LM can judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rrhf_peft.data import continuation_ids
from rrhf_peft.records import TokenizedGroup, UserError
from rrhf_peft.sample.prompts import encode_prompts
from rrhf_peft.score.batches import TokenBudget

#: (prompt ids, response ids)
_Pair = tuple[Sequence[int], Sequence[int]]


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    batch_size: int = 32,
) -> float:
    """exp of the mean negative log-likelihood per token of `texts`, each after its prompt, under a judge.

    Every token weighs the same, whichever text it stands in. Prompt tokens are conditioned on and not
    counted; EOS is not counted, because another model's texts know nothing of the judge's.

    Args:
        model: The judge: any causal LM.
        tokenizer: The judge's own tokenizer, with a BOS token if prompts may be empty.
        prompts: One for each text.
        texts: Texts to judge. Empty ones have no tokens and do not count.

    Raises:
        UserError: no text has a token, or one does not fit into the judge's context.
    """
    assert len(prompts) == len(texts), "one prompt for each text"
    encoded = continuation_ids(tokenizer, prompts, texts)
    pairs = [(prompt, ids) for prompt, ids in zip(encode_prompts(tokenizer, prompts), encoded, strict=True) if ids]
    if not pairs:
        raise UserError("perplexity: every text is empty, so there is nothing to judge.")
    sums = _sums(model, pairs, batch_size)
    return math.exp(-math.fsum(sums) / sum(len(ids) for _, ids in pairs))


#: Logits that the judge makes at a time, in numbers: 512 MiB of float32.
_LOGITS_AT_ONCE = 2**27


def text_log_probs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    batch_tokens: int = 16384,
) -> list[tuple[float, int]]:
    """(log-prob in nats, tokens) of each text after its prompt, as `perplexity` sums them up; (0, 0) for an empty one.

    What does not fit into the judge's context is cut: the prompt's beginning, then the text's end.

    Args:
        model: The judge: any causal LM.
        tokenizer: Its tokenizer.
        prompts: One for each text.
        texts: Texts to judge.
        batch_tokens: Padded tokens judged together; fewer where the judge's vocabulary is large.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = continuation_ids(tokenizer, prompts, texts)
    pairs: list[_Pair] = []
    for prompt, ids in zip(encode_prompts(tokenizer, prompts), encoded, strict=True):
        kept = ids if context is None else ids[: context - 1]
        pairs.append((prompt if context is None else prompt[-(context - len(kept)) :], kept))
    judged = [place for place, (_, ids) in enumerate(pairs) if ids]
    found = [(0.0, 0)] * len(texts)
    vocabulary = int(model.config.get_text_config().vocab_size)
    budget = TokenBudget(max(1, min(batch_tokens, _LOGITS_AT_ONCE // vocabulary)))
    lengths = [len(pairs[place][0]) + len(pairs[place][1]) for place in judged]
    with torch.no_grad():
        sums = budget.map(lengths, lambda batch: _batch_sums(model, [pairs[judged[place]] for place in batch]))
    for place, total in zip(judged, sums, strict=True):
        found[place] = (total, len(pairs[place][1]))
    return found


def mean_log_probs(model: Any, groups: Sequence[TokenizedGroup], *, batch_size: int = 32) -> list[list[float]]:
    """p_i of every response: its mean log-prob per token, EOS included, in nats (Eq. 1 of arXiv 2304.05302).

    Raises:
        UserError: a response does not fit into the model's context.
    """
    pairs = [(group.prompt_ids, ids) for group in groups for ids in group.response_ids]
    means = iter([total / len(ids) for total, (_, ids) in zip(_sums(model, pairs, batch_size), pairs, strict=True)])
    return [[next(means) for _ in group.response_ids] for group in groups]


@torch.no_grad()
def _sums(model: Any, pairs: Sequence[_Pair], batch_size: int) -> list[float]:
    """Sum of log P(token | past) over each response, in nats; padding is on the right, where nothing sees it."""
    longest = max(len(prompt) + len(ids) for prompt, ids in pairs)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise UserError(
            f"a prompt with its response has {longest} tokens, and the judging model reads {context}. Shorten the "
            "texts, or judge with a model of a longer context."
        )
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
    sums = [0.0] * len(pairs)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, total in zip(batch, _batch_sums(model, [pairs[index] for index in batch]), strict=True):
                sums[index] = total
    finally:
        model.train(was_training)
    return sums


def _batch_sums(model: Any, pairs: Sequence[_Pair]) -> list[float]:
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
