"""A recipe's `model:` section becomes a policy and its tokenizer, made ready for training and seen to be trained.

Does not call PEFT's `prepare_model_for_kbit_training`: that casts embeddings, head and norms to float32.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, Literal

import torch
from jinja2 import TemplateSyntaxError
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from rrhf_peft.modeling.adapter import attach_adapter
from rrhf_peft.modeling.base_model import load_base_model
from rrhf_peft.modeling.sources import resolve_source
from rrhf_peft.recipe import ModelSection
from rrhf_peft.records import UserError


def tokenizer_of(section: ModelSection, template: str = "raw") -> Any:
    """The tokenizer of a `model:` section: the one that it names, or the model's own.

    Raises:
        UserError: see `load_tokenizer`; `template` is ``chat``, and the chat template does not parse.
    """
    name = section.tokenizer or section.name
    tokenizer = load_tokenizer(
        name,
        revision=section.revision if section.tokenizer is None else None,
        trust_remote_code=section.trust_remote_code,
    )
    if template == "chat" and tokenizer.chat_template:
        try:
            _compile_jinja_template(tokenizer.get_chat_template())  # with the tags that transformers adds to Jinja's
        except TemplateSyntaxError as error:
            raise UserError(
                f"{name}: the tokenizer's chat template does not parse (its line {error.lineno}: {error.message}). "
                "Fix chat_template.jinja or tokenizer_config.json, or download it again."
            ) from None
    return tokenizer


def base_of(section: ModelSection, tokenizer: Any = None, *, device: torch.device | None = None) -> Any:
    """The base model of a `model:` section, in evaluation mode.

    Args:
        section: The section.
        tokenizer: What `tokenizer_of` gave; it must not know tokens that the model has no embedding for.
        device: Where to put it; by default this process's GPU, or the CPU.

    Raises:
        UserError: see `load_base_model` and `refuse_unknown_tokens`.
    """
    model: Any = load_base_model(
        section.name,
        revision=section.revision,
        dtype=section.dtype,
        quantization=section.quantization,
        double_quant=section.double_quant,
        attention=section.attention,
        trust_remote_code=section.trust_remote_code,
        allow_pickle=section.allow_pickle,
        device=device,
    )
    if tokenizer is not None:
        rows = model.get_input_embeddings().num_embeddings
        refuse_unknown_tokens(tokenizer, rows, section.tokenizer or section.name)
    return model


def load_policy(
    section: ModelSection, *, adapter: str | None = None, device: torch.device | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer of a `model:` section for sampling and scoring: frozen, in evaluation mode.

    Args:
        section: The section; its `init_adapter` is attached unless `adapter` names another one.
        adapter: Folder or hub id of the adapter on it.
        device: See `base_of`.

    Returns:
        The model with its adapter, and the tokenizer.

    Raises:
        UserError: anything missing or damaged, or that does not belong together.
    """
    tokenizer = tokenizer_of(section)
    model = base_of(section, tokenizer, device=device)
    adapter = adapter or section.init_adapter
    if adapter is not None:
        model = attach_adapter(model, None, init_adapter=adapter)
    return model.eval().requires_grad_(False), tokenizer


def refuse_beyond_context(config: PretrainedConfig, tokens: int, key: str, name: str) -> None:
    """Make sure that a model can read as many tokens as a setting lets through.

    Args:
        config: The model's configuration.
        tokens: The setting's value.
        key: The setting, for the message.
        name: The model, for the message.

    Raises:
        UserError: it cannot.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise UserError(
            f"{key}: {tokens} is more than {name} can read ({context} tokens). Set it to {context} or less."
        )


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model below a PEFT wrapper, its adapter layers in place; itself when there is none."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel), type(inner)
    return inner


#: With `engine.gradient_checkpointing: auto`, models above this many parameters are checkpointed.
CHECKPOINTED_ABOVE = 1_000_000_000


def uses_checkpointing(setting: Literal["auto"] | bool, parameters: int) -> bool:
    """Whether a base model of so many parameters is trained with gradient checkpointing."""
    return parameters > CHECKPOINTED_ABOVE if setting == "auto" else setting


def prepare_for_training(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Set training mode, no key-value cache, and non-reentrant checkpointing where asked.

    With checkpointing transformers also makes the embedding's output require a gradient: below a frozen
    embedding the checkpointed layers would otherwise have none to recompute.

    Raises:
        UserError: nothing is trainable, or the model cannot be checkpointed.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("no weight of this model is trainable. Give an adapter, or `adapter: null` for all weights.")
    language_model = causal_lm(model)
    language_model.config.use_cache = False
    if gradient_checkpointing:
        if not language_model.supports_gradient_checkpointing:
            name = type(language_model).__name__
            raise UserError(f"engine.gradient_checkpointing: {name} does not support it. Set it to false.")
        # Newer transformers call it activation_..., and warn when it is called by its old name.
        old = language_model.gradient_checkpointing_enable
        enable = getattr(language_model, "activation_checkpointing_enable", old)
        enable({"use_reentrant": False})
    model.train()


@torch.no_grad()
def check_gradients(model: nn.Module) -> None:
    """After the first backward pass, make sure that it reached the trainable weights and is finite.

    LoRA starts with B = 0, so A's gradients are exactly zero in the first step: one non-zero gradient
    anywhere is enough. Sharded gradients (FSDP) are judged by this process's part, and all processes
    together; call it on every process. DeepSpeed keeps gradients to itself: do not call it there.

    Raises:
        UserError: no gradient at all, only zeros, or a value that is not finite; names the parameter.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    largest: list[tuple[str, torch.Tensor]] = []
    for name, parameter in trainable:
        if parameter.grad is not None:
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            if gradient.numel():
                largest.append((name, gradient.detach().abs().max().float()))
    values = [value.item() for _, value in largest]
    broken = [name for (name, _), value in zip(largest, values, strict=True) if not math.isfinite(value)]
    device = trainable[0][1].device if trainable else torch.device("cpu")
    any_broken, any_nonzero = _on_any_process([bool(broken), any(values)], device)
    if any_broken:
        name = f"'{broken[0]}'" if broken else "a parameter on another process"
        raise UserError(
            f"the gradient of {name} is not finite in the first step ({len(broken)} of {len(trainable)} trainable "
            "tensors here). Use bfloat16 or float32 instead of float16, or look for broken data."
        )
    if not any_nonzero:
        names = ", ".join(f"'{name}'" for name, _ in trainable[:2]) or "there are none"
        problem = "are all zero" if largest else "are missing"
        raise UserError(
            f"the first step trains nothing: the gradients of all {len(trainable)} trainable tensors ({names} ...) "
            f"{problem}. Check that the adapter's target modules lie on the model's path, and that the data holds "
            "ordered pairs."
        )


def _on_any_process(here: list[bool], device: torch.device) -> list[bool]:
    """Each of these facts, true when it is true on some process: all of them then raise, and none waits."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return here
    flags = torch.tensor(here, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


# ---- Tokenizers ----

_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")

#: Added tokens that a vocabulary keeps for padding, then those it keeps for nothing in particular.
_RESERVED = (re.compile(r"(^|[^a-z])pad([^a-z]|$)", re.I), re.compile(r"reserved|unused|extra_id|placeholder", re.I))


def load_tokenizer(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a padding token that it already has.

    Without one of its own, padding becomes an added token reserved for it, else a reserved token
    without a use, else the unknown token, else EOS. Masks come from lengths, so any of them is right.

    Raises:
        UserError: no such tokenizer, damaged files, or no token that could end a sequence.
    """
    source = resolve_source(name, revision=revision, required=_FILES, what="tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        # tokenizers raises bare Exceptions for damaged files.
        text = str(error)
        if "trust_remote_code" in text:
            remedy = "Read the code that comes with it, then set model.trust_remote_code: true if you trust it."
        elif "sentencepiece" in text or "tiktoken" in text:
            remedy = "Its tokenizer.json is missing: download it, or pip install 'rrhf-peft[sentencepiece]' to convert."
        else:
            remedy = "Download its tokenizer files again."
        first = next((line.strip().rstrip(".:") for line in text.splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: the tokenizer cannot be loaded ({first[:500]}). {remedy}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source}: the tokenizer names no end-of-sequence token, so no response could end. Set eos_token in "
            "its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        size = len(tokenizer)
        tokenizer.pad_token = _padding_token(tokenizer)
        assert len(tokenizer) == size, "padding must not grow the vocabulary"
    return tokenizer


def refuse_unknown_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """Make sure that the model has an embedding for every token that the tokenizer can give.

    Special tokens that no text becomes do not count: some language models leave out the pictures' token of the
    multimodal model that they share a tokenizer with.

    Args:
        tokenizer: The tokenizer.
        rows: Tokens that the model has embeddings for.
        where: What the error message names.

    Raises:
        UserError: there are ids from `rows` on.
    """
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template
    rendered = "".join(template.values()) if isinstance(template, dict) else template or ""
    added = tokenizer.added_tokens_decoder
    used = [
        index
        for index, token in sorted(beyond.items())
        if index in named or token in rendered or index not in added or not added[index].special
    ]
    if used:
        raise UserError(
            f"{where}: the tokenizer knows token ids up to {used[-1]} ({beyond[used[-1]]!r}), and the model has {rows} "
            "embeddings. Name the model's own tokenizer, or save the model with its vocabulary resized "
            "(resize_token_embeddings) and use that."
        )


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    added = [str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items()) if index not in used]
    for pattern in _RESERVED:
        for token in added:
            if pattern.search(token):
                return token
    return str(tokenizer.unk_token or tokenizer.eos_token)
