"""Who may see whom: the attention mask of a shared-prompt row, in the form each implementation wants.

A token sees its own piece's prompt and its own response's past. The rule is written once, as a
predicate on (query, key); dense masks and FlexAttention block masks both come from it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from rrhf_peft.logprobs.layout import Rows

#: Attention implementations that take an explicit mask; flash attention does not.
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")

#: Layer types a shared-prompt mask can express.
MASKED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def shared_layout_obstacle(config: PreTrainedConfig) -> str | None:
    """Why this model cannot take the shared layout as far as its config tells, or None."""
    implementation = config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        return f"attention implementation {implementation} takes no explicit mask"
    foreign = set(getattr(config, "layer_types", None) or ()) - set(MASKED_LAYERS)
    if foreign:
        return f"its {', '.join(sorted(foreign))} layers carry state along the row"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its position biases (ALiBi) follow the place in the row"
    return None


def shared_mask(rows: Rows, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The attention mask for the model's backbone: a mask, or one per layer type where layers differ.

    Args:
        rows: one chunk, on the model's device.
        config: the text model's config; names the attention implementation and the layers' windows.
        dtype: of the hidden states; eager attention adds the mask to its scores.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if not layer_types:  # one kind of layer, windowed or not (Mistral)
        return _mask(rows, config, dtype, window=window)
    masks = {
        "full_attention": lambda: _mask(rows, config, dtype),
        "sliding_attention": lambda: _mask(rows, config, dtype, window=window),
        "chunked_attention": lambda: _mask(rows, config, dtype, chunk=chunk),
    }
    if layer_types == {"full_attention"}:
        return masks["full_attention"]()
    return {name: masks[name]() for name in layer_types}


def _mask(
    rows: Rows, config: PreTrainedConfig, dtype: torch.dtype, window: int | None = None, chunk: int | None = None
) -> Any:
    count, width = rows.token.shape

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        past = rows.position[b, k] <= rows.position[b, q]
        own = (rows.branch[b, k] == 0) | (rows.branch[b, k] == rows.branch[b, q])
        allowed = (rows.piece[b, q] == rows.piece[b, k]) & own & past
        if window is not None:
            allowed = allowed & (rows.position[b, k] > rows.position[b, q] - window)
        if chunk is not None:
            allowed = allowed & (rows.position[b, k] // chunk == rows.position[b, q] // chunk)
        return allowed

    if config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, count, None, width, width, device=str(rows.token.device))
    device = rows.token.device
    b = torch.arange(count, device=device).view(-1, 1, 1)
    place = torch.arange(width, device=device)
    allowed = sees(b, b, place.view(1, -1, 1), place.view(1, 1, -1)).unsqueeze(1)  # [R, 1, L, L]
    if config._attn_implementation == "eager":  # adds its mask, so a boolean one would be silently wrong
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
    return allowed
