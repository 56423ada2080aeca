"""Counts of a model's parameters, all and trainable, and the names of dtypes."""

import math

import torch
from torch import nn


def count(module: nn.Module) -> tuple[int, int]:
    """Numbers of all parameters of `module`, and of those that require a gradient.

    For a 4-bit weight, the unpacked values count, not the packed bytes.
    """
    every = [(parameter.requires_grad, _size(parameter)) for parameter in module.parameters()]
    return sum(size for _, size in every), sum(size for learns, size in every if learns)


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return math.prod(parameter.shape if state is None else state.shape)


def floating(name: str) -> torch.dtype:
    """A floating dtype of torch by its name.

    Raises:
        ValueError: for any other name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name!r} is not known; use float32, bfloat16 or float16")
    return dtype


def choose_device(device: str | torch.device) -> torch.device:
    """Resolve `auto` and names such as `cuda:1`.

    Raises:
        ValueError: for a name that torch does not know, or a GPU where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not known; use auto, cpu or cuda") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no GPU here; use auto or cpu")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve `auto` and names such as `bfloat16`.

    Raises:
        ValueError: for a name that is no floating dtype of torch.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        return floating(dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not known; use auto, float32, bfloat16 or float16")
    return dtype
