"""Diverse beam search: https://arxiv.org/abs/1610.02424, with Hamming diversity. DP in arXiv 2304.05302.

The beams of a prompt are split into groups. At every step the groups choose one after the other, and a
token costs `diversity_penalty` for every beam of an earlier group that goes on with it at this step
(Algorithm 1; the penalty stays in the beam's score). Within a group, ending and length follow
transformers' beam search, so that one group is `generate(num_beams=n)`.

    * Only beams that go on count: ending a response is not a repeated word, and an ended one has no next.
    * A group of one beam is a greedy decoding: it ends at its first end token, as
      `generate(num_beams=1)` does, and `early_stopping` has no say.
    * The temperature divides the logits before the log-softmax; beam scores are made of that.

Shapes: B prompts, G groups, n beams of a group, T tokens at most, V vocabulary, C = candidates kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from rrhf_peft.sample.transformers_policy import CachedSteps, Generated, StopStrings

#: The score of what cannot be chosen, as in transformers.
_NEVER = -1.0e9


class _Group:
    """The running and the finished beams of one group, for B prompts."""

    def __init__(self, prompts: int, beams: int, length: int, device: torch.device) -> None:
        shape = (prompts, beams)
        self.tokens = torch.zeros((*shape, length), dtype=torch.long, device=device)
        self.scores = torch.zeros(shape, device=device)
        self.scores[:, 1:] = _NEVER  # all beams are still the same one
        self.log_probs = torch.zeros(shape, dtype=torch.float64, device=device)
        self.done_tokens = torch.zeros_like(self.tokens)
        self.done_lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self.done_scores = torch.full(shape, _NEVER, device=device)
        self.done_log_probs = torch.zeros_like(self.log_probs)
        self.is_done = torch.zeros(shape, dtype=torch.bool, device=device)
        self.can_improve = torch.ones(prompts, dtype=torch.bool, device=device)

    def select(self, prompts: torch.Tensor) -> None:
        """Keep these prompts only."""
        for name, value in vars(self).items():
            setattr(self, name, value[prompts])

    def is_open(self, early: bool) -> torch.Tensor:
        """bool [B]: whether the search of a prompt goes on."""
        return self.can_improve & ~self.is_done.all(1) if early else self.can_improve

    def finish(
        self, which: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor, length: int
    ) -> None:
        """Of the finished beams and the candidates `which` (bool [B, C]), keep the n best."""
        new_scores = scores.masked_fill(~which, _NEVER)
        best = torch.cat((self.done_scores, new_scores), 1).topk(self.done_scores.shape[1])
        self.done_scores = best.values
        for name, new in (
            ("done_tokens", tokens),
            ("done_lengths", torch.full_like(tokens[:, :, 0], length)),
            ("done_log_probs", log_probs),
            ("is_done", which),
        ):
            setattr(self, name, _take(torch.cat((getattr(self, name), new), 1), best.indices))

    def results(self, prompt: int) -> list[Generated]:
        """A prompt's finished beams, the best first."""
        return [
            Generated(self.done_tokens[prompt, beam, :length].tolist(), float(self.done_log_probs[prompt, beam]))
            for beam, length in enumerate(self.done_lengths[prompt].tolist())
            if self.is_done[prompt, beam]
        ]


@torch.no_grad()
def diverse_beam_search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    stop: StopStrings,
) -> list[list[Generated]]:
    """Decode each prompt with `num_beams` beams in `num_beam_groups` equal groups.

    Args:
        prompts: Token ids.
        diversity_penalty: lambda of the paper, in nats.
        temperature: Divides the logits.
        length_penalty: A finished beam's score is its sum of log-probs / tokens ** this.
        early_stopping: transformers' rule: True ends a group with its n-th finished beam, False when the best
            running beam, at its present length, is worse than the worst finished one, "never" when it cannot
            become better at any length.
        ends: Token ids that end a response.
        pad: Any token id.
        stop: Strings that end a response.

    Returns:
        For each prompt its responses: the best of every group in the order of the groups, then the second
        best of every group, and so on. `log_prob` is the policy's own, without temperature and penalty.
    """
    assert num_beams % num_beam_groups == 0
    beams, count = num_beams // num_beam_groups, len(prompts)
    early = early_stopping is True or beams == 1
    steps = CachedSteps(model, prompts, pad, num_beams)
    device = steps.logits.device
    rules: dict[str, Any] = {
        "ends": torch.tensor(list(ends), device=device),
        "stop": stop,
        "length_penalty": length_penalty,
        "early": early,
    }
    groups = [_Group(count, beams, max_new_tokens, device) for _ in range(num_beam_groups)]
    indices = list(range(count))  # which prompt each row of the groups' tensors is
    results: dict[int, list[list[Generated]]] = {}
    for step in range(max_new_tokens):
        rules |= {"step": step, "is_last": step == max_new_tokens - 1}
        rules["hypothetical_length"] = max_new_tokens if early_stopping == "never" and length_penalty > 0 else step + 1
        rows, tokens = _advance_groups(groups, steps.logits, temperature, diversity_penalty, rules)
        is_open = torch.stack([group.is_open(early) for group in groups]).any(0)
        if rules["is_last"] or not is_open.any():
            break
        if 2 * int(is_open.sum()) <= len(indices):  # copying less of the cache pays when half of the prompts are done
            for row in (~is_open).nonzero()[:, 0].tolist():
                results[indices[row]] = [group.results(row) for group in groups]
            kept = is_open.nonzero()[:, 0]
            for group in groups:
                group.select(kept)
            rows, tokens = rows[kept], tokens[kept]
            indices = [indices[row] for row in kept.tolist()]
        steps.advance(tokens.flatten(), rows.flatten())
    results |= {prompt: [group.results(row) for group in groups] for row, prompt in enumerate(indices)}
    return [_best_of_each_first(results[prompt]) for prompt in range(count)]


def _advance_groups(
    groups: Sequence[_Group], logits: torch.Tensor, temperature: float, diversity_penalty: float, rules: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of all groups, one after the other; `logits` are [B * G * n, V].

    Returns:
        For each running beam the row of `logits` that it continues and its token, both [B, G * n].
    """
    count, beams = groups[0].scores.shape
    log_probs = logits.log_softmax(-1).view(count, len(groups), beams, -1)
    scaled = log_probs if temperature == 1 else (logits / temperature).log_softmax(-1).view_as(log_probs)
    taken = torch.zeros(count, logits.shape[-1], device=logits.device)
    parents, tokens = [], []
    for number, group in enumerate(groups):
        scores = scaled[:, number] - diversity_penalty * taken[:, None]
        parent, token, goes_on = _advance_group(group, scores, log_probs[:, number], **rules)
        taken.scatter_add_(1, token, goes_on.float())
        parents.append(parent + number * beams)
        tokens.append(token)
    first = len(groups) * beams * torch.arange(count, device=logits.device)
    return torch.cat(parents, 1) + first[:, None], torch.cat(tokens, 1)


def _advance_group(
    group: _Group,
    scores: torch.Tensor,
    log_probs: torch.Tensor,
    *,
    step: int,
    is_last: bool,
    ends: torch.Tensor,
    stop: StopStrings,
    length_penalty: float,
    early: bool,
    hypothetical_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of one group; `scores` and `log_probs` are [B, n, V].

    Returns:
        For the n running beams of each prompt: the beam each continues, its token, and whether it really
        goes on, all [B, n].
    """
    beams, vocabulary = scores.shape[1:]
    was_open = group.is_open(early)
    # As many candidates as leave n running ones even when every beam's best continuations are end tokens.
    kept = min(max(2, 1 + len(ends)) * beams, beams * vocabulary)
    top_scores, top = (scores + group.scores[:, :, None]).flatten(1).topk(kept)  # [B, C]
    parent, token = top // vocabulary, top % vocabulary
    total = group.log_probs.gather(1, parent) + log_probs.flatten(1).gather(1, top).double()
    history = group.tokens.gather(1, parent[:, :, None].expand(-1, -1, group.tokens.shape[2])).clone()
    history[:, :, step] = token
    ended = torch.isin(token, ends)
    if stop:
        tails = history[:, :, max(0, step + 1 - stop.reach) : step + 1].flatten(0, 1).tolist()
        ended |= torch.tensor([stop.hit(tail) for tail in tails], device=ended.device).view_as(ended)
    # Only the first n candidates may finish; the others are there to keep n beams running.
    may_finish = (torch.arange(kept, device=ended.device) < beams) & was_open[:, None]
    final_scores = top_scores / (step + 1) ** length_penalty
    group.finish(ended & may_finish, final_scores, history, total, step + 1)

    running = top_scores.masked_fill(ended, _NEVER).topk(beams).indices
    group.scores = top_scores.gather(1, running).masked_fill(ended.gather(1, running), _NEVER)
    group.tokens, group.log_probs = _take(history, running), total.gather(1, running)
    worst = torch.where(group.is_done, group.done_scores.min(1, keepdim=True).values, _NEVER)
    possible = group.scores[:, :1] / hypothetical_length**length_penalty
    group.can_improve &= (possible > worst).any(1)
    chosen = token.gather(1, running)
    goes_on = ~ended.gather(1, running) & group.is_open(early)[:, None]
    if is_last:  # cut where they are
        group.finish(~ended & may_finish, final_scores, history, total, step + 1)
    return parent.gather(1, running), chosen, goes_on


def _take(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """values [B, C, ...] at indices [B, n]."""
    if values.dim() == 3:
        indices = indices[:, :, None].expand(-1, -1, values.shape[2])
    return values.gather(1, indices)


def _best_of_each_first(groups: list[list[Generated]]) -> list[Generated]:
    longest = max(map(len, groups))
    return [group[rank] for rank in range(longest) for group in groups if rank < len(group)]
