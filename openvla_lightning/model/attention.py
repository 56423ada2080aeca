"""Attention of the decoder's layers: which implementations there are, and how one layer is run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
Run = Callable[..., Tensor]
"""`run_layer`, or a compiled version of it."""

# For `sdpa`, transformers reads the positions to decide on a mask, which waits for the device in every forward pass.
# For an attention of another name it makes no mask, and without a mask this one is causal.
CAUSAL = "sdpa_without_mask"


def sdpa_without_mask(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """`sdpa`; on a CPU with autocast it runs in float32, whose gradients take an eighth of bfloat16's time.

    Arguments and results are as in transformers: queries, keys and values [B, heads, S, width].
    """
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, *rest, **options)
    with torch.autocast("cpu", enabled=False):
        out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *rest, **options)
    return out.to(value.dtype), weights


AttentionInterface.register(CAUSAL, sdpa_without_mask)


def run_layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, positions: Tensor, rotary: Any, causal: bool
) -> Tensor:
    """One decoder layer; a separate function, so that compilation treats all layers as the same code."""
    return layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, is_causal=causal)
