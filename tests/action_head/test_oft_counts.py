"""Sizes of OpenVLA-OFT's parts at their released widths, without any weights."""

import pytest
import torch
from torch import nn

from openvla_lightning.action_head import DiffusionHead, L1Head
from openvla_lightning.model.film import film_layers
from openvla_lightning.model.projector import MLP
from openvla_lightning.model.vision_backbone import VisionBackbone

WIDTH = 4096


def count(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


@pytest.mark.parametrize(("action_dim", "expected"), [(7, 151_117_831), (14, 268_644_366)])
def test_heads(action_dim: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(L1Head(8, action_dim).network(WIDTH)) == expected
        # beside the same network, what embeds noisy actions
        assert count(DiffusionHead(8, action_dim).network(WIDTH)) == expected + 16_789_504


@pytest.mark.parametrize(("proprio_dim", "expected"), [(8, 16_818_176), (14, 16_842_752)])
def test_proprio_projector(proprio_dim: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(MLP(proprio_dim, WIDTH)) == expected


def test_film() -> None:
    with torch.device("meta"):
        backbone = VisionBackbone(
            {"dino": "vit_large_patch14_reg4_dinov2.lvd142m", "siglip": "vit_so400m_patch14_siglip_224.webli"}
        )
        before = list(backbone.state_dict())
        backbone.add_film(WIDTH)
    assert count(*film_layers(backbone)) == 456_241_920
    assert [name for name in backbone.state_dict() if ".scale." not in name and ".shift." not in name] == before
