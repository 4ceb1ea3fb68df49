"""`OnlineTrainer`: the policy answers its own training prompts while it is trained (OP-k of arXiv 2304.05302).

Every `every` optimizer steps it answers the prompts of the next ones, the reward scores the answers, and the
steps are taken on these groups. The KL penalty compares it with itself, its adapter switched off, so that
no second copy of the weights is ever held.

A refresh falls on every multiple of `every` and on every epoch's start. Its random streams are named by seed,
step, prompt and candidate, so a run resumed from a checkpoint at such a step goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy

from rrhf_peft.data import TEMPLATES, Encoder, GroupCollator, encode_prompts, prompt_text, stop_token_ids
from rrhf_peft.data.tokenizing import Counts, why_dropped, without_duplicates
from rrhf_peft.files import replace_text
from rrhf_peft.modeling import TokenBudget
from rrhf_peft.objectives import NEEDS_PAIRS
from rrhf_peft.recipe import Recipe
from rrhf_peft.records import (
    PER_RESPONSE,
    GroupBatch,
    Mean,
    Message,
    RankedGroup,
    ResponseLogProbs,
    TokenizedGroup,
    UserError,
)
from rrhf_peft.sample.policies import Candidate, Decoding
from rrhf_peft.sample.transformers_policy import respond
from rrhf_peft.score.combine import combined
from rrhf_peft.score.run import make_scorers
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.reference import adapter_off_log_probs, evaluating
from rrhf_peft.train.trainer import MetricSums, RRHFTrainer

logger = logging.getLogger(__name__)

#: The folder of a run that holds what was sampled, one file for each refresh.
SAMPLED = "online"

#: What the log tells of every refresh; `kl/*` where there is an adapter to switch off.
_MEASURED = ("rewards/mean", "rewards/max", "kl/response", "kl/token", "response_tokens", "groups_without_pairs")

#: Groups in, for each a score per response out: higher is better, None where there is none.
Reward = Callable[[Sequence[RankedGroup]], list[list[float | None]]]

#: `TokenizedGroup.index` of a group that only stands in for a micro-batch without any, and teaches nothing.
STAND_IN = -1

#: After this many refreshes of which nothing could be learned, the run says so.
REFRESHES_IN_VAIN = 3


class OnlineTrainer(RRHFTrainer):
    """Train a causal LM, or an adapter on one, with its own responses.

    Args:
        model, args, eval_dataset, processing_class, peft_config, callbacks, optimizers: as for `RRHFTrainer`.
        train_dataset: the prompts.
        reward: scores groups of candidates.
        every: optimizer steps between two refreshes.
        decoding: how the policy answers.
        own_source: what its responses are called in the logs.
        kl_coefficient: b of reward - b * KL against the adapter-off policy.
        kl_reduction: a response's KL is the sum over its tokens of the log-ratio, or their mean.
        seed: of the random streams.
        batch_tokens: tokens decoded together; halved when memory is out.

    Raises:
        UserError: sharded weights, a penalty without an adapter, or checkpoints between two refreshes.
    """

    online = True

    def __init__(
        self,
        model: Any,
        args: RRHFConfig,
        train_dataset: Sequence[OnlinePrompt],
        reward: Reward,
        *,
        every: int,
        decoding: Decoding,
        own_source: str = "online",
        kl_coefficient: float = 0.0,
        kl_reduction: Literal["sum", "mean"] = "sum",
        seed: int = 0,
        batch_tokens: int = 16384,
        **rest: Any,
    ) -> None:
        _refuse_checkpoints_between(args, every)
        super().__init__(model=model, args=args, **rest)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise UserError(
                "online: every process samples from a whole model, and FSDP and DeepSpeed share its weights out. "
                "Launch with recipes/accelerate/ddp.yaml, and set model.quantization: nf4 where the model does not "
                "fit, or use rrhf-peft rounds, which samples between the trainings."
            )
        if kl_coefficient > 0 and not isinstance(self.model, PeftModel):
            raise UserError(
                "online.kl_coefficient: the penalty is against the model with its adapter off, and there is no "
                "adapter. Give one (adapter: {}), or set online.kl_coefficient: 0."
            )
        if self.reference == "cached":
            raise UserError(
                "objective.reference: online training makes new responses, which no cache holds. Give a new "
                "adapter, or set objective.reference: adapter_off to compare with the base."
            )
        self.train_dataset = list(train_dataset)
        provided = dict.fromkeys(name for item in train_dataset for name in item.sources)
        self.source_names = list(dict.fromkeys([own_source, *provided, *self.source_names]))
        self.data_collator = _PromptsOrGroups(self.source_names)
        self.encoder = Encoder(self.processing_class, self.args.template)  # type: ignore[arg-type]
        self.reward, self.every, self.decoding, self.own_source = reward, every, decoding, own_source
        self.kl_coefficient, self.kl_reduction = kl_coefficient, kl_reduction
        self.seed, self.budget = seed, TokenBudget(batch_tokens)
        self._ready: deque[list[GroupBatch]] = deque()
        self._epoch: Iterator[Any] | None = None
        self._sampled = MetricSums()
        self._sampling_sums: dict[int, torch.Tensor] = {}  # by group, where the objective compares with them
        self._in_vain = 0

    # ---- Batches ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[GroupBatch], int]:
        """The micro-batches of one optimizer step, of which the refresh makes those of several at once."""
        if epoch_iterator is not self._epoch:  # what an earlier call of `train` has left is stale
            self._ready.clear()
            self._epoch = epoch_iterator
        if not self._ready:
            self._ready.extend(self._refresh(self._next_prompts(epoch_iterator)))
        batches = self._ready.popleft()
        assert len(batches) == num_batches, (len(batches), num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _next_prompts(self, epoch: Iterator[list[OnlinePrompt]]) -> list[list[list[OnlinePrompt]]]:
        """By step and micro-batch: up to the next multiple of `every`, the epoch's end, or the run's."""
        step = self.state.global_step
        steps = min(self.every - step % self.every, self.state.max_steps - step)
        micro_batches = (list(islice(epoch, self.args.gradient_accumulation_steps)) for _ in range(steps))
        return [batches for batches in micro_batches if batches]

    def _refresh(self, steps: list[list[list[OnlinePrompt]]]) -> list[list[GroupBatch]]:
        """Answer, score and penalise; collective. Every process does so for its own prompts."""
        for name in _MEASURED:  # every process adds every name, also those that it has nothing to say of
            self._add(name, 0.0, 0.0)
        prompts = [item for batches in steps for batch in batches for item in batch]
        answered = self._answer(prompts)
        options = (self.args.objective in NEEDS_PAIRS, self.objective_options.get("min_score_gap", 0.0))
        learned = [why_dropped(answers.scores, *options) is None for answers in answered]
        self._record(answered, learned)
        self._sampling_sums = {STAND_IN: torch.zeros(2)}
        for answers in answered:
            self._sampling_sums[answers.prompt.index] = torch.tensor(answers.log_probs)

        groups = (answers.group() if teaches else None for answers, teaches in zip(answered, learned, strict=True))
        return [[self._batch([next(groups) for _ in batch], batch[0]) for batch in batches] for batches in steps]

    def _batch(self, groups: Sequence[TokenizedGroup | None], prompt: OnlinePrompt) -> GroupBatch:
        eos = int(self.processing_class.eos_token_id)  # type: ignore[union-attr]
        kept = [group for group in groups if group is not None]
        collate: Any = self.data_collator
        return collate(kept or [stand_in(prompt, self.own_source, eos)])

    def reference_log_probs(self, model: nn.Module, inputs: Any) -> ResponseLogProbs | None:
        """As for ranked data; for an objective that compares with the sampling policy, as it was when it sampled."""
        if self.reference != "sampling":
            return super().reference_log_probs(model, inputs)
        if not model.training:  # held-out groups are ranked data, and no ratio is clipped
            return self.engine.log_probs(model, inputs)
        sums = torch.cat([self._sampling_sums[index] for index in inputs["index"].tolist()])
        lengths = inputs["response_lengths"]
        return ResponseLogProbs(sums.to(lengths.device), lengths, lengths, inputs["group"])

    # ---- Answers ----

    def _answer(self, prompts: Sequence[OnlinePrompt]) -> list[Answers]:
        """The prompts' distinct responses with their scores."""
        began = time.perf_counter()
        tokenizer: Any = self.processing_class
        keys = [f"{self.seed}/{self.state.global_step}/{item.index}" for item in prompts]
        ids = [item.prompt_ids for item in prompts]
        ends = stop_token_ids(tokenizer, self.args.template)
        candidates = respond(self.model, tokenizer, ids, keys, self.decoding, self.budget, ends=ends)
        sampled = time.perf_counter()
        rewards = self.reward(
            [
                RankedGroup(
                    item.prompt,
                    [*item.responses, *(candidate.text for candidate in drawn)],
                    sources=[*item.sources, *[self.own_source] * len(drawn)],
                    index=item.index,
                )
                for item, drawn in zip(prompts, candidates, strict=True)
            ]
        )
        self._add_time("sampling_seconds", sampled - began)
        self._add_time("scoring_seconds", time.perf_counter() - sampled)
        answered = [
            answers_of(
                item,
                drawn,
                self.own_source,
                scores,
                self.encoder,
                max_tokens=self.args.max_tokens,
                repeats=self.reference == "sampling",
            )
            for item, drawn, scores in zip(prompts, candidates, rewards, strict=True)
        ]
        for item, drawn, scores in zip(prompts, candidates, rewards, strict=True):
            self._measure(drawn, [score for score in scores[len(item.responses) :] if score is not None])
        self._measure_log_probs(answered)
        return answered

    def _measure_log_probs(self, answered: Sequence[Answers]) -> None:
        """Log-probs of all responses where something compares with them: the objective, or, against the adapter-off
        policy, the penalty and the log."""
        usable = [answers for answers in answered if answers.response_ids]
        size = self.args.per_device_train_batch_size
        parts = [usable[start : start + size] for start in range(0, len(usable), size)]
        model: Any = self.model  # as it is inside DDP: nothing here has a gradient to synchronise
        with evaluating(model):
            if self.proof is None:  # collective: also where this process has nothing to compare
                prompt = answered[0].prompt
                first = self._batch([answers.group() for answers in parts[0]] if parts else [], prompt)
                self._prove_engine(model, self._prepare_input(first))
            if not isinstance(model, PeftModel) and self.reference != "sampling":
                return
            for part in parts:
                batch = self._prepare_input(self._batch([answers.group() for answers in part], part[0].prompt))
                with self.compute_loss_context_manager():
                    policy = self.engine.log_probs(model, batch)
                    sums = iter(policy.sum.tolist())
                    for answers in part:
                        answers.log_probs = [next(sums) for _ in answers.response_ids]
                    if not isinstance(model, PeftModel):
                        continue
                    reference = adapter_off_log_probs(self.engine, model, batch)
                ratios = iter((policy.sum.double() - reference.sum.double()).tolist())
                for answers in part:
                    log_ratios = [next(ratios) for _ in answers.response_ids]
                    answers.penalise(log_ratios, self.kl_coefficient, self.kl_reduction)
                    self._measure_kl(answers, log_ratios)

    # ---- Log ----

    def _measure(self, candidates: Sequence[Candidate], rewards: Sequence[float]) -> None:
        """The policy's own responses, repeated ones too: this is how good it is now."""
        best = [max(rewards)] if rewards else []
        self._add("rewards/mean", sum(rewards), len(rewards))
        self._add("rewards/max", sum(best), len(best))
        self._add("response_tokens", sum(candidate.num_tokens or 0 for candidate in candidates), len(candidates))

    def _measure_kl(self, answers: Answers, log_ratios: Sequence[float]) -> None:
        mine = [
            (ratio, len(ids))
            for ratio, ids, is_own in zip(log_ratios, answers.response_ids, answers.sampled, strict=True)
            if is_own
        ]
        self._add("kl/response", sum(ratio for ratio, _ in mine), len(mine))
        self._add("kl/token", sum(ratio for ratio, _ in mine), sum(length for _, length in mine))

    def _record(self, answered: Sequence[Answers], learned: Sequence[bool]) -> None:
        """What was sampled into its file, what it was like into the log; collective."""
        step = self.state.global_step
        rows = [answers.row(teaches) for answers, teaches in zip(answered, learned, strict=True)]
        everyone = gather_object(rows)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / SAMPLED / f"step-{step:06}.jsonl"
            replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in everyone))
        self._add("groups_without_pairs", len(learned) - sum(learned), len(learned))
        self.log({"refresh": float(step), **self._sampled.pop(self.accelerator)})
        if any(row["meta"]["learned"] for row in everyone):
            self._in_vain = -1
        elif self._in_vain >= 0:
            self._in_vain += 1
        if self._in_vain == REFRESHES_IN_VAIN and self.is_world_process_zero():
            logger.warning(
                "online: in %d refreshes no group had responses of different scores, so nothing has been learned. "
                "Raise online.decoding.temperature or k, check the scorer, and look at %s.",
                self._in_vain,
                Path(str(self.args.output_dir)) / SAMPLED,
            )

    def _add_time(self, name: str, seconds: float) -> None:
        self._add(name, seconds, 1)

    def _add(self, name: str, total: float, weight: float) -> None:
        self._sampled.add({name: Mean(torch.tensor(total), torch.tensor(weight))})


class _PromptsOrGroups(GroupCollator):
    """Training batches are lists of prompts until the policy has answered them; held-out ones are groups."""

    def __call__(self, items: Sequence[Any]) -> Any:
        if isinstance(items[0], OnlinePrompt):
            return list(items)
        return super().__call__(items)


def _refuse_checkpoints_between(args: RRHFConfig, every: int) -> None:
    """Refuse checkpoints whose continuation would lack what was sampled before them."""
    between = args.save_strategy == SaveStrategy.STEPS and args.save_steps % every
    if between or args.save_strategy == SaveStrategy.BEST:
        raise UserError(
            f"training.save_steps: a checkpoint can only be continued where new responses are sampled, at multiples of "
            f"online.every = {every} and at the end of an epoch. Set training.save_steps to a multiple of it, or "
            "training.save_strategy to epoch or no."
        )


# ---- The prompts ----


@dataclass(frozen=True, slots=True)
class OnlinePrompt:
    """One prompt to answer during training.

    Attributes:
        index: its row in the data as read; part of the names of its random streams.
        prompt: text or chat messages, for the scorer.
        prompt_ids: what the policy continues and is trained on.
        responses: what the data holds for it; ranked with the new ones where that is asked for.
        sources: who wrote each of these.
        sampled_as: `PER_RESPONSE` name -> what is known of how each of these was sampled.
    """

    index: int
    prompt: str | list[Message]
    prompt_ids: Sequence[int]
    responses: list[str]
    sources: list[str]
    sampled_as: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in PER_RESPONSE})


@dataclass(frozen=True)
class PromptReport:
    """What became of the prompts.

    Attributes:
        prompts_read: prompts in the data.
        prompts_kept: prompts to train on.
        prompts_truncated: prompts that lost their beginning.
        provided_responses: responses that came with the prompts kept and are ranked with the new ones.
        prompt_tokens: p10, p50, p90, p99 and max of the prompts' lengths in tokens, BOS included.
        fingerprint: SHA-256 over all of them, in order.
    """

    prompts_read: int
    prompts_kept: int
    prompts_truncated: int
    provided_responses: int
    prompt_tokens: dict[str, int]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title="prompts for online training", show_header=False)
        table.add_row("prompts", f"{self.prompts_kept:,} of {self.prompts_read:,}")
        table.add_row("lost their beginning", f"{self.prompts_truncated:,}")
        table.add_row("provided responses", f"{self.provided_responses:,}")
        table.add_row("prompt tokens", "  ".join(f"{name} {value}" for name, value in self.prompt_tokens.items()))
        return table


def tokenize_prompts(
    groups: Sequence[RankedGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    overlong_prompt: str = "truncate",
    keep_provided: bool = True,
) -> tuple[list[OnlinePrompt], PromptReport]:
    """Prompts as token ids, by the rules of `rrhf_peft.data.tokenizing`.

    Args:
        groups: prompts, with or without responses.
        tokenizer: the policy's.
        template: a name in `TEMPLATES`.
        max_prompt_tokens: longest prompt, BOS included.
        overlong_prompt: truncate cuts the beginning, drop leaves the prompt out, error stops.
        keep_provided: keep the responses that came with the prompts.

    Raises:
        UserError: no prompt is left, one is too long under ``error``, or empty without a BOS token.
    """
    form = TEMPLATES[template]
    texts = [prompt_text(group, tokenizer, template) for group in groups]
    encoded = encode_prompts(tokenizer, texts, add_bos=not form.writes_bos)
    overlong = {index for index, ids in enumerate(encoded) if len(ids) > max_prompt_tokens}
    if overlong and overlong_prompt == "error":
        index = min(overlong)
        raise UserError(
            f"data.train: prompt {index} (from 0) has {len(encoded[index])} tokens, and {max_prompt_tokens} leave room "
            "for a response. Raise data.max_tokens, shorten the prompt, or set data.overlong_prompt to truncate or "
            "drop."
        )
    cut = encode_prompts(tokenizer, texts, add_bos=not form.writes_bos, max_tokens=max_prompt_tokens)
    kept = [
        OnlinePrompt(
            index,
            group.prompt,
            array("i", ids),
            list(group.responses) if keep_provided else [],
            list(group.sources) if keep_provided else [],
            {name: list(getattr(group, name)) if keep_provided else [] for name in PER_RESPONSE},
        )
        for index, (group, ids) in enumerate(zip(groups, cut, strict=True))
        if overlong_prompt == "truncate" or index not in overlong
    ]
    if not kept:
        raise UserError(
            f"data.train: all {len(groups)} prompts are longer than {max_prompt_tokens} tokens and were dropped. Raise "
            "data.max_tokens, or set data.overlong_prompt: truncate."
        )
    lengths = np.percentile([len(item.prompt_ids) for item in kept], [10, 50, 90, 99, 100], method="inverted_cdf")
    report = PromptReport(
        prompts_read=len(groups),
        prompts_kept=len(kept),
        prompts_truncated=len(overlong) if overlong_prompt == "truncate" else 0,
        provided_responses=sum(len(item.responses) for item in kept),
        prompt_tokens=dict(zip(("p10", "p50", "p90", "p99", "max"), map(int, lengths), strict=True)),
        fingerprint=_fingerprint(kept),
    )
    return kept, report


def _fingerprint(prompts: Sequence[OnlinePrompt]) -> str:
    digest = hashlib.sha256()
    for item in prompts:
        provided = [item.responses, item.sources, item.sampled_as]
        digest.update(json.dumps([item.index, list(item.prompt_ids), *provided], default=list).encode())
    return digest.hexdigest()


# ---- Rewards: a scorer section as a function of candidates ----


def make_reward(section: Any, recipe: Recipe, seed: int, prompts: Sequence[OnlinePrompt], own_source: str) -> Reward:
    """The function that a scorer section describes; whatever it needs is loaded here, before training begins.

    A composite that normalises over the data does so over the groups of one call.

    Args:
        section: any scorer but `human`.
        recipe: for scorers that read more of it.
        seed: of a judge's shuffling.
        prompts: the prompts of the run.
        own_source: what the policy's own responses are called.

    Raises:
        UserError: a scorer cannot be made.
    """
    # Scorers look at the data when they are made: at its sources, and at some tokens to prove an engine with.
    names = list(dict.fromkeys([own_source, *(name for item in prompts for name in item.sources)]))
    texts = [f"This is answer {number}." for number in range(max(2, len(names)))]
    sources = (names * 2)[: len(texts)]
    example = RankedGroup(prompts[0].prompt, texts, sources=sources)

    scorers = make_scorers(section, recipe, seed, [example])

    def reward(groups: Sequence[RankedGroup]) -> list[list[float | None]]:
        by_label = {label: scorer.score(groups) for label, scorer in scorers.items()}
        return combined(
            [{label: scores[row] for label, scores in by_label.items()} for row in range(len(groups))], section
        )

    return reward


# ---- Answers with their rewards, as groups to train on ----


@dataclass
class Answers:
    """One prompt with its scored, distinct responses; provided ones first, then the policy's own.

    Attributes:
        prompt: what was answered.
        response_ids: of each response, with its end unless it was cut.
        texts: of each response.
        sources: who wrote each.
        finish_reasons: how sampling ended each; None where that is not known.
        tokenizer: fingerprint of tokenizer and template that the ids belong to.
        rewards: what the scorer said of each.
        sampled: whether the policy wrote it now.
        kl: log-ratio to the adapter-off policy in nats, as penalised; None where it was not computed.
        scores: what is trained on: rewards, less the penalty.
        log_probs: log P of each response as a whole by the policy that sampled, in nats; empty where not computed.
        left_out: responses that are not among these, each with its source and why.
    """

    prompt: OnlinePrompt
    response_ids: list[Sequence[int]]
    texts: list[str]
    sources: list[str]
    finish_reasons: list[str | None]
    tokenizer: str
    rewards: list[float]
    sampled: list[bool]
    left_out: list[dict[str, Any]]
    kl: list[float | None] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def penalise(self, log_ratios: Sequence[float], coefficient: float, reduction: Literal["sum", "mean"]) -> None:
        """Set score_i = reward_i - coefficient * KL_i.

        Args:
            log_ratios: sum over each response's tokens of log pi - log pi_off, in nats.
            coefficient: b.
            reduction: KL_i is that sum, or its mean over the tokens.
        """
        lengths = [len(ids) if reduction == "mean" else 1 for ids in self.response_ids]
        penalties = [ratio / length for ratio, length in zip(log_ratios, lengths, strict=True)]
        self.kl = list(penalties)
        self.scores = [reward - coefficient * kl for reward, kl in zip(self.rewards, penalties, strict=True)]

    def group(self) -> TokenizedGroup:
        """As training takes it; the scores must be set."""
        return TokenizedGroup(
            self.prompt.prompt_ids, list(self.response_ids), list(self.scores), self.sources, self.prompt.index
        )

    def row(self, learned: bool) -> dict[str, Any]:
        """The record of it: ranked data as every reader here takes it, with rewards, KL and what was left out."""
        return {
            "prompt": self.prompt.prompt,
            "responses": self.texts,
            "scores": self.scores,
            "sources": self.sources,
            "rewards": self.rewards,
            "kl": self.kl,
            "num_tokens": [len(ids) for ids in self.response_ids],
            "token_ids": [list(ids) for ids in self.response_ids],
            "tokenizers": [self.tokenizer] * len(self.texts),
            "finish_reasons": self.finish_reasons,
            "sampled": self.sampled,
            "left_out": self.left_out,
            "meta": {"prompt_index": self.prompt.index, "learned": learned},
        }


def answers_of(
    prompt: OnlinePrompt,
    candidates: Sequence[Candidate],
    own_source: str,
    rewards: Sequence[float | None],
    encoder: Encoder,
    *,
    max_tokens: int,
    repeats: bool = False,
) -> Answers:
    """Keep the responses that have a text and a reward, each once.

    The policy's own responses are the very tokens that it sampled; text may be spelled with others. One that was cut at
    its length gets no end: the policy did not end there.

    Args:
        prompt: with the provided responses to keep, which come first.
        candidates: the policy's own responses.
        own_source: what these are called.
        rewards: of the provided responses and the candidates, in this order.
        encoder: tokenizer and template of the policy.
        max_tokens: longest prompt with response; a longer response loses its end.
        repeats: keep a response as often as it was sampled, as expectations under the policy count it.
    """
    texts = [*prompt.responses, *(candidate.text for candidate in candidates)]
    sources = [*prompt.sources, *[own_source] * len(candidates)]
    provided = len(prompt.responses)
    drawn: dict[str, list[Any]] = {
        "finish_reasons": [candidate.finish_reason for candidate in candidates],
        "num_tokens": [candidate.num_tokens for candidate in candidates],
        "token_ids": [candidate.token_ids for candidate in candidates],
        "tokenizers": [None if candidate.token_ids is None else encoder.fingerprint for candidate in candidates],
    }
    sampled_as: dict[str, Any] = {name: [*prompt.sampled_as[name], *drawn[name]] for name in PER_RESPONSE}
    group = RankedGroup(prompt.prompt, texts, rewards, sources, index=prompt.index, **sampled_as)
    left_out = [
        {"response": text, "source": source, "reason": "not scored" if text.strip() else "empty"}
        for text, source, reward in zip(texts, sources, rewards, strict=True)
        if reward is None or not text.strip()
    ]
    scored = [index for index, reward in enumerate(rewards) if reward is not None]
    group = group.choose(scored)
    (encoded,) = encoder.responses([group], encoder.prompt_texts([group]))
    kept = without_duplicates(group, encoded, max_tokens - len(prompt.prompt_ids), Counts())
    if repeats:
        kept = [item for item in kept for _ in item.scores]
    stay = [scored[item.index] for item in kept]

    rewards_kept = [item.score for item in kept]
    return Answers(
        prompt=prompt,
        response_ids=[item.ids for item in kept],
        texts=[texts[row] for row in stay],
        sources=[sources[row] for row in stay],
        finish_reasons=[sampled_as["finish_reasons"][row] for row in stay],
        tokenizer=encoder.fingerprint,
        rewards=rewards_kept,
        sampled=[row >= provided for row in stay],
        left_out=left_out,
        kl=[None] * len(stay),
        scores=list(rewards_kept),
    )


def stand_in(prompt: OnlinePrompt, source: str, eos: int) -> TokenizedGroup:
    """A group for a micro-batch that has none of its own, because every process must run its forward and backward.

    It has an ordered pair, so that every objective gives it a finite loss, which then weighs nothing.
    """
    return TokenizedGroup(prompt.prompt_ids, [[eos], [eos, eos]], [1.0, 0.0], [source, source], STAND_IN)
