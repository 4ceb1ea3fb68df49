"""Adapters to merge: trained-looking ones, with the recipe that says how their base was held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils import logging

from rrhf_peft.modeling import attach_adapter, load_base_model

#: Make(base folder, adapter fields, quantization=, dtype=, scale=, recipe=) -> (run folder, live model in eval mode).
MakeAdapter = Callable[..., tuple[Path, PeftModel]]


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """A factory of run folders whose adapter has moved away from its initial values."""

    def make(
        base: Path,
        fields: dict[str, Any] | None = None,
        *,
        quantization: str = "none",
        dtype: str = "float32",
        double_quant: bool = True,
        scale: float = 0.05,
        recipe: bool = True,
        name: str = "run",
    ) -> tuple[Path, PeftModel]:
        model = load_base_model(base, quantization=quantization, dtype=dtype, double_quant=double_quant)
        policy = attach_adapter(model, {"r": 4, **(fields or {})})
        assert isinstance(policy, PeftModel)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * scale)
        folder = tmp_path / name
        policy.save_pretrained(folder)
        if (base / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        if recipe:
            (folder / "recipe.yaml").write_text(
                f"model: {{name: {base}, quantization: {quantization}, dtype: {dtype}, "
                f"double_quant: {str(double_quant).lower()}}}\n"
                f"data: {{train: unused.jsonl}}\ntraining: {{output_dir: {folder}}}\n"
            )
        return folder, policy.eval()

    return make


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of tiny random models of other architectures."""
    from transformers import AutoModelForCausalLM, PretrainedConfig

    def make(config: PretrainedConfig, max_shard_size: str = "1GB") -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 or "bias" in name:
                    parameter.normal_(std=0.08)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make
