"""Towers other than the released ones, and what is refused."""

from typing import Any

import pytest
import timm
import torch

from openvla_lightning.model.vision_backbone import VisionBackbone, tower_spec

VIT = {"id": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("tower", "size", "patches", "dim"),
    [
        (VIT, 64, 16, 24),
        ({"id": "vit_tiny_r_s16_p8_224", "embed_dim": 24, "depth": 2, "num_heads": 2}, 96, None, 24),
        ({"id": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 8, 24, 8]}, 96, 36, 24),
        ({"id": "resnet18"}, 96, 36, 256),
        ({"id": "xcit_nano_12_p16_224", "embed_dim": 24, "depth": 2, "num_heads": 2}, 96, 36, 24),
    ],
)
def test_any_tower_with_inner_features(tower: dict[str, Any], size: int, patches: int | None, dim: int) -> None:
    backbone = VisionBackbone({"only": tower}, image_size=size)
    features = backbone(torch.randn(2, 3, size, size))
    assert features.shape == (2, backbone.num_patches, backbone.dim)
    assert backbone.dim == dim
    assert patches in (None, backbone.num_patches)
    with torch.device("meta"):
        on_meta = VisionBackbone.from_config(backbone.config)
    assert (on_meta.num_patches, on_meta.dim) == (backbone.num_patches, backbone.dim)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert [(k, v.shape) for k, v in on_meta.state_dict().items()] == [
        (k, v.shape) for k, v in backbone.state_dict().items()
    ]


def test_features_are_timms_second_to_last_block() -> None:
    torch.manual_seed(0)
    spec = {"id": "vit_large_patch14_reg4_dinov2.lvd142m", "embed_dim": 24, "depth": 3, "num_heads": 4}
    backbone = VisionBackbone({"dino": spec}, image_size=56).eval()
    tower = timm.create_model(
        "vit_large_patch14_reg4_dinov2", img_size=56, num_classes=0, embed_dim=24, depth=3, num_heads=4
    )
    state = {k.replace("scale_factor", "gamma"): v for k, v in backbone.featurizer.state_dict().items()}
    tower.load_state_dict(state)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        (expected,) = tower.eval().get_intermediate_layers(pixels, n={1})
        torch.testing.assert_close(backbone(pixels), expected)


def test_an_untagged_siglip_is_version_one() -> None:
    assert tower_spec("vit_so400m_patch14_siglip_224")["id"] == "vit_so400m_patch14_siglip_224.webli"
    assert tower_spec("vit_so400m_patch14_siglip_224.v2_webli")["id"].endswith(".v2_webli")
    assert tower_spec("vit_tiny_patch16_224")["id"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"towers": {"a": "vit_tiny_patch16_225"}}, "timm has no model"),
        ({"towers": {}}, "1 to 2 towers"),
        ({"towers": {"a": VIT}, "fusion": "both"}, "channel, sequence"),
        ({"towers": {"a": VIT, "b": {**VIT, "id": "vit_tiny_patch16_224", "patch_size": 32}}}, "equal patch counts"),
        ({"towers": {"a": VIT}, "feature_layer": -9}, "feature_layer=-9"),
        ({"towers": {"a": {"embed_dim": 3}}}, "needs `id`"),
    ],
)
def test_errors_say_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionBackbone(**{"image_size": 64, **arguments})


def test_learned_positions_start_as_wide_as_asked() -> None:
    narrow, wide = (VisionBackbone({"a": {**VIT, **more}}, image_size=64) for more in ({}, {"pos_embed_std": 0.5}))
    assert narrow.featurizer.pos_embed.std() < 0.03
    assert 0.4 < wide.featurizer.pos_embed.std() < 0.6
    with pytest.raises(ValueError, match="learns no positions"):
        VisionBackbone({"a": {"id": "resnet18", "pos_embed_std": 0.5}}, image_size=64)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_normalisation_keeps_its_statistics(frozen: bool) -> None:
    backbone = VisionBackbone({"a": {"id": "resnet18"}}, image_size=64).requires_grad_(not frozen).train()
    before = backbone.featurizer.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64) + 1)
    assert torch.equal(backbone.featurizer.bn1.running_mean, before) == frozen


def test_a_sequence_is_as_wide_as_its_widest_tower_and_zero_beyond_the_others() -> None:
    towers = {"a": VIT, "b": {**VIT, "embed_dim": 24}}
    backbone = VisionBackbone(towers, image_size=64, fusion="sequence")
    features = backbone(torch.randn(2, 6, 64, 64))
    a, b = backbone.tower_features(torch.randn(2, 6, 64, 64))
    assert features.shape == (2, backbone.num_patches, backbone.dim)
    assert backbone.num_patches == a.shape[1] + b.shape[1]
    narrow = slice(a.shape[1], None) if b.shape[2] < a.shape[2] else slice(0, a.shape[1])
    least = min(a.shape[2], b.shape[2])
    assert (features[:, narrow, least:] == 0).all()
    assert (features[:, narrow, :least] != 0).any()
