"""What is done to a model block by block: recomputing activations, compiling."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from openvla_lightning.model.vla import VLA

Recompute = Literal["none", "selective", "full"]


def blocks(vla: VLA) -> list[nn.Module]:
    """The vision towers' blocks, then the decoder's layers; of towers that are no row of blocks none."""
    towers = [getattr(tower, "blocks", ()) for tower in vla.vision_backbone.featurizers]
    return [*(block for tower in towers for block in tower), *vla.llm.model.layers]


def recompute_activations(vla: VLA, which: Recompute) -> None:
    """Let blocks of `vla` forget their activations and compute them again in the backward pass, in place.

    Args:
        vla: to be trained.
        which: `full`: every block; a third more computing, least memory. `selective`: every second block. `none`.

    Raises:
        ValueError: for another word.
    """
    if which not in get_args(Recompute):
        raise ValueError(f"checkpoint_activations={which}: choose {', '.join(get_args(Recompute))}")
    chosen: Sequence[nn.Module] = {"none": [], "selective": blocks(vla)[1::2], "full": blocks(vla)}[which]
    for block in chosen:
        _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(vla: VLA, backend: str = "inductor") -> None:
    """Compile every block of `vla` in place, at its first use; equal blocks are compiled once.

    Hooks of blocks (of FSDP, for one) stay outside what is compiled. Comes before `recompute_activations`.
    """
    for block in blocks(vla):
        _replace_forward(block, torch.compile(block.forward, backend=backend))


def _replace_forward(block: nn.Module, forward: Any) -> None:
    block.forward = forward  # of this block alone: names of parameters and classes stay
