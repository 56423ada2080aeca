"""Checkpoints as training writes them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import openvla_lightning
from openvla_lightning import VLA, Processor
from openvla_lightning.action_head import TokenHead
from openvla_lightning.checkpoint.formats import base_at
from openvla_lightning.checkpoint.training import learnt_names
from openvla_lightning.strategy import to_config


def same(a: VLA, b: VLA) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def train_a_little(vla: VLA, amount: float = 0.05) -> None:
    """Move what learns."""
    with torch.no_grad():
        for parameter in vla.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * amount)


def write_ckpt(path: Path, vla: VLA, strategy: Any, norm_stats: dict[str, Any], base: Path | None = None) -> None:
    """As VLAModule does; with a `base`, the adapter alone."""
    means, stds = [[0.5] * 3] * 2, [[0.5] * 3] * 2
    processor = Processor(TokenHead(vocab_size=768), image_size=56, means=means, stds=stds, pad_token_id=0)
    learnt = learnt_names(vla) if base else set(vla.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "state_dict": {f"vla.{k}": v for k, v in vla.state_dict().items() if k in learnt} | {"x": torch.zeros(1)},
            "hyper_parameters": {"seed": 7},
            "openvla_lightning": {
                "version": openvla_lightning.__version__,
                "vla": vla.config,
                "processor": processor.config,
                "action_head": processor.action_head.config,
                "strategy": to_config(strategy) if strategy else None,
                "quantisation": vla.quantisation,
                "base": asdict(base_at(base)) if base else None,
                "normalisation": "quantile",
                "norm_stats": norm_stats,
            },
        },
        path,
    )
