"""What an adapter does to each base parameter, computed by PEFT's own layers, one layer at a time.

The base model is there in outline only (meta device). To merge a layer, its base weight is put in
place, PEFT merges, and the weight is taken out again. So every variant that PEFT can merge (rsLoRA,
DoRA, rank and alpha patterns, biases, trained embeddings and tokens) is merged by PEFT's arithmetic.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rrhf_peft.modeling import AdapterFiles
from rrhf_peft.recipe import takes_from_base
from rrhf_peft.records import UserError

ADAPTER = "default"
_PREFIX = "base_model.model."


class AdapterEdits:
    """The parameters that an adapter changes, and their values after it.

    Attributes:
        parameters: Names of the base parameters that the adapter touches.
        base_copies: Parameter name -> copy of an embedding's base weight that PEFT saved along.
    """

    def __init__(self, model: PreTrainedModel, files: AdapterFiles) -> None:
        """Lay the adapter over a model on the meta device, which is changed in place.

        Raises:
            UserError: it does not fit this model, or cannot be merged.
        """
        self._files = files
        self._config: LoraConfig = files.config
        self._layers: dict[str, Any] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self._own: dict[str, dict[str, torch.Tensor]] = {}
        self.base_copies: dict[str, torch.Tensor] = {}
        outline = self._outline(model)
        self._place_weights(outline)
        self._collect(outline)
        self.parameters = set(self._replaced) | {f"{name}.weight" for name in self._layers}
        self.parameters |= {f"{name}.bias" for name, layer in self._layers.items() if self._adds_bias(layer)}

    @property
    def changes_base(self) -> bool:
        """Whether the adapter's initialisation took a part out of the base weights (PiSSA, OLoRA, LoftQ)."""
        return takes_from_base(self._config.init_lora_weights)

    def needs_bias(self, parameter: str) -> str | None:
        """The bias that must be known to merge this weight, or the weight for a bias; None when alone."""
        module, _, kind = parameter.rpartition(".")
        if module in self._layers and self._adds_bias(self._layers[module]):
            return f"{module}.{'bias' if kind == 'weight' else 'weight'}"
        return None

    def apply(self, parameter: str, base: torch.Tensor, partner: torch.Tensor | None = None) -> torch.Tensor:
        """The parameter's value with the adapter merged in, float32.

        Args:
            parameter: One of `parameters`.
            base: Its value without the adapter.
            partner: Value of the parameter that `needs_bias` names.
        """
        module, _, kind = parameter.rpartition(".")
        replaced = self._replaced.get(parameter)
        if module not in self._layers or (kind == "bias" and partner is None):
            assert replaced is not None, parameter
            return replaced
        base = base if replaced is None else replaced
        if kind == "weight":
            return self._merge(module, base, partner)[0]
        assert partner is not None
        merged = self._merge(module, partner, base)[1]
        assert merged is not None
        return merged

    def _merge(
        self, module: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = self._layers[module]
        inner = layer.get_base_layer()
        outline = (inner.weight, getattr(inner, "bias", None))
        try:
            inner.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if bias is not None:
                inner.bias = nn.Parameter(bias.float(), requires_grad=False)
            if self.changes_base and isinstance(layer, LoraLayer):
                self._initialise_again(module, layer)
            inner.weight.data = inner.weight.data.float()
            with torch.no_grad():
                layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            return inner.weight.data, inner.bias.data if bias is not None else None
        except (ValueError, RuntimeError, TypeError, NotImplementedError, AttributeError, ImportError) as error:
            raise UserError(
                f"{self._files.folder}: PEFT cannot merge the layer '{module}' ({str(error).splitlines()[0]}). "
                "Use the adapter unmerged."
            ) from None
        finally:
            layer.merged_adapters.clear()
            inner.weight = outline[0]
            if bias is not None:
                inner.bias = outline[1]

    def _initialise_again(self, module: str, layer: Any) -> None:
        """Repeat the initialisation on the real weight, to leave the same base behind as in training."""
        layer.update_layer(ADAPTER, layer.r[ADAPTER], lora_alpha=layer.lora_alpha[ADAPTER], config=self._config)
        layer.load_state_dict(self._own[module], strict=False, assign=True)

    def _adds_bias(self, layer: Any) -> bool:
        return isinstance(layer, LoraLayer) and bool(layer.lora_bias.get(ADAPTER))

    def _outline(self, model: PreTrainedModel) -> PeftModel:
        if self._config.layer_replication:
            raise UserError(
                f"{self._files.folder}: layer_replication makes another architecture than the base model's, which "
                "cannot be merged. Use the adapter unmerged."
            )
        if self._config.target_parameters:
            raise UserError(
                f"{self._files.folder}: an adapter on {', '.join(sorted(self._config.target_parameters))} (experts of "
                "a mixture) cannot be merged. Use it unmerged, or train with adapter.target_modules naming the linear "
                "layers of attention only."
            )
        config = copy.deepcopy(self._config)
        config.init_lora_weights = False  # the weights come from the file
        try:
            return get_peft_model(model, config, low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self._files.folder}: the adapter does not fit the base model ({str(error).splitlines()[0]}). Name "
                "the base model that it was trained on."
            ) from None

    def _place_weights(self, outline: PeftModel) -> None:
        """Give every tensor of the file its place in the outline, and every place its tensor."""
        places = outline.state_dict()
        names = list(places)
        # PEFT's own renaming, followed with each place's number in the place of its tensor.
        numbers = {name: torch.tensor(index) for index, name in enumerate(names)}
        saved_as = get_peft_model_state_dict(outline, numbers, adapter_name=ADAPTER, save_embedding_layers=False)
        name_of = {saved: names[int(number)] for saved, number in saved_as.items()}
        weights: dict[str, torch.Tensor] = {}
        for saved, tensor in self._files.weights.items():
            name = name_of.pop(saved, None)
            if name is None:
                parameter = _base_name(saved.removeprefix(_PREFIX))
                if saved not in places and f"{_PREFIX}{parameter}" not in places:
                    raise self._misfit(f"there is no place for '{saved}'")
                self.base_copies[parameter] = tensor
                continue
            if places[name].shape != tensor.shape:
                raise self._misfit(
                    f"'{saved}' is {list(tensor.shape)} where the base model asks for {list(places[name].shape)}"
                )
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        if name_of:
            raise self._misfit(f"'{next(iter(name_of))}' is missing from its file")
        outline.load_state_dict(weights, strict=False, assign=True)
        for name, tensor in weights.items():
            inner = name.removeprefix(_PREFIX)
            if _is_base(inner, outline):
                self._replaced[_base_name(inner)] = tensor
        self._weights = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}

    def _collect(self, outline: PeftModel) -> None:
        handled: list[str] = []
        for name, module in outline.get_base_model().named_modules():
            if any(name.startswith(f"{parent}.") for parent in handled):
                continue
            if isinstance(module, ModulesToSaveWrapper):
                for key, tensor in module.modules_to_save[ADAPTER].state_dict().items():
                    self._replaced[f"{name}.{key}"] = tensor
            elif isinstance(module, TrainableTokensWrapper):
                self._layers[name] = module.token_adapter
            elif isinstance(module, (LoraLayer, TrainableTokensLayer)):
                self._layers[name] = module
            elif isinstance(module, AuxiliaryTrainingWrapper):
                raise UserError(f"{self._files.folder}: '{name}' cannot be merged ({type(module).__name__}).")
            else:
                continue
            handled.append(name)
            self._own[name] = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in self._weights.items()
                if key.startswith(f"{name}.") and not _is_base(key, outline)
            }
            base_layer = self._layers[name].get_base_layer() if name in self._layers else None
            if isinstance(module, ParamWrapper) or not isinstance(
                base_layer, (nn.Linear, nn.Embedding, Conv1D, type(None))
            ):
                raise UserError(
                    f"{self._files.folder}: the layer '{name}' ({type(base_layer).__name__}) cannot be merged. Use the "
                    "adapter unmerged."
                )

    def _misfit(self, problem: str) -> UserError:
        base = self._config.base_model_name_or_path or "another model"
        return UserError(
            f"{self._files.folder}: this adapter was trained on {base} and does not fit the base model ({problem}). "
            "Name the base model that it was trained on."
        )


def _base_name(name: str) -> str:
    """A parameter's name in the model without PEFT's wrapping."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(".token_adapter.", ".")


def _is_base(name: str, outline: PeftModel) -> bool:
    """Whether a name in the outline is a parameter of the base model itself, such as a trained bias."""
    owner = outline.get_base_model().get_submodule(name.rpartition(".")[0])
    return not any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_")) and not isinstance(
        owner, (LoraLayer, AuxiliaryTrainingWrapper, TrainableTokensLayer)
    )
