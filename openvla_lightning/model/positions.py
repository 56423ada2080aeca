"""Positions in rows of tokens: padding on either side, and places to read."""

from typing import overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def at(hidden: Tensor, places: Tensor) -> Tensor:
    """The hidden states [B, K, dim] at `places` [B, K] of [B, S, dim]."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], places]


def visible(attention_mask: Tensor | None, prefix: int) -> Tensor | None:
    """Which of BOS, `prefix` tokens and the other text [B, L + prefix] are no padding; None: no padding is known.

    A mask on an accelerator is assumed to hide something, because reading it would wait for the device. So is a mask
    without values, in an estimate.
    """
    if attention_mask is None:
        return None
    can_look = attention_mask.device.type == "cpu" and not isinstance(attention_mask, FakeTensor)
    if can_look and bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    return torch.cat([mask[:, :1].expand(-1, 1 + prefix), mask[:, 1:]], dim=1)


def left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """The number of padding positions at the start of each row [B]; None if no row starts with padding."""
    if attention_mask is None or bool(attention_mask[:, 0].all()):
        return None
    return attention_mask.int().argmax(dim=1)


@overload
def roll(rows: Tensor, shift: Tensor | None) -> Tensor: ...
@overload
def roll(rows: None, shift: Tensor | None) -> None: ...
def roll(rows: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """Rotate each row [B, N, ...] to the left by its own `shift` [B]: left padding becomes right padding."""
    if shift is None or rows is None:
        return rows
    index = (torch.arange(rows.shape[1], device=rows.device) + shift[:, None]) % rows.shape[1]
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]
