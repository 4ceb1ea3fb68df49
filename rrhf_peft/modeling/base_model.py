"""Load the base model: dtype, quantisation, device and attention chosen openly, every weight accounted for.

`TokenBudget` is how much a model computes at a time.

On a CPU bitsandbytes 0.50 loads NF4, FP4 and int8, and runs them forward and backward. int8 rounds the activations as
well (LLM.int8), in float16 whatever the model's dtype.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from rrhf_peft.modeling.sources import checkpoint_tensors, resolve_source
from rrhf_peft.records import UserError

QUANTIZATIONS = ("none", "int8", "nf4", "fp4")

# Said by every int8 layer in every step; it is how int8 works, and the recipe asked for it.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast from" not in record.getMessage()
)

Result = TypeVar("Result")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Heads that turn a language model into something that predicts no next token.
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForRewardModel",
    "RewardModel",
)


def default_device() -> torch.device:
    """This process's own GPU (by LOCAL_RANK under a launcher, else the current one), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(rank) if rank is not None else torch.cuda.current_device())


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that computes in it, float32 elsewhere; other names are themselves.

    Raises:
        UserError: not a dtype that weights can be loaded in.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        device = device or default_device()
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load_base_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str = "none",
    double_quant: bool = True,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device: str | int | torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model with all of its weights, on one device, in evaluation mode.

    Args:
        name: Local folder or hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: Type of the unquantised weights; see `resolve_dtype` for `auto`.
        quantization: none, int8, nf4 or fp4 (bitsandbytes; runs on CPUs too).
        double_quant: Quantise the 4-bit blocks' scales as well.
        attention: transformers' name of an attention implementation.
        trust_remote_code: Run model code that comes with the weights.
        allow_pickle: Read pytorch_model.bin where there are no safetensors.
        device: Where to put the weights; by default `default_device()`. Under FSDP and ZeRO-3 the
            launcher places unquantised weights and this is ignored.

    Raises:
        UserError: no such model, weights that are damaged, incomplete, pickled or not finite, another kind of
            model, or a setting that this machine cannot honour.
    """
    target = _one_device(device)
    if quantization not in QUANTIZATIONS:
        raise UserError(f"model.quantization: {quantization!r} is not one of {', '.join(QUANTIZATIONS)}.")
    weight_dtype = resolve_dtype(dtype, target)
    patterns = ["model*.safetensors", *(["pytorch_model*.bin"] if allow_pickle else [])]
    source = resolve_source(name, revision=revision, weights=patterns)
    config = load_config(source, trust_remote_code=trust_remote_code)
    pickled = allow_pickle and not any(Path(source).glob("*.safetensors*")) and any(Path(source).glob("*.bin"))
    if not pickled:
        checkpoint_tensors(Path(source))
    placed_by_launcher = is_deepspeed_zero3_enabled() or (is_fsdp_enabled() and quantization == "none")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            use_safetensors=not pickled,
            dtype=weight_dtype,
            quantization_config=quantization_config(
                quantization,
                double_quant=double_quant,
                device_type=target.type,
                storage=weight_dtype if is_fsdp_enabled() else torch.uint8,
            ),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            device_map=None if placed_by_launcher else {"": target},
            output_loading_info=True,
        )
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"{source}: does not fit into the memory of {target} as {quantization} {weight_dtype}. Set "
            "model.quantization: nf4, train a smaller model, or shard it over several GPUs."
        ) from None
    except Exception as error:  # a configuration that does not fit together fails in every way there is
        raise _loading_error(source, attention, error) from error
    model, report = loaded
    _refuse_incomplete(source, report)
    _refuse_not_finite(source, model)
    keep_quantized_layout(model)
    if source != os.fspath(name) and not Path(name).expanduser().is_dir():  # the hub's name, not that of its cache
        model.name_or_path = model.config.name_or_path = os.fspath(name)
    return model


def load_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config.json and make sure that it is an unquantised causal language model.

    Raises:
        UserError: unreadable, unknown to transformers, another kind of model, or already quantised.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # its fields are checked by many hands
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{source}: this model needs Python code from its own repository. Read that code, then set "
                "model.trust_remote_code: true (merge: --trust-remote-code) if you trust it."
            ) from None
        raise UserError(
            f"{source}: its config.json cannot be used ({_first_line(error)}). Download it again, or name another."
        ) from error
    architectures = list(getattr(config, "architectures", None) or [])
    other = [architecture for architecture in architectures if architecture.endswith(_OTHER_HEADS)]
    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if other or not known or getattr(config, "is_encoder_decoder", False):
        kind = other[0] if other else (architectures or [config.model_type])[0]
        raise UserError(f"{source}: {kind} is not a causal language model. Name a model that predicts the next token.")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise UserError(
            f"{source}: these weights are already quantised ({method}). Name the original 16-bit checkpoint and set "
            "model.quantization: nf4 (or int8, fp4), so that the trained adapter can be merged into it."
        )
    return config


def _one_device(device: str | int | torch.device | None) -> torch.device:
    if device is None:
        return default_device()
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise UserError(
            f"device {device!r} would spread the model over devices, which does not train. Leave it out: each "
            "process takes its own GPU. Models too large for one GPU are sharded with FSDP."
        )
    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r}: {_first_line(error)}.") from None


def _loading_error(source: str, attention: str, error: Exception) -> UserError:
    text = str(error)
    if isinstance(error, SafetensorError):
        return UserError(f"{source}: its weights cannot be read ({_first_line(error)}). Download them again.")
    if "ignore_mismatched_sizes" in text:
        return UserError(
            f"{source}: the weights do not have the sizes that config.json promises. The folder mixes two models; "
            "download it again."
        )
    if any(word in text.lower() for word in ("flash", "attn_implementation", "attention implementation", "sdpa")):
        reason = _first_line(error).split(". ")[0]
        return UserError(f"model.attention: {attention} cannot be used with {source} here ({reason}). Try eager.")
    return UserError(
        f"{source}: cannot be loaded as a causal language model ({_first_line(error)}). Its config.json and weights "
        "may not belong together: download both again."
    )


def _refuse_incomplete(source: str, report: dict[str, set[str]]) -> None:
    """Weights that the checkpoint lacks would be random: training on top of them is never meant."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{source}: the checkpoint lacks {len(missing)} of the model's weights, which would be random: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. It is incomplete or of another "
            "architecture than its config.json says."
        )


def _refuse_not_finite(source: str, model: PreTrainedModel) -> None:
    """Weights of NaN or infinity sample nothing and train nothing, without an error anywhere."""
    names: list[str] = []
    extremes: list[torch.Tensor] = []
    for name, tensor in _values(model):
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            names.append(name)
            extremes += [extreme.float().cpu() for extreme in torch.aminmax(tensor)]
    finite = torch.isfinite(torch.stack(extremes)).view(-1, 2).all(1).tolist() if extremes else []
    broken = [name for name, fine in zip(names, finite, strict=True) if not fine]
    if broken:
        raise UserError(
            f"{source}: '{broken[0]}' (one of {len(broken)}) holds values that are not finite (NaN, infinity), so that "
            "the model computes nothing. Download it again, or load it in another model.dtype."
        )


def _values(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight; of quantised ones the scales, which are NaN where a weight was."""
    held: set[int] = set()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            held.add(id(weight))
            state = weight.quant_state
            if state is not None:
                yield name, state.absmax
                if state.nested:
                    yield name, state.state2.absmax
                    yield name, state.offset
        elif isinstance(module, bnb.nn.Linear8bitLt):
            held.add(id(weight))
            if weight.SCB is not None:
                yield name, weight.SCB
    yield from ((name, weight.detach()) for name, weight in model.named_parameters() if id(weight) not in held)


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)


class TokenBudget:
    """How many padded tokens a batch may hold; halved for good when the GPU runs out of memory.

    Args:
        tokens: rows times longest row of a batch. A single longer row is a batch by itself.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.halvings = 0

    def map(
        self,
        lengths: Sequence[int],
        compute: Callable[[list[int]], Sequence[Result]],
        too_large: Callable[[int], Result] | None = None,
    ) -> list[Result]:
        """Call `compute` with the indices of each batch, longest rows first, and put its results in order.

        The batches depend on `lengths` and the budget alone.

        Args:
            lengths: tokens of each row.
            compute: indices of a batch -> one result for each.
            too_large: index of a row that alone fills the memory -> its result. None: it is an error.

        Raises:
            UserError: a single row does not fit into the memory.
        """
        results: dict[int, Result] = {}
        todo = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        while todo:
            count = max(1, self.tokens // max(1, lengths[todo[0]]))
            batch = todo[:count]
            try:
                computed: Sequence[Result] | None = compute(batch)
            except torch.OutOfMemoryError:
                computed = None
            if computed is None:  # outside the handler, which still holds the failed batch's tensors
                torch.cuda.empty_cache()
                if len(batch) > 1:
                    self.tokens = len(batch) // 2 * lengths[batch[0]]
                    self.halvings += 1
                    continue
                if too_large is None:
                    raise UserError(
                        f"a text of {lengths[batch[0]]} tokens does not fit into the accelerator's memory. Lower "
                        "scoring.scorer.max_tokens, or score on a larger device."
                    )
                computed = [too_large(batch[0])]
            results.update(zip(batch, computed, strict=True))
            todo = todo[len(batch) :]
        return [results[index] for index in range(len(lengths))]


# ---- Quantisation ----


def quantization_config(
    quantization: str,
    *,
    double_quant: bool = True,
    device_type: str = "cpu",
    storage: torch.dtype = torch.uint8,
) -> BitsAndBytesConfig | None:
    """The transformers configuration for `none | int8 | nf4 | fp4`; None for `none`.

    Args:
        quantization: How the frozen base is stored.
        double_quant: Quantise the 4-bit blocks' scales as well; int8 has no such thing.
        device_type: "cuda" computes 4-bit products in bfloat16 (float16 where the GPU has none), the
            rest in float32.
        storage: Type that 4-bit values are packed into. FSDP shards only weights whose storage type is
            the model's own dtype. Changes no value.
    """
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization not in QUANTIZATIONS:
        raise UserError(f"model.quantization: {quantization!r} is not one of {', '.join(QUANTIZATIONS)}.")
    compute = torch.float32
    if device_type == "cuda":
        compute = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
    )


def keep_quantized_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place when a CPU model first runs in eval mode.

    On CPUs with AVX512-BF16 that one-way step makes later training passes lose every gradient, rounds
    the block scales to bfloat16, and leaves weights that no longer dequantise. Without it, training and
    evaluation compute the same.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantized_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules whose weights bitsandbytes holds."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [out, in] that a linear layer multiplies with, whatever it is stored in.

    4-bit weights are multiplied out in float32, as the CPU forward does, and not first rounded to the
    dtype that the checkpoint was loaded in.

    Args:
        module: bitsandbytes `Linear4bit` or `Linear8bitLt`, or an ordinary linear layer.
        dtype: Type of the result.
    """
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(weight.data, state).to(dtype)
    if isinstance(module, bnb.nn.Linear8bitLt):
        # The first forward moves the scales from the weight to the layer's state.
        scales: Any = weight.SCB if weight.SCB is not None else module.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    assert isinstance(weight, torch.Tensor), type(module)
    return weight.detach().to(dtype)


def compute_in_float32(model: nn.Module) -> None:
    """Make a model compute in float32 with the weights that it has, quantised ones included."""
    model.float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight: Any = module.weight
            # DoRA takes the norms of weights that were multiplied out in this dtype.
            weight.quant_state.dtype = torch.float32
            module.compute_dtype = torch.float32
