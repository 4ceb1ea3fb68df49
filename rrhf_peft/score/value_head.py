"""Reward models in the layout of Dahoas/gptj-rm-static: a backbone under `transformer.` and a `v_head`.

The rules that its scores are published with: the text ends with one EOS, is cut on the left to 1024
tokens, and the reward is `v_head` (linear, no bias) of the hidden state at that EOS. Checkpoints hold
the backbone a second time under `model.`, with its LM head; that copy is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights

from rrhf_peft.records import UserError

#: Where such a checkpoint keeps its weights, the safe format first.
WEIGHT_FILES = ("model.safetensors", "hf_ckpt.pt", "pytorch_model.bin")

#: Constants that older transformers saved among the weights; the architecture has them built in.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


class ValueHeadModel(nn.Module):
    """A backbone and a linear value head without bias.

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
        return self.v_head(hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1])


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
            model = ValueHeadModel(backbone, config.get_text_config().hidden_size).to(dtype)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file}: its weights do not fit the architecture of {base or file.parent} "
            f"({' '.join(str(error).split())[:300]}). Name the model that it was trained from as scoring.scorer.base."
        ) from None
    if missing or unexpected:
        what = [
            f"{label} {len(keys)} ({', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''})"
            for label, keys in (("lacks", missing), ("has unknown", unexpected))
            if keys
        ]
        raise UserError(
            f"{file}: is not a whole value-head checkpoint: it {' and '.join(what)}. Expected are transformer.* and "
            "v_head.weight; what is missing would be random. Check scoring.scorer.base and the file."
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
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{name}: there is no such folder here, and the hub does not give it ({reason}). Check the name and "
                "the network."
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
        raise UserError(f"{key}: {source} has no usable config.json ({str(error).splitlines()[0]}).") from None
    return config


def _state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of the reward model's own keys."""
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}). Download it again.") from None
    except Exception as error:  # pickle.UnpicklingError, or whatever a damaged pickle runs into
        raise UserError(
            f"{file}: is no plain file of tensors, and nothing else is unpickled here ({type(error).__name__}). "
            "Convert it to safetensors where you trust it."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: holds something else than a dictionary of tensors. Save the model's state_dict().")
    return {key: value for key, value in state.items() if not key.startswith("model.") and not key.endswith(_CONSTANTS)}
