"""One or more timm towers, read at an inner layer."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openvla_lightning.model.film import add_film, film_features
from openvla_lightning.model.tower import OURS, build_tower, pixel_statistics, probe, tower_spec
from openvla_lightning.model.tower import tower_features as read_tower

__all__ = ["OURS", "Fusion", "VisionBackbone", "pixel_statistics", "tower_spec"]

Fusion = Literal["channel", "sequence"]

_NAMES = ("featurizer", "fused_featurizer")


class VisionBackbone(nn.Module):
    """timm towers whose patch features are joined channel by channel (as released) or one after the other.

    A tower is any timm model with `forward_intermediates`; ViTs, hybrids with a convolutional stem and pure
    convolutional networks all give patches.

    Args:
        towers: name -> timm model id, or name -> {"id": timm model id, **keyword arguments of the timm model}.
            The order is the order of channels in `pixel_values` and in the features. Keys of ours: `mean` and `std`
            of the pixels (for the processor), `pos_embed_std` of learned positions' random start. timm's default of
            0.02 is a fiftieth of a convolutional stem's output, so positions are learnt slowly.
        image_size: side of the square input, in pixels.
        fusion: `channel` joins the towers' features of one patch (released); `sequence` keeps them as separate tokens,
            padded with zeros to the width of the widest tower.
        feature_layer: the block whose output is used, counted from the end; -2 as released, without final norm.
        pretrained: load each tower's own weights (from the hub or its cache); not on the meta device.

    Attributes:
        dim: width of a patch feature.
        num_patches: visual tokens per image.
        has_film: whether `add_film` was called, so that features depend on the instruction.
    """

    def __init__(
        self,
        towers: Mapping[str, str | Mapping[str, Any]],
        image_size: int = 224,
        fusion: Fusion = "channel",
        feature_layer: int = -2,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= len(towers) <= len(_NAMES):
            raise ValueError(f"a vision backbone has 1 to {len(_NAMES)} towers, got {len(towers)}: {list(towers)}")
        if fusion not in ("channel", "sequence"):
            raise ValueError(f"unknown fusion {fusion!r}; known: channel, sequence")
        self.image_size, self.fusion, self.feature_layer = image_size, fusion, feature_layer
        self.towers = {name: tower_spec(spec) for name, spec in towers.items()}
        shapes = []
        self._formats: list[str] = []
        for attribute, spec in zip(_NAMES, self.towers.values(), strict=False):
            tower = build_tower(spec, image_size, pretrained)
            self.add_module(attribute, tower)
            shape, output_format = probe(tower, image_size, feature_layer, spec["id"])
            shapes.append(shape)
            self._formats.append(output_format)
        self._check_fit(shapes)
        channel = fusion == "channel"
        self.dim = sum(dim for _, dim in shapes) if channel else max(dim for _, dim in shapes)
        self.has_film = False
        self.num_patches = shapes[0][0] if channel else sum(patches for patches, _ in shapes)

    def _check_fit(self, shapes: list[tuple[int, int]]) -> None:
        if self.fusion == "channel" and len({patches for patches, _ in shapes}) > 1:
            raise ValueError(f"fusion=channel needs equal patch counts, towers {list(self.towers)} give {shapes}")

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {
            "towers": self.towers,
            "image_size": self.image_size,
            "fusion": self.fusion,
            "feature_layer": self.feature_layer,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VisionBackbone":
        """Rebuild with random weights."""
        return cls(**config)

    def train(self, mode: bool = True) -> "VisionBackbone":
        """As in any module, but frozen batch normalisation keeps its running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
                parameter.requires_grad for parameter in module.parameters()
            ):
                module.eval()
        return self

    @property
    def featurizers(self) -> list[nn.Module]:
        """The towers, in channel order."""
        return [getattr(self, name) for name in _NAMES[: len(self.towers)]]

    def add_film(self, language_dim: int) -> None:
        """Add FiLM: language embeddings of this width scale and shift the features in every block.

        Raises:
            ValueError: for a tower that is no sequence of plain ViT blocks.
        """
        for tower in self.featurizers:
            add_film(tower, language_dim)
        self.has_film = True

    def tower_features(self, pixel_values: Tensor, language: Tensor | None = None) -> list[Tensor]:
        """Each tower's patch features [B, P, D_tower] from pixels [B, 3 * towers, H, W].

        Args:
            pixel_values: normalised, each tower's own three channels one after the other.
            language: mean language embeddings [B, dim], which a backbone with FiLM needs.
        """
        expected = (3 * len(self.towers), self.image_size, self.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"pixel_values must be [B, {', '.join(map(str, expected))}], got {pixel_values.shape}")
        pixels = pixel_values.to(next(self.parameters()).dtype).split(3, dim=1)
        if self.has_film:
            if language is None:
                raise ValueError("this vision backbone has FiLM: it needs the instruction's mean embedding")
            mean = language.to(next(self.parameters()).dtype)
            return [
                film_features(tower, image, self.feature_layer, mean)
                for tower, image in zip(self.featurizers, pixels, strict=True)
            ]
        return [
            read_tower(tower, image, self.feature_layer, output_format)
            for tower, image, output_format in zip(self.featurizers, pixels, self._formats, strict=True)
        ]

    def views(self, pixel_values: Tensor) -> int:
        """V, the number of images in each row of pixels [B, 3 * towers * V, H, W].

        Raises:
            ValueError: when the number of channels does not fit whole images.
        """
        channels, side = 3 * len(self.towers), self.image_size
        views, rest = divmod(pixel_values.shape[1], channels)
        if rest or not views:
            raise ValueError(
                f"pixel_values must be [B, {channels}, {side}, {side}], or as many channels for each of several "
                f"views, got {list(pixel_values.shape)}"
            )
        return views

    def fuse(self, features: list[Tensor]) -> Tensor:
        """Join the towers' features into [B, P, dim]."""
        if self.fusion == "channel":
            return torch.cat(features, dim=2)
        return torch.cat([nn.functional.pad(f, (0, self.dim - f.shape[2])) for f in features], dim=1)

    def forward(self, pixel_values: Tensor, language: Tensor | None = None) -> Tensor:
        """Patch features [B, V * num_patches, dim] from pixels [B, 3 * towers * V, H, W] of V views.

        The patches come one view after the other, as in OpenVLA-OFT.

        Args:
            pixel_values: normalised; a view's channels are those of the first tower, then those of the second.
            language: mean language embeddings [B, dim], which a backbone with FiLM needs.

        Raises:
            ValueError: when the pixels have another number of channels or another size, or FiLM lacks its embedding.
        """
        views = self.views(pixel_values)
        if views == 1:
            return self.fuse(self.tower_features(pixel_values, language))
        images = pixel_values.reshape(-1, 3 * len(self.towers), *pixel_values.shape[2:])
        each = None if language is None else language.repeat_interleave(views, dim=0)
        return self.fuse(self.tower_features(images, each)).reshape(len(pixel_values), -1, self.dim)
