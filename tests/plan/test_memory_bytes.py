"""The plan's arithmetic against real models, adapters and optimizers: equal to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Trainer, TrainingArguments

from rrhf_peft.modeling import attach_adapter, load_base_model
from rrhf_peft.plan.weights import OPTIMIZERS, is_paged, optimizer_bytes, shaped_weights


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: torch.nn.Module) -> int:
    """Everything a loaded model holds: parameters, buffers, and bitsandbytes' scales and tables."""
    total = sum(nbytes(buffer) for buffer in model.buffers())
    for parameter in model.parameters():
        total += nbytes(parameter)
        if (scales := getattr(parameter, "SCB", None)) is not None:
            total += nbytes(scales)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            inner = state.state2
            parts = [state.absmax, state.code]
            parts += [inner.absmax, inner.code, state.offset] if inner is not None else []
            total += sum(map(nbytes, parts))
    return total


@pytest.fixture(scope="module", params=[False, True], ids=["own-head", "tied-head"])
def model_folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=72,  # blocks of 64 values do not divide the layers evenly
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("quantization", "double_quant"), [("none", True), ("int8", True), ("nf4", True), ("nf4", False), ("fp4", True)]
)
def test_base_weights_take_what_the_plan_says(
    model_folder: Path, quantization: str, double_quant: bool, dtype: str
) -> None:
    real = load_base_model(model_folder, quantization=quantization, double_quant=double_quant, dtype=dtype)
    planned = shaped_weights(
        AutoConfig.from_pretrained(model_folder),
        dtype=getattr(torch, dtype),
        quantization=quantization,
        double_quant=double_quant,
        adapter={},
    )
    assert sum(planned.stored.values()) == weight_bytes(real)
    assert planned.parameters == real.num_parameters()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "use_dora": True},
        {"r": 8, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]},
        {"r": 4, "init_lora_weights": "pissa"},
        None,
    ],
)
def test_adapter_and_trained_values_are_those_of_a_real_adapter(
    model_folder: Path, fields: dict[str, Any] | None
) -> None:
    base = load_base_model(model_folder, dtype="bfloat16")
    before = {id(parameter) for parameter in base.parameters()}
    real = attach_adapter(base, fields)
    planned = shaped_weights(AutoConfig.from_pretrained(model_folder), dtype=torch.bfloat16, adapter=fields)
    assert planned.adapter == sum(nbytes(p) for p in real.parameters() if id(p) not in before)
    trained = [(p.numel(), p.element_size(), tuple(p.shape)) for p in real.parameters() if p.requires_grad]
    assert sorted(planned.trainable) == sorted(trained)


def test_continuing_an_adapter_takes_its_shapes(model_folder: Path, tmp_path: Path) -> None:
    adapter = attach_adapter(load_base_model(model_folder), {"r": 3, "target_modules": ["o_proj"]})
    adapter.save_pretrained(tmp_path / "adapter")
    planned = shaped_weights(
        AutoConfig.from_pretrained(model_folder), dtype=torch.float32, init_adapter=str(tmp_path / "adapter")
    )
    assert planned.adapter == 4 * sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert planned.trainable


class Sizes(torch.nn.Module):
    """A matrix, a vector, a matrix below bitsandbytes' 8-bit threshold, and a block of them."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(130, 64), (7,), (30, 20), (2, 50, 50)]
        self.weights = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self) -> torch.Tensor:
        return sum((weight**2).sum() for weight in self.weights)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # they fall back, as large
@pytest.mark.parametrize("name", [*OPTIMIZERS, "adafactor"])
def test_an_optimizer_keeps_what_the_plan_says(name: str, tmp_path: Path) -> None:
    model = Sizes()
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    model().backward()
    optimizer.step()
    kept = 0
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            shared = key.startswith("qmap")  # one table for all tensors
            if isinstance(value, torch.Tensor) and key != "step" and not shared:
                kept += nbytes(value)
    planned = optimizer_bytes(name, [(p.numel(), p.element_size(), tuple(p.shape)) for p in model.parameters()])
    assert planned == kept
    assert is_paged(name) == name.startswith("paged")


def test_an_optimizer_that_was_never_compared_is_unknown() -> None:
    assert optimizer_bytes("galore_adamw", [(10, 4, (10,))]) is None
