"""Fixtures: a VLA and a folder in the released layout, small enough to take apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from openvla_lightning.model import VLA  # takes seconds: imported by the tests that build one

CONFIG: dict[str, Any] = {
    "vision_backbone": {
        "towers": {
            "dino": {"id": "vit_large_patch14_reg4_dinov2.lvd142m", "embed_dim": 24, "depth": 3, "num_heads": 4},
            "siglip": {"id": "vit_so400m_patch14_siglip_224.webli", "embed_dim": 32, "depth": 2, "num_heads": 4},
        },
        "image_size": 56,
    },
    "projector": {"kind": "fused_mlp"},
    "llm": {
        "name": "tiny",
        "vocab_size": 768,
        "architecture": {
            "model_type": "llama",
            "vocab_size": 832,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    },
}
STATS = {
    "q01": [-1.0, -0.5, -2.0, -0.1, -0.1, -0.1, 0.0],
    "q99": [1.0, 0.5, 2.0, 0.1, 0.1, 0.1, 1.0],
    "mask": [True] * 6 + [False],
}


@pytest.fixture
def config() -> dict[str, Any]:
    """Description of a small model with both released kinds of towers."""
    return copy.deepcopy(CONFIG)


def build_small(config: dict[str, Any]) -> VLA:
    """A model with weights far from their flat initialisation, so that every part of it moves the logits."""
    from openvla_lightning.model import VLA

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vla = VLA.from_config(config)
        with torch.no_grad():
            for parameter in vla.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    return vla.eval()


@pytest.fixture
def build() -> Callable[[dict[str, Any]], VLA]:
    """Builds a model from a description."""
    return build_small


@pytest.fixture(scope="session")
def vla() -> VLA:
    """A small model nobody changes."""
    model = build_small(copy.deepcopy(CONFIG))
    model.norm_stats = {"toy": {"action": STATS, "num_trajectories": 3, "num_transitions": 70}}
    return model


@pytest.fixture(scope="session")
def folder(vla: VLA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vla` in the released layout."""
    path = tmp_path_factory.mktemp("released")
    vla.save_pretrained(path)
    return path


@pytest.fixture
def batch(vla: VLA) -> dict[str, torch.Tensor]:
    """Three prompts of different length, padded on the right, and three images."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 6, 4])
    ids = torch.randint(260, 512, (3, 9), generator=generator)
    ids[:, 0] = 1
    mask = torch.arange(9) < lengths[:, None]
    return {
        "pixel_values": torch.randn(3, 6, 56, 56, generator=generator),
        "input_ids": ids.where(mask, 0),
        "attention_mask": mask,
    }
