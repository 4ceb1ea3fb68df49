"""Reward model folders made in tests: one that learnt sentiment from SST-2, and untrained ones of several kinds."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTJConfig,
    GPTJModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


def sst2(folder: Path, split: str) -> tuple[list[str], list[int]]:
    """Sentences and labels (1 is positive)."""
    with (folder / "sentiment" / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [row for row in rows if row[1].strip() in ("0", "1")]
    return [row[0] for row in rows], [int(row[1]) for row in rows]


def word_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Lower-case words, [CLS] text [SEP], pairs as BERT has them."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in text.lower().split():
            counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def train_sentiment_model(shared: Path, folder: Path, *, epochs: int) -> float:
    """Train a one-layer BERT on SST-2 from nothing, save it, and return its accuracy on the dev set."""
    torch.manual_seed(0)
    texts, labels = sst2(shared, "train")
    tokenizer = word_tokenizer(texts, 6000)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=0.2,
        num_labels=2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    encoded = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(texts), generator=generator).split(64):
            rows = [encoded[index] for index in batch.tolist()]
            loss = model(**_padded(rows), labels=torch.tensor([labels[index] for index in batch.tolist()])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts, labels = sst2(shared, "dev")
    rows = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
    with torch.no_grad():
        chosen = torch.cat([model(**_padded(rows[i : i + 128])).logits.argmax(1) for i in range(0, len(rows), 128)])
    return float((chosen == torch.tensor(labels)).double().mean())


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def llama_classifier(folder: Path, tokenizer_from: Path, *, labels: int = 1, pad: int | None = None) -> None:
    """An untrained Llama sequence classifier with the byte tokenizer of `tokenizer_from`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_from)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        num_labels=labels,
        pad_token_id=pad,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def value_head_state(tokenizer_from: Path) -> tuple[GPTJConfig, GPTJModel, dict[str, torch.Tensor]]:
    """A GPT-J in miniature, and its weights as gptj-rm-static keeps them: with the copy of the whole model."""
    torch.manual_seed(2)
    config = GPTJConfig(
        vocab_size=len(PreTrainedTokenizerFast.from_pretrained(tokenizer_from)),
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    backbone = GPTJModel(config).eval()
    state = {f"transformer.{key}": value.clone() for key, value in backbone.state_dict().items()}
    for layer in range(2):  # buffers of older versions
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    state["model.lm_head.weight"] = torch.randn(4, 4)
    state["v_head.weight"] = torch.randn(1, 32)
    return config, backbone, state
