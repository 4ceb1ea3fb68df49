"""Reward models: token ids in, one reward per text out, the same alone as in a batch.

Two layouts. `sequence_classification` is transformers' own: one logit is the reward; of several, one
label's log-odds or an expected value. `value_head` is the layout of Dahoas/gptj-rm-static
(https://huggingface.co/Dahoas/gptj-rm-static), which the RRHF paper scores with: see `value_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rrhf_peft.records import UserError
from rrhf_peft.score.batches import TokenBudget
from rrhf_peft.score.value_head import ValueHeadModel


@dataclass(frozen=True)
class TokenRow:
    """One text as a reward model reads it.

    Attributes:
        ids: token ids, special ones included.
        types: token type ids, where the tokenizer makes them.
    """

    ids: Sequence[int]
    types: Sequence[int] | None = None


class RewardModel:
    """Scores token rows.

    Args:
        model: sequence classifier, or `ValueHeadModel`; in evaluation mode on its device.
        label: index of the label whose log-odds are the reward.
        values: what each label is worth: the reward is the expectation under the model's softmax.
        batch_tokens: padded tokens per batch.
    """

    def __init__(
        self, model: Any, *, label: int | None = None, values: Sequence[float] | None = None, batch_tokens: int = 16384
    ) -> None:
        self.model, self.label = model, label
        self.values = None if values is None else torch.tensor(values, dtype=torch.float64)
        self.budget = TokenBudget(batch_tokens)

    def score(self, rows: Sequence[TokenRow]) -> list[float]:
        """Rewards in the order of `rows`, in float64 arithmetic after the model's logits.

        Raises:
            UserError: a reward is not finite, or a single row does not fit into memory.
        """
        scores = self.budget.map([len(row.ids) for row in rows], lambda batch: self._batch([rows[i] for i in batch]))
        for row, score in zip(rows, scores, strict=True):
            if score != score or score in (float("inf"), float("-inf")):
                raise UserError(
                    f"the reward model computes {score} for a text of {len(row.ids)} tokens. Its weights are damaged "
                    "or its type overflows: set scoring.scorer.dtype: float32 or bfloat16."
                )
        return scores

    @torch.inference_mode()
    def _batch(self, rows: list[TokenRow]) -> list[float]:
        config = self.model.config.get_text_config()
        own_pad = config.pad_token_id
        pad = own_pad if own_pad is not None and own_pad >= 0 else _unused_id(rows, config.vocab_size)
        device, width = self.model.device, max(len(row.ids) for row in rows)
        inputs = {
            "input_ids": _padded([row.ids for row in rows], width, pad, device),
            "attention_mask": _padded([[1] * len(row.ids) for row in rows], width, 0, device),
        }
        types = [row.types for row in rows if row.types is not None]
        if len(types) == len(rows):
            inputs["token_type_ids"] = _padded(types, width, 0, device)
        if isinstance(self.model, ValueHeadModel):
            logits = self.model(lengths=torch.tensor([len(row.ids) for row in rows], device=device), **inputs)
        else:
            # A model without a padding token reads its score at the last token. An id that no row holds
            # as padding makes it read there for every row of the batch.
            config.pad_token_id = pad
            try:
                logits = self.model(**inputs).logits
            finally:
                config.pad_token_id = own_pad
        return self._rewards(logits.double().cpu())

    def _rewards(self, logits: torch.Tensor) -> list[float]:
        """float64 [batch, labels] -> rewards."""
        if logits.shape[1] == 1:
            return logits[:, 0].tolist()
        if self.values is not None:
            return (logits.softmax(dim=1) @ self.values).tolist()
        assert self.label is not None
        others = torch.cat([logits[:, : self.label], logits[:, self.label + 1 :]], dim=1)
        return (logits[:, self.label] - others.logsumexp(dim=1)).tolist()


def load_sequence_classifier(
    name: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """Load a sequence classifier with every one of its weights.

    Raises:
        UserError: it cannot be loaded, or the checkpoint lacks weights (a causal LM has no score head);
            names them.
    """
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            device_map={"": device},
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{name}: cannot be loaded as a reward model ({_first_line(error)}). Name a sequence classification "
            "checkpoint, or set scoring.scorer.layout: value_head."
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:
        found = sorted(report["unexpected_keys"])
        raise UserError(
            f"{name}: the checkpoint lacks {len(missing)} of the reward model's weights, which would be random: "
            f"{_listed(missing)}{f' (it has {_listed(found)} instead)' if found else ''}. Name a checkpoint that was "
            "trained and saved with its score head; of a value-head checkpoint set scoring.scorer.layout: value_head."
        )
    return model.eval().requires_grad_(False)


def label_index(model: Any, label: int | str | None, values: Sequence[float] | None, name: str) -> int | None:
    """The index of the label that is the reward; None for one logit or an expected value.

    Raises:
        UserError: several labels and no choice among them, or an impossible one; names the labels.
    """
    names = {int(index): str(text) for index, text in model.config.id2label.items()}
    count = model.config.num_labels
    listed = ", ".join(f"{index} {names.get(index, '')!r}" for index in range(count))
    if count == 1:
        if label is not None or values is not None:
            raise UserError(
                f"{name}: has a single logit, which is the reward. Remove scoring.scorer.label and .values."
            )
        return None
    if values is not None:
        if len(values) != count:
            raise UserError(f"scoring.scorer.values: {len(values)} values for the {count} labels of {name}: {listed}.")
        return None
    if label is None:
        raise UserError(
            f"{name}: has {count} labels ({listed}). Say which is the reward with scoring.scorer.label, or what each "
            "is worth with scoring.scorer.values."
        )
    index = next((i for i, text in names.items() if text == label), label)
    if not isinstance(index, int) or not 0 <= index < count:
        raise UserError(f"scoring.scorer.label: {name} has no label {label!r}. Its labels: {listed}.")
    return index


def _padded(rows: Sequence[Sequence[int]], width: int, filler: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)


def _unused_id(rows: Sequence[TokenRow], vocabulary: int) -> int:
    used = {token for row in rows for token in row.ids}
    return next(token for token in range(vocabulary) if token not in used)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
