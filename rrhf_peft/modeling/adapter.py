"""Attach a LoRA adapter, a new one or one to train further, or make all weights trainable."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from rrhf_peft.modeling.base_model import quantized_modules
from rrhf_peft.modeling.sources import resolve_source, tensor_names
from rrhf_peft.recipe import takes_from_base
from rrhf_peft.records import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: What `adapter:` means where the recipe says nothing.
DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}

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

#: Initialisations that took from the base what cannot be worked out again from the base alone.
_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT adapter as read from its folder.

    Attributes:
        folder: Where it was read.
        config: Its LoraConfig.
        weights: Tensor name -> tensor on the CPU, names as PEFT saves them (`base_model.model...`).
    """

    folder: Path
    config: LoraConfig
    weights: dict[str, torch.Tensor]


def read_adapter(name: str | os.PathLike[str]) -> AdapterFiles:
    """Read a LoRA adapter from a folder or hub id.

    Raises:
        UserError: not an adapter folder; another PEFT method; weights missing, pickled, truncated,
            empty or not finite. Names the file.
    """
    folder = Path(resolve_source(name, required=(CONFIG_FILE,), what="adapter", weights=[WEIGHTS_FILE]))
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder / 'adapter_model.bin'}: pickled weights can hide code and are not opened. Save the adapter "
                "as safetensors first."
            )
        raise UserError(f"{path}: the adapter's weights are missing. Copy or download the whole folder.")
    if not tensor_names(path):
        raise UserError(f"{path}: this file holds no tensors. The adapter was saved empty; save it again.")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{path}: the adapter's weights cannot be read ({_first_line(error)}).") from error
    for key, tensor in weights.items():
        if tensor.numel() == 0:
            raise UserError(
                f"{path}: '{key}' has size zero. A sharded run saved the adapter without gathering it; save it again."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: '{key}' holds values that are not finite. Take an earlier checkpoint.")
    return AdapterFiles(folder, config, weights)


def _read_config(path: Path) -> LoraConfig:
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
        config = PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:  # PEFT checks few of its fields, and fails on the others in many ways
        raise UserError(
            f"{path}: not a usable adapter configuration ({_first_line(error)}). Copy the adapter again."
        ) from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: this is a {kind} adapter; only LORA and its variants are supported.")
    return config


def attach_adapter(
    model: PreTrainedModel,
    adapter: Mapping[str, Any] | None,
    *,
    init_adapter: str | os.PathLike[str] | None = None,
) -> PreTrainedModel | PeftModel:
    """Make `model` trainable, through an adapter or as a whole.

    All trained weights are float32 whatever the base's dtype: in bfloat16 an update of a thousandth of a weight is
    lost. In a multimodal model only the language model is trained. Unset fields are `DEFAULTS`; dropout is 0 among
    them because RRHF compares the log-probs of a group's responses with each other, and under dropout each is
    measured through a different random network, which flips the order of responses that lie close together.

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
        model.requires_grad_(True)
        for name in _beside_the_language_model(model):
            model.get_submodule(name).requires_grad_(False)
        model.float()
        return model
    _refuse_changing_base(model, adapter.get("init_lora_weights"), "adapter")
    config = lora_config(adapter)
    if config.use_dora and any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules()):
        raise UserError(
            "adapter.use_dora: DoRA divides by the norm of the weights, and int8 layers round what they multiply, so "
            "that what is trained cannot be merged. Set model.quantization: nf4 or none, or use_dora: false."
        )
    policy = _with_layers(model, config, "adapter")
    experts = next((name for name, module in policy.named_modules() if _trains_experts(module)), None)
    if experts is not None:
        raise UserError(
            f"adapter: '{experts.removeprefix('base_model.model.')}' holds the experts of a mixture, whose adapters "
            "cannot be merged into the base afterwards. Set adapter.target_modules to the linear layers of attention, "
            "for example [q_proj, k_proj, v_proj, o_proj]."
        )
    return policy


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
    if str(files.config.init_lora_weights).lower().startswith(_NOT_REPEATABLE):
        raise UserError(
            f"{files.folder}: this adapter was initialised by {files.config.init_lora_weights}, which changed the base "
            "weights in a way that cannot be repeated here. Save it converted to plain LoRA (PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion)."
        )
    peft_model = _with_layers(model, files.config, str(files.folder))
    load_adapter_weights(peft_model, files)
    return peft_model


def _with_layers(model: PreTrainedModel, config: LoraConfig, where: str) -> PeftModel:
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
    if config.use_bdlora and quantized_modules(model):
        raise UserError(f"{where}: PEFT ignores use_bdlora on quantised layers. Remove it or the quantisation.")
    beside = _beside_the_language_model(model)
    if beside:
        config.exclude_modules = _also_excluding(config.exclude_modules, beside)
    try:
        with _quiet():
            peft_model = get_peft_model(model, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what PEFT says of fields that do not go together has no type of its own
        raise UserError(
            f"{where}: PEFT cannot make this adapter ({_first_line(error)}). Linear layers of this model: "
            f"{', '.join(linear)}."
        ) from error
    _refuse_unmatched(peft_model, config, where, linear)
    _hold_in_float32(peft_model, where)
    return peft_model


def _trains_experts(module: nn.Module) -> bool:
    """Whether a layer of the adapter changes the stacked weights [expert, ...] of a mixture."""
    saved = module.modules_to_save.parameters() if isinstance(module, ModulesToSaveWrapper) else ()
    return isinstance(module, ParamWrapper) or any(weight.ndim == 3 for weight in saved)


def _beside_the_language_model(model: PreTrainedModel) -> list[str]:
    """Modules of a multimodal model that text never passes: vision and audio towers, projectors."""
    if model.config.get_text_config() is model.config:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    language_model, head = names[id(model.get_decoder())], names.get(id(model.get_output_embeddings()))
    on_the_way = {language_model.rsplit(".", depth)[0] for depth in range(language_model.count(".") + 1)} | {""}
    return [
        name
        for name in names.values()
        if name not in on_the_way and name.rpartition(".")[0] in on_the_way - {language_model} and name != head
    ]


def _also_excluding(excluded: list[str] | str | None, beside: list[str]) -> str:
    """PEFT's `exclude_modules` as one pattern, with these modules and all below them in it."""
    patterns = [rf"(?:{'|'.join(map(re.escape, beside))})(?:\..*)?"]
    if isinstance(excluded, str):
        patterns.append(excluded)
    elif excluded:
        patterns.append(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})")
    patterns = list(dict.fromkeys(patterns))
    return patterns[0] if len(patterns) == 1 else "|".join(f"(?:{pattern})" for pattern in patterns)


def _hold_in_float32(model: PeftModel, where: str) -> None:
    """Trained copies of whole modules (`modules_to_save`) in float32, between layers of another type.

    Raises:
        UserError: a bias of a 16-bit layer is trained, which cannot have another type than its layer.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copied in module.modules_to_save.values():
                kind = next((weight.dtype for weight in copied.parameters() if weight.is_floating_point()), None)
                if kind in (torch.bfloat16, torch.float16):
                    copied.float()
                    copied.register_forward_pre_hook(_to_float32)
                    if isinstance(copied, nn.Embedding):
                        copied.register_forward_hook(functools.partial(_from_float32, dtype=kind))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            raise UserError(
                f"{where}: '{name}' would be trained in {str(parameter.dtype).removeprefix('torch.')}, where small "
                "updates are lost. Set model.dtype: float32, or do not train it (adapter.bias: none)."
            )


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)


def _from_float32(module: nn.Module, inputs: Any, output: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    return output.to(dtype)


def _refuse_changing_base(model: PreTrainedModel, init: object, where: str) -> None:
    name = str(init).lower()
    if takes_from_base(name) and quantized_modules(model):
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


def load_adapter_weights(model: PeftModel, files: AdapterFiles) -> None:
    """Put an adapter's weights into the layers that its configuration made in `model`.

    Raises:
        UserError: tensors are missing, left over, or of other shapes: it belongs to another base model.
    """
    base = files.config.base_model_name_or_path
    where = f"{files.folder}: this adapter was trained on {base or 'another model'} and does not fit the base model"
    remedy = "Name the base model that it was trained on."
    try:
        result: Any = set_peft_model_state_dict(model, files.weights)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{where} ({lines[min(1, len(lines) - 1)].rstrip('.')}). {remedy}") from None
    if result.unexpected_keys:
        raise UserError(
            f"{where}: there is no place for {_some(result.unexpected_keys)} of {files.folder / WEIGHTS_FILE}. {remedy}"
        )
    missing = _missing(model, set(result.missing_keys))
    if missing:
        raise UserError(f"{where}: {files.folder / WEIGHTS_FILE} lacks {_some(missing)}. {remedy}")


def _missing(model: PeftModel, keys: set[str]) -> list[str]:
    """Those of the keys that an adapter should have brought: base weights and tied doubles are not among them."""
    markers = (".lora_", ".modules_to_save.", ".trainable_tokens_delta")
    state = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for key, tensor in state.items() if key not in keys}
    return sorted(
        key
        for key in keys
        if any(marker in key for marker in markers) and ".base_layer." not in key and id(state[key]) not in loaded
    )


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


class _quiet(warnings.catch_warnings):  # noqa: N801 - reads as a context manager
    """Hold back what PEFT says about names that transformers deprecates, which no user can act on."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
