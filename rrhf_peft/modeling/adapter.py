"""Attach a LoRA adapter, a new one or one to train further, or make all weights trainable."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rrhf_peft.modeling.adapter_files import AdapterFiles, load_adapter_weights, read_adapter
from rrhf_peft.modeling.quantization import quantized_modules
from rrhf_peft.records import UserError

#: What `adapter:` means where the recipe says nothing.
DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}

#: Initialisations that change the base weights, which quantised weights cannot take.
_CHANGES_BASE = ("pissa", "olora", "loftq")

#: Settings that would not do here what their name says, and why.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA switches on in mid-sequence, which the training engine does not follow",
    "arrow_config": "Arrow routes between finished adapters and has nothing to train here",
    "monteclora_config": "MonteCLoRA samples its weights, so that no two responses would be scored by the same model",
    "use_qalora": "QA-LoRA needs GPTQ layers, which are not loaded here",
    "kasa_config": "KaSA needs penalty terms that the training loop does not add",
    "eva_config": "EVA needs a pass over the data before training, which is not made here",
    "corda_config": "CorDA needs a pass over the data before training, which is not made here",
    "lora_ga_config": "LoRA-GA needs gradients from before training, which are not made here",
}
_REFUSED_INITS = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}


def attach_adapter(
    model: PreTrainedModel,
    adapter: Mapping[str, Any] | None,
    *,
    init_adapter: str | os.PathLike[str] | None = None,
) -> PreTrainedModel | PeftModel:
    """Make `model` trainable, through an adapter or as a whole.

    Adapter weights are float32 whatever the base's dtype: in bfloat16 an update of a thousandth of a
    weight is lost. Unset fields are `DEFAULTS`; dropout is 0 among them because RRHF compares the
    log-probs of a group's responses with each other, and under dropout each is measured through a
    different random network, which flips the order of responses that lie close together.

    Args:
        model: As `load_base_model` returns it.
        adapter: `peft.LoraConfig` fields. None with no `init_adapter` makes all weights trainable.
        init_adapter: Folder or hub id of an adapter to train further; brings its own settings.

    Returns:
        The PeftModel, or `model` itself when all of its weights are trained.

    Raises:
        UserError: impossible fields, target modules that match nothing, an adapter of another base or
            a damaged one, or quantised weights that were to be trained.
    """
    if init_adapter is not None:
        return _attach_existing(model, init_adapter)
    if adapter is None:
        if quantized_modules(model):
            raise UserError(
                "adapter: null trains all weights, but quantised ones cannot. Set model.quantization: none."
            )
        return model.requires_grad_(True)
    _refuse_changing_base(model, adapter.get("init_lora_weights"), "adapter")
    return _with_layers(model, lora_config(adapter), "adapter")


def lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig for a recipe's `adapter:` section, defaults filled in.

    Raises:
        UserError: unknown fields or impossible values.
    """
    values = {**DEFAULTS, **{key: value for key, value in fields.items() if value is not None}}
    if values.get("target_parameters") and "target_modules" not in fields:
        del values["target_modules"]
    for key, reason in _REFUSED.items():
        if values.get(key):
            raise UserError(f"adapter.{key}: not available: {reason}. Remove it.")
    init = values.get("init_lora_weights")
    if isinstance(init, str):
        if init in _REFUSED_INITS:
            raise UserError(f"adapter.init_lora_weights: {_REFUSED[_REFUSED_INITS[init]]}. Use true or pissa.")
        if init.startswith("pissa_niter"):
            raise UserError(
                f"adapter.init_lora_weights: {init} draws a random decomposition that cannot be repeated when the "
                "adapter is loaded or merged. Use pissa."
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(values[key], (int, float)) or values[key] <= 0:
            raise UserError(f"adapter.{key}: must be above zero, not {values[key]!r}.")
    try:
        with _quiet():
            return LoraConfig(task_type="CAUSAL_LM", **values)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"adapter: {_first_line(error)}.") from None


def _attach_existing(model: PreTrainedModel, name: str | os.PathLike[str]) -> PeftModel:
    files = read_adapter(name)
    trained_on, here = files.config.base_model_name_or_path, getattr(model, "name_or_path", "")
    if trained_on and here and Path(trained_on).name.lower() != Path(here).name.lower():
        raise UserError(
            f"{files.folder}: this adapter was trained on {trained_on}, and the base model is {here}. Name that base "
            "model; if it is the same one at another place, set base_model_name_or_path in adapter_config.json."
        )
    return attach_adapter_files(model, files)


def attach_adapter_files(model: PreTrainedModel, files: AdapterFiles) -> PeftModel:
    """Attach an adapter that was read already, whatever base model it names.

    Raises:
        UserError: it does not fit `model`.
    """
    files.config.inference_mode = False
    _refuse_changing_base(model, files.config.init_lora_weights, str(files.folder))
    peft_model = _with_layers(model, files.config, str(files.folder))
    load_adapter_weights(peft_model, files)
    return peft_model


def _with_layers(model: PreTrainedModel, config: LoraConfig, where: str) -> PeftModel:
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
    if config.use_bdlora and quantized_modules(model):
        raise UserError(f"{where}: PEFT ignores use_bdlora on quantised layers. Remove it or the quantisation.")
    try:
        with _quiet():
            peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, AssertionError, ImportError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where}: PEFT cannot make this adapter ({_first_line(error)}). Linear layers of this model: "
            f"{', '.join(linear)}."
        ) from None
    _refuse_unmatched(peft_model, config, where, linear)
    return peft_model


def _refuse_changing_base(model: PreTrainedModel, init: object, where: str) -> None:
    name = str(init).lower()
    if name.startswith(_CHANGES_BASE) and quantized_modules(model):
        raise UserError(
            f"{where}: init_lora_weights {name} takes a part out of the base weights, and quantised ones cannot give "
            "it. Set model.quantization: none, or init_lora_weights: true."
        )
    if name == "loftq" and not torch.cuda.is_available():
        raise UserError(f"{where}: PEFT computes init_lora_weights loftq on a GPU only. Use pissa, or a GPU.")


def _refuse_unmatched(model: PeftModel, config: LoraConfig, where: str, linear: list[str]) -> None:
    """PEFT is content when one of several names matches; a misspelt second one would silently not train."""
    modules = [name for name, _ in model.get_base_model().named_modules()]
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(config, key)
        for name in wanted if isinstance(wanted, (set, list)) else []:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise UserError(f"{where}: {key} '{name}' matches no module. Linear layers: {', '.join(linear)}.")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class _quiet(warnings.catch_warnings):  # noqa: N801 - reads as a context manager
    """Hold back what PEFT says about names that transformers deprecates, which no user can act on."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
