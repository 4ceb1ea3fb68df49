"""What is measured of a policy: samples, KL to the base, gold reward, fluency, variety, pair accuracy."""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.records import UserError

#: Prompts that go through the model together.
ROWS = 64


class Policy:
    """A causal LM, later with an adapter, and its tokenizer."""

    def __init__(self, name: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        self.adapted = False

    def add_adapter(self, rank: int, seed: int) -> None:
        """A new LoRA on all linear layers."""
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model, self.adapted = get_peft_model(self.model, config), True

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within it the adapter's part of every weight is multiplied by this."""
        layers = [module for module in self.model.modules() if isinstance(getattr(module, "scaling", None), dict)]
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling.update({name: scale * value for name, value in layer.scaling.items()})
        self.model.eval()
        try:
            yield
        finally:
            for layer, values in zip(layers, before, strict=True):
                layer.scaling.update(values)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], settings: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        """One response to each prompt: its text, its token ids, whether it was cut, and the prompt's ids."""
        torch.manual_seed(seed)
        answers = []
        for start in range(0, len(prompts), ROWS):
            ids = [self.prompt_ids(prompt) for prompt in prompts[start : start + ROWS]]
            tokens, mask = padded(ids, self.tokenizer.pad_token_id, left=True)
            drawn = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=True,
                temperature=settings["temperature"],
                top_k=0,
                top_p=1.0,
                max_new_tokens=settings["max_new_tokens"],
                pad_token_id=self.tokenizer.pad_token_id,
            )[:, tokens.shape[1] :].tolist()
            for prompt, response in zip(ids, drawn, strict=True):
                end = self.tokenizer.eos_token_id
                cut = end not in response
                kept = response if cut else response[: response.index(end) + 1]
                text = self.tokenizer.decode(kept, skip_special_tokens=True)
                answers.append({"text": text, "ids": kept, "cut": cut, "prompt_ids": prompt})
        return answers

    def prompt_ids(self, prompt: str) -> list[int]:
        """As training tokenises it: one BOS first, where the tokenizer has one, and no end."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id, *ids]

    @torch.no_grad()
    def kl_to_base(self, answers: Sequence[dict[str, Any]]) -> list[float]:
        """KL(policy || base) of each response in nats: the sum over its positions of the exact KL over the vocabulary.

        Its expectation over the policy's responses is the KL of whole responses, with less noise than log-ratios.
        """
        values: list[float] = []
        for start in range(0, len(answers), ROWS):
            part = answers[start : start + ROWS]
            policy = self._log_probs(part)
            if not self.adapted:
                values += [0.0] * len(part)
                continue
            with self.model.disable_adapter():
                base = self._log_probs(part)
            kl = (policy.exp() * (policy - base)).sum(-1)  # [rows, positions]
            for row, answer in zip(kl, part, strict=True):
                first = len(answer["prompt_ids"]) - 1
                values.append(float(row[first : first + len(answer["ids"])].sum()))
        return values

    def _log_probs(self, answers: Sequence[dict[str, Any]]) -> torch.Tensor:
        """log P(next token) at every position [rows, positions, V] of prompts with their responses."""
        ids = [answer["prompt_ids"] + answer["ids"] for answer in answers]
        tokens, mask = padded(ids, self.tokenizer.pad_token_id, left=False)
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.log_softmax(-1)

    @torch.no_grad()
    def pair_accuracy(self, rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[float]]) -> float:
        """Share of the pairs of different score whose mean log-prob per token orders them as the scores do."""
        right, pairs = 0, 0
        for row, rewards in zip(rows, scores, strict=True):
            prompt = self.prompt_ids(row["prompt"])
            responses = [self.tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in row["text"]]
            answers = [{"prompt_ids": prompt, "ids": ids} for ids in responses]
            log_probs = self._log_probs(answers)
            means = []
            for row_log_probs, ids in zip(log_probs, responses, strict=True):
                at = row_log_probs[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
                means.append(at.gather(-1, torch.tensor(ids)[:, None]).mean().item())
            for i in range(len(means)):
                for j in range(len(means)):
                    if rewards[i] > rewards[j]:
                        pairs += 1
                        right += means[i] > means[j]
        return right / pairs if pairs else math.nan


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, longest]."""
    longest = max(map(len, rows))
    fill = [longest - len(row) for row in rows]
    tokens = [[pad] * n + [*row] if left else [*row] + [pad] * n for row, n in zip(rows, fill, strict=True)]
    mask = [[0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n for row, n in zip(rows, fill, strict=True)]
    return torch.tensor(tokens), torch.tensor(mask)


class Gold:
    """The held-out reward: P(positive) by a logistic regression on words and pairs of words, trained on SST-2.

    Attributes:
        accuracy: on SST-2's dev set.
    """

    BUCKETS = 2**16

    def __init__(self, folder: Path) -> None:
        train, dev = self._read(folder / "train.tsv"), self._read(folder / "dev.tsv")
        self.weights = nn.EmbeddingBag(self.BUCKETS, 1, mode="sum")
        nn.init.zeros_(self.weights.weight)
        optimizer = torch.optim.Adam(self.weights.parameters(), lr=0.05)
        bags, offsets = self._bags([text for text, _ in train])
        labels = torch.tensor([float(label) for _, label in train])
        for _ in range(60):
            optimizer.zero_grad()
            logits = self.weights(bags, offsets).squeeze(-1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            (loss + 3e-5 * self.weights.weight.square().sum()).backward()
            optimizer.step()
        right = [(p > 0.5) == (label == "1") for p, (_, label) in zip(self.of([t for t, _ in dev]), dev, strict=True)]
        self.accuracy = sum(right) / len(right)

    @torch.no_grad()
    def of(self, texts: Sequence[str]) -> list[float]:
        """P(positive) of each text."""
        values: list[float] = self.weights(*self._bags(texts)).squeeze(-1).sigmoid().tolist()
        return values

    def _bags(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        bags: list[int] = []
        offsets = []
        for text in texts:
            offsets.append(len(bags))
            words = re.findall(r"[a-z0-9]+|n't|'\w+", text.lower().replace(" n't", "n't"))
            for term in [*words, *map(" ".join, itertools.pairwise(words))]:
                bags.append(zlib.crc32(term.encode()) % self.BUCKETS)
        return torch.tensor(bags, dtype=torch.int64), torch.tensor(offsets)

    @staticmethod
    def _read(path: Path) -> list[tuple[str, str]]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}). Give the folder of SST-2's files.") from None
        rows = [tuple(line.rsplit("\t", 1)) for line in lines if line.strip()]
        rows = [row for row in rows if row[-1] in ("0", "1")]  # no header
        if not rows or any(len(row) != 2 for row in rows):
            raise UserError(f"{path}: has no lines of a sentence, a tab and 0 or 1. Give the folder of SST-2's files.")
        return rows  # type: ignore[return-value]


class Judge:
    """A trigram model with Witten-Bell smoothing, read from real stories: fluency by who never was the policy."""

    def __init__(self, tokenizer: Any, stories: Sequence[str]) -> None:
        self.vocabulary, self.end = len(tokenizer), tokenizer.eos_token_id
        self.counts: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(3)]
        for story in stories:
            ids = tokenizer(story, add_special_tokens=False)["input_ids"]
            for position, token in enumerate(ids):
                for order in range(min(3, position + 1)):
                    self.counts[order][tuple(ids[position - order : position])][token] += 1

    def nats_per_token(self, ids: Sequence[int]) -> float:
        """Mean of - log P(token | the two before it), the end left out; an empty response is as bad as chance."""
        ids = [token for token in ids if token != self.end]
        if not ids:
            return math.log(self.vocabulary)
        nats = [-math.log(self._probability(tuple(ids[max(0, i - 2) : i]), token)) for i, token in enumerate(ids)]
        return sum(nats) / len(nats)

    def _probability(self, past: tuple[int, ...], token: int) -> float:
        shorter = self._probability(past[1:], token) if past else 1 / self.vocabulary
        seen = self.counts[len(past)].get(past)
        if not seen:
            return shorter
        return (seen[token] + len(seen) * shorter) / (sum(seen.values()) + len(seen))


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words, as a share of all."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else math.nan
