"""A small base model of the demo's own stories, trained on this machine once and then cached.

A BPE tokenizer and a two-layer Llama, from nothing, in under a minute on one CPU core: small, but an
ordinary transformers folder that quantises, trains and merges like a large one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from rrhf_peft.demo.stories import Story, make_stories
from rrhf_peft.files import staged_folder

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
#: Part of the cache key: raise it when this file changes what a base model is.
RECIPE_VERSION = 1


@dataclass(frozen=True)
class BaseSize:
    """The size of a base model and of its training.

    Attributes:
        stories: Distinct stories to train on.
        epochs: Passes over them.
        batch_size: Stories per step.
        learning_rate: At the peak; rises for 30 steps, then falls linearly.
        vocab_size: Of the BPE tokenizer, the 256 bytes included.
        hidden_size: Width; a multiple of 64, the block that NF4 quantises.
        layers: Two or more: a name is copied through two layers.
        heads: Attention heads.
        context: Longest text in tokens.
    """

    stories: int = 3200
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 4e-3
    vocab_size: int = 768
    hidden_size: int = 128
    layers: int = 2
    heads: int = 8
    context: int = 256

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.epochs * -(-self.stories // self.batch_size)


def cache_folder() -> Path:
    """Where made models are kept: $RRHF_PEFT_CACHE, else $XDG_CACHE_HOME/rrhf-peft, else ~/.cache/rrhf-peft."""
    if folder := os.environ.get("RRHF_PEFT_CACHE"):
        return Path(folder)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "rrhf-peft"


def cached_base(size: BaseSize, *, seed: int = 0) -> Path:
    """The folder in which this base model is kept once it was made; its name depends on all that shapes it."""
    recipe = {"version": RECIPE_VERSION, "seed": seed, **dataclasses.asdict(size)}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for story in make_stories(size.stories, seed):
        digest.update((story.prompt + story.continuation + "\n").encode())
    return cache_folder() / f"quickstart-base-{digest.hexdigest()[:16]}"


def make_base(size: BaseSize, *, seed: int = 0, progress: Callable[[int, float], None] | None = None) -> Path:
    """Return the folder of the base model, training it first where it is not cached yet.

    The same size and seed give the same weights on the same machine.

    Args:
        size: Of model and training.
        seed: Of stories, weights and order.
        progress: Called after each optimizer step with its number, from 1, and its loss.

    Raises:
        UserError: the cache folder cannot be written to.
    """
    folder = cached_base(size, seed=seed)
    if (folder / "config.json").is_file():
        return folder
    stories = make_stories(size.stories, seed)
    tokenizer = _train_tokenizer(stories, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(size)
    with one_thread():
        _train(model, _encode(stories, tokenizer), size, seed, progress)
    with quiet_libraries(), staged_folder(folder, overwrite=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return folder


def _train_tokenizer(stories: list[Story], size: BaseSize) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any text can be written
        show_progress=False,
    )
    bpe.train_from_iterator((story.prompt + story.continuation for story in stories), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=size.context
    )


def _new_model(size: BaseSize) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.hidden_size,
            intermediate_size=2 * size.hidden_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.context,
            initializer_range=0.06,  # the usual 0.02 is for wide models, and learns to copy names much later
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _encode(stories: list[Story], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """(prompt ids with BOS, continuation ids with EOS) of each story."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = tokenizer([story.prompt for story in stories])["input_ids"]
    continuations = tokenizer([story.continuation for story in stories])["input_ids"]
    return [([bos, *prompt], [*rest, eos]) for prompt, rest in zip(prompts, continuations, strict=True)]


def _train(
    model: LlamaForCausalLM,
    encoded: list[tuple[list[int], list[int]]],
    size: BaseSize,
    seed: int,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Next-token prediction of the continuations: how a story begins is always given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.99), weight_decay=0.1)
    model.train()
    for step, (input_ids, labels) in enumerate(_batches(encoded, size, seed), start=1):
        rate = size.learning_rate * min(step / 30, 1 - (step - 1) / size.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=input_ids, labels=labels).loss  # padding is on the right and has no labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step, loss.item())
    model.eval()


def _batches(
    encoded: list[tuple[list[int], list[int]]], size: BaseSize, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids, labels) of stories of similar length, in another order every epoch."""
    rng = random.Random(seed)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]) + len(encoded[index][1]))
    batches = [order[start : start + size.batch_size] for start in range(0, len(order), size.batch_size)]
    for _ in range(size.epochs):
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(encoded[index][0]) + len(encoded[index][1]) for index in batch)
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full((len(batch), width), -100)
            for row, index in enumerate(batch):
                prompt, rest = encoded[index]
                length = len(prompt) + len(rest)
                input_ids[row, :length] = torch.tensor(prompt + rest)
                labels[row, len(prompt) : length] = torch.tensor(rest)
            yield input_ids, labels


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small keep several waiting, the more so on a busy machine.

    The order of additions, and so the result, is then the same for any number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back, for a while, transformers' own progress bars and what PEFT says about transformers' names."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
