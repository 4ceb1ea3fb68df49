"""Reward models: prompt and response in, one reward out, the same alone as in a batch.

Two layouts. `sequence_classification` is transformers' own: one logit is the reward; of several, one label's
log-odds or an expected value. `value_head` is the layout of Dahoas/gptj-rm-static
(https://huggingface.co/Dahoas/gptj-rm-static), which the RRHF paper scores with: a backbone under `transformer.`
and a `v_head`. The rules that its scores are published with: the text ends with one EOS, is cut on the left to 1024
tokens, and the reward is `v_head` (linear, no bias) of the hidden state at that EOS. Checkpoints hold the backbone a
second time under `model.`, with its LM head; that copy is not read.

Whatever type the backbone computes in, heads compute in float32: bfloat16 has 8 bits for a number, so rewards
between 8 and 16 would be multiples of 1/16, which ties responses and turns pairs around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.initialization import no_init_weights

from rrhf_peft.data import TEMPLATES, chat_messages, conversation_ids
from rrhf_peft.modeling import TokenBudget, checkpoint_tensors, default_device, resolve_dtype, resolve_source
from rrhf_peft.records import LARGEST_SCORE, Message, RankedGroup, UserError
from rrhf_peft.score.combine import GroupScores

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe
    from rrhf_peft.recipe.stages import RewardModelScorer


class RewardModelScores:
    """A reward model over candidates."""

    def __init__(self, section: RewardModelScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        value_head = section.layout == "value_head"
        device = default_device()
        options: dict[str, Any] = {
            "revision": section.revision,
            "dtype": resolve_dtype(section.dtype, device),
            "device": device,
            "trust_remote_code": section.trust_remote_code,
        }
        if value_head:
            model: Any = load_value_head_model(section.model, base=section.base, **options)
        else:
            model = load_sequence_classifier(section.model, allow_pickle=section.allow_pickle, **options)
        tokenizer = section.tokenizer or (section.base if value_head and section.base else section.model)
        self.texts = RewardTexts(
            load_reward_tokenizer(
                tokenizer,
                revision=section.revision if tokenizer == section.model else None,
                trust_remote_code=section.trust_remote_code,
            ),
            template=section.template,
            append_eos=section.append_eos if section.append_eos is not None else value_head,
            max_tokens=section.max_tokens,
            config=model.config,
        )
        label = None if value_head else label_index(model, section.label, section.values, section.model)
        self.model = RewardModel(model, label=label, values=section.values, batch_tokens=section.batch_tokens)

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """Rewards; every response gets one. Texts that lost their beginning are counted."""
        rows, truncated = [], []
        for group in groups:
            before = self.texts.truncated
            rows += [self.texts.row(group.prompt, response) for response in group.responses]
            truncated.append(self.texts.truncated - before)
        scores = iter(self.model.score(rows))
        return [
            GroupScores([next(scores) for _ in group.responses], counts={"truncated_texts": count})
            for group, count in zip(groups, truncated, strict=True)
        ]


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
            if not abs(score) <= LARGEST_SCORE:  # NaN compares false
                raise UserError(
                    f"the reward model computes {score} for a text of {len(row.ids)} tokens. Its weights are damaged "
                    "or its type overflows: set scoring.scorer.dtype: float32 or bfloat16."
                )
        return scores

    @torch.inference_mode()
    def _batch(self, rows: list[TokenRow]) -> list[float]:
        config = self.model.config.get_text_config()
        its_pad = config.pad_token_id
        pad = its_pad if its_pad is not None and its_pad >= 0 else _unused_id(rows, config.vocab_size)
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
                config.pad_token_id = its_pad
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


# ---- loading ----


def load_sequence_classifier(
    name: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """Load a sequence classifier with every one of its weights; its head computes in float32.

    Raises:
        UserError: it cannot be loaded, its weights are pickled and that was not asked for, or the checkpoint lacks
            weights (a causal LM has no score head); names them.
    """
    patterns = ["model*.safetensors", *(["pytorch_model*.bin"] if allow_pickle else [])]
    source = Path(resolve_source(name, revision=revision, what="reward model", weights=patterns))
    pickled = [path.name for path in source.glob("*.bin") if not any(source.glob("*.safetensors*"))]
    if pickled and not allow_pickle:
        raise UserError(
            f"{source}: the weights are pickled ({pickled[0]}), which can hide code. Convert them to safetensors, or, "
            "if you trust where they come from, set scoring.scorer.allow_pickle: true."
        )
    if not pickled:
        checkpoint_tensors(source)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            use_safetensors=not pickled,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            device_map={"": device},
        )
    except torch.OutOfMemoryError:
        raise UserError(f"{name}: the reward model does not fit into the memory of {device} as {dtype}.") from None
    except Exception as error:  # a configuration that does not fit together fails in every way there is
        raise UserError(
            f"{name}: cannot be loaded as a reward model ({_first_line(error)}). Name a sequence classification "
            "checkpoint, or set scoring.scorer.layout: value_head."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        unexpected = sorted(report["unexpected_keys"])
        raise UserError(
            f"{name}: the checkpoint lacks {len(missing)} of the reward model's weights, which would be random: "
            f"{_listed(missing)}{f' (it has {_listed(unexpected)} instead)' if unexpected else ''}. Name a checkpoint "
            "that was trained and saved with its score head; of a value-head checkpoint set scoring.scorer.layout: "
            "value_head."
        )
    for part in model.children():
        if part is not model.base_model:
            _compute_in_float32(part)
    return model.eval().requires_grad_(False)


def _compute_in_float32(head: nn.Module) -> None:
    """Let a part of a model take and give float32; what is not a number (masks, ids) goes in as it is."""

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    head.float().register_forward_pre_hook(
        lambda _, positional, named: (
            tuple(widened(value) for value in positional),
            {name: widened(value) for name, value in named.items()},
        ),
        with_kwargs=True,
    )


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


#: Where such a checkpoint keeps its weights, the safe format first.
WEIGHT_FILES = ("model.safetensors", "hf_ckpt.pt", "pytorch_model.bin")

#: Constants that older transformers saved among the weights; the architecture has them built in.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


class ValueHeadModel(nn.Module):
    """A backbone of any type, and a linear value head without bias in float32.

    Args:
        backbone: transformers' headless model.
        hidden_size: of its hidden states.
    """

    def __init__(self, backbone: Any, hidden_size: int) -> None:
        super().__init__()
        self.transformer = backbone
        self.v_head = nn.Linear(hidden_size, 1, bias=False)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.transformer.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.v_head.weight.device

    def forward(self, lengths: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Rewards [batch, 1] at the last token of each row, `lengths` [batch]; padding is on the right."""
        hidden = self.transformer(**inputs)[0]
        return self.v_head(hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1].float())


def load_value_head_model(
    name: str,
    *,
    base: str | None,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> ValueHeadModel:
    """Load such a checkpoint with every one of its weights.

    Args:
        name: Folder, weight file or hub id.
        base: Where config.json is, when not in that folder (EleutherAI/gpt-j-6B for gptj-rm-static).

    Raises:
        UserError: no such weights, a pickle that holds more than tensors, or missing weights; names them.
    """
    file = _weight_file(name, revision)
    config = _config(base or (str(file.parent) if (file.parent / "config.json").is_file() else None), name, base)
    state = _state(file)
    try:
        with no_init_weights():
            backbone = AutoModel.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            model = ValueHeadModel(backbone.to(dtype), config.get_text_config().hidden_size)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file}: its weights do not fit the architecture of {base or file.parent} "
            f"({' '.join(str(error).split())[:300]}). Name the model that it was trained from as scoring.scorer.base."
        ) from None
    if missing or unexpected:
        problems = [
            f"{label} {len(keys)} ({', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''})"
            for label, keys in (("lacks", missing), ("has unknown", unexpected))
            if keys
        ]
        raise UserError(
            f"{file}: is not a whole value-head checkpoint: it {' and '.join(problems)}. Expected are transformer.* "
            "and v_head.weight; what is missing would be random. Check scoring.scorer.base and the file."
        )
    return model.eval().requires_grad_(False).to(device)


def _weight_file(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise UserError(f"{name}: there is no such value-head checkpoint, neither file nor folder. Check the path.")
        try:
            path = Path(snapshot_download(name, revision=revision, allow_patterns=[*WEIGHT_FILES, "*.json", "*.txt"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"{name}: there is no such folder here, and the hub does not give it ({_first_line(error)}). "
                "Check the name and the network."
            ) from None
    for file in WEIGHT_FILES:
        if (path / file).is_file():
            return path / file
    raise UserError(f"{path}: holds none of {', '.join(WEIGHT_FILES)}, so it is no value-head checkpoint.")


def _config(source: str | None, name: str, base: str | None) -> Any:
    if source is None:
        raise UserError(
            f"{name}: has no config.json beside its weights. Name the model that it was trained from as "
            "scoring.scorer.base (EleutherAI/gpt-j-6B for gptj-rm-static)."
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        key = "scoring.scorer.base" if base else name
        raise UserError(f"{key}: {source} has no usable config.json ({_first_line(error)}).") from None
    return config


def _state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of the reward model's own keys."""
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({_first_line(error)}). Download it again.") from None
    except Exception as error:  # pickle.UnpicklingError, or whatever a damaged pickle runs into
        raise UserError(
            f"{file}: is no plain file of tensors, and nothing else is unpickled here ({type(error).__name__}). "
            "Convert it to safetensors where you trust it."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: holds something else than a dictionary of tensors. Save the model's state_dict().")
    return {key: value for key, value in state.items() if not key.startswith("model.") and not key.endswith(_CONSTANTS)}


def _padded(rows: Sequence[Sequence[int]], width: int, filler: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)


def _unused_id(rows: Sequence[TokenRow], vocabulary: int) -> int:
    used = {token for row in rows for token in row.ids}
    return next(token for token in range(vocabulary) if token not in used)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---- texts ----

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt")


class RewardTexts:
    """Prompt and response as the token ids that a reward model reads; counts those that were cut.

    A text is tokenised as a whole, with whatever special tokens the tokenizer adds. Too long ones lose their
    beginning, because the response stands at the end.

    Args:
        tokenizer: the reward model's.
        template: raw, hh, alpaca, chat, pair (prompt and response as two texts) or response (alone).
        append_eos: end with the EOS token.
        max_tokens: longest row, where tokenizer and model do not ask for shorter ones.
        config: the model's.

    Raises:
        UserError: `append_eos` without an EOS token, or template chat without a chat template.
    """

    def __init__(self, tokenizer: Any, *, template: str, append_eos: bool, max_tokens: int, config: Any = None) -> None:
        self.tokenizer, self.template, self.append_eos = tokenizer, template, append_eos
        context = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
        limits = (max_tokens, int(tokenizer.model_max_length), context if isinstance(context, int) else max_tokens)
        self.max_tokens = min(limits)
        self.truncated = 0
        tokenizer.truncation_side = "left"
        if append_eos and tokenizer.eos_token_id is None:
            raise UserError("scoring.scorer.append_eos: the tokenizer has no EOS token. Name another in .tokenizer.")
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("scoring.scorer.template: the tokenizer has no chat template. Use raw, hh, alpaca or pair.")

    def row(self, prompt: str | list[Message], response: str) -> TokenRow:
        """The token row of one response; never longer than `max_tokens`."""
        if self.template == "chat":
            return self._finished(self._chat(prompt, response), None)
        if self.template == "response":
            texts = [response]
        elif self.template == "pair":
            texts = [TEMPLATES["raw"].prompt(prompt, self.tokenizer), response]
        else:
            form = TEMPLATES[self.template]
            texts = [form.prompt(prompt, self.tokenizer) + form.response(response)]
        # Nothing in these texts is meant as a special token, whatever a response spells.
        encoded = self.tokenizer(*texts, split_special_tokens=True, verbose=False)
        room = self.max_tokens - self.append_eos
        if len(encoded["input_ids"]) > room:
            self.truncated += 1
            encoded = self.tokenizer(
                *texts, split_special_tokens=True, verbose=False, truncation="longest_first", max_length=room
            )
        return self._finished(encoded["input_ids"], encoded.get("token_type_ids"))

    def _chat(self, prompt: str | list[Message], response: str) -> list[int]:
        try:
            ids = conversation_ids(chat_messages(prompt), response, self.tokenizer)
        except UserError as error:
            raise UserError(
                f"scoring.scorer.template: {error} A reward model also reads raw, hh, alpaca or pair."
            ) from None
        room = self.max_tokens - self.append_eos
        if len(ids) <= room:
            return ids
        self.truncated += 1
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return [*head, *ids[len(ids) - room + len(head) :]]

    def _finished(self, ids: list[int], types: list[int] | None) -> TokenRow:
        if not self.append_eos or (ids and ids[-1] == self.tokenizer.eos_token_id):
            return TokenRow(ids, types) if ids else self._empty()
        return TokenRow([*ids, self.tokenizer.eos_token_id], None if types is None else [*types, types[-1]])

    def _empty(self) -> TokenRow:
        """A text without any token still needs a position to be read at."""
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if start is None:
            raise UserError(
                "a text to score has no tokens, and the tokenizer no BOS or EOS to stand for it. Remove it."
            )
        return TokenRow([start])


def load_reward_tokenizer(name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a reward model; it needs neither EOS nor padding token.

    Raises:
        UserError: no such tokenizer, or damaged files.
    """
    source = resolve_source(name, revision=revision, required=_TOKENIZER_FILES, what="tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise UserError(
            f"{source}: the tokenizer cannot be loaded ({_first_line(error)}). Name one in scoring.scorer.tokenizer."
        ) from None
