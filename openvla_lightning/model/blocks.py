"""Operations on a model's blocks: recomputing activations, compiling."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from openvla_lightning.model.vla import VLA

Recompute = Literal["none", "selective", "full"]


def blocks(vla: VLA) -> list[nn.Module]:
    """The vision towers' blocks, then the decoder's layers; towers that are no sequence of blocks give none."""
    towers = [getattr(tower, "blocks", ()) for tower in vla.vision_backbone.featurizers]
    return [*(block for tower in towers for block in tower), *vla.llm.model.layers]


def recompute_activations(vla: VLA, which: Recompute) -> None:
    """Make blocks of `vla` recompute their activations in the backward pass, in place.

    Args:
        vla: the model to train.
        which: `full`: every block, with a third more computation and the least memory. `selective`: every second block.
            `none`: no block.

    Raises:
        ValueError: for another value.
    """
    if which not in get_args(Recompute):
        raise ValueError(f"checkpoint_activations={which}: choose {', '.join(get_args(Recompute))}")
    chosen: Sequence[nn.Module] = {"none": [], "selective": blocks(vla)[1::2], "full": blocks(vla)}[which]
    for block in chosen:
        _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(vla: VLA, backend: str = "inductor") -> None:
    """Compile every block of `vla` in place, at its first use; equal blocks are compiled once.

    Hooks of blocks, such as FSDP's, are not compiled. Call this before `recompute_activations`.
    """
    for block in blocks(vla):
        _replace_forward(block, torch.compile(block.forward, backend=backend))


def _replace_forward(block: nn.Module, forward: Any) -> None:
    block.forward = forward  # only this block's method, so names of parameters and classes do not change
