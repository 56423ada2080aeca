"""One or more timm towers, read at an inner layer."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import timm
import torch
from accelerate import init_empty_weights
from timm.layers import LayerScale as TimmLayerScale
from torch import Tensor, nn

from openvla_lightning.model.film import add_film, film_features
from openvla_lightning.model.hub import check_source

Fusion = Literal["channel", "sequence"]

_NAMES = ("featurizer", "fused_featurizer")
OURS = ("id", "mean", "std", "pos_embed_std")
"""Keys of a tower that are not arguments of its timm model."""

_NOT_FOR_TOWERS = ("checkpoint_path", "cache_dir", "num_classes", "img_size", "scriptable", "weights_only")
_SIGLIP_V1 = ("vit_so400m_patch14_siglip_", "vit_base_patch16_siglip_", "vit_large_patch16_siglip_")


@contextmanager
def parameters_follow_default_device() -> Any:
    """Inside, parameters go to the meta device when that is torch's default device; buffers are always real.

    Buffers that no checkpoint carries (rotary frequencies) must hold their values whatever happens to parameters.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(init_empty_weights(include_buffers=False))
        yield


class LayerScale(nn.Module):
    """timm's LayerScale under the parameter name of the released checkpoints."""

    def __init__(self, scale_factor: nn.Parameter) -> None:
        super().__init__()
        self.scale_factor = scale_factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last dimension of `x`."""
        return x * self.scale_factor


class VisionBackbone(nn.Module):
    """timm towers whose patch features are joined channel by channel (as released) or one after the other.

    A tower is any timm model with `forward_intermediates`; ViTs, hybrids with a convolutional stem and pure
    convolutional networks all give patches.

    Args:
        towers: name -> timm model id, or name -> {"id": timm model id, **keyword arguments of the timm model}.
            The order is the order of channels in `pixel_values` and in the features. Keys of ours: `mean` and `std`
            of the pixels (for the processor), `pos_embed_std` of learned positions' random start. timm starts them
            at 0.02, next to which a convolutional stem's output is fifty times as large: where a thing is then
            takes long to learn.
        image_size: side of the square input, in pixels.
        fusion: `channel` joins the towers' features of one patch (released); `sequence` keeps them as separate tokens,
            as wide as the widest tower's, zero where a tower has less.
        feature_layer: which block's output to take, counted from the end; -2 as released, no final norm.
        pretrained: load each tower's own weights (from the hub or its cache); not on the meta device.

    Attributes:
        dim: width of a patch feature.
        num_patches: visual tokens per image.
        has_film: whether `add_film` was called: then features depend on the instruction.
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
            tower = _build_tower(spec, image_size, pretrained)
            self.add_module(attribute, tower)
            shape, output_format = _probe(tower, image_size, feature_layer, spec["id"])
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
        """Rebuild, with random weights."""
        return cls(**config)

    def train(self, mode: bool = True) -> "VisionBackbone":
        """As any module, but frozen batch normalisation keeps its running statistics."""
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
        """Let language embeddings of this width scale and shift the features in every block, from now on.

        Raises:
            ValueError: for a tower that is no row of plain ViT blocks.
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
            _features(tower, image, self.feature_layer, output_format)
            for tower, image, output_format in zip(self.featurizers, pixels, self._formats, strict=True)
        ]

    def views(self, pixel_values: Tensor) -> int:
        """How many images V a row of pixels [B, 3 * towers * V, H, W] holds.

        Raises:
            ValueError: when the channels are no whole number of images.
        """
        views, rest = divmod(pixel_values.shape[1], 3 * len(self.towers))
        if rest or not views:
            raise ValueError(
                f"pixel_values have {pixel_values.shape[1]} channels: expected {3 * len(self.towers)} for each view"
            )
        return views

    def fuse(self, features: list[Tensor]) -> Tensor:
        """Join the towers' features into [B, P, dim]."""
        if self.fusion == "channel":
            return torch.cat(features, dim=2)
        return torch.cat([nn.functional.pad(f, (0, self.dim - f.shape[2])) for f in features], dim=1)

    def forward(self, pixel_values: Tensor, language: Tensor | None = None) -> Tensor:
        """Patch features [B, V * num_patches, dim] from pixels [B, 3 * towers * V, H, W] of V views.

        The views' patches stand one view after the other, as released by OpenVLA-OFT.

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


def tower_spec(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """A tower as {"id": timm id with its weights' tag, **keyword arguments}.

    An untagged SigLIP id means version 1, as it did when the released checkpoints were written; timm has since moved
    the untagged name to SigLIP 2.
    """
    plain: dict[str, Any] = {"id": spec} if isinstance(spec, str) else dict(spec)
    if not isinstance(plain.get("id"), str):
        raise ValueError(f"a vision tower needs `id`, the name of a timm model; got {dict(plain)}")
    if forbidden := [key for key in plain if key in _NOT_FOR_TOWERS or key.startswith("pretrained")]:
        raise ValueError(f"a vision tower takes its architecture's arguments, not {', '.join(forbidden)}")
    if plain["id"].startswith(_SIGLIP_V1) and "." not in plain["id"]:
        plain["id"] += ".webli"
    return plain


def _build_tower(spec: dict[str, Any], image_size: int, pretrained: bool) -> nn.Module:
    arguments = {k: v for k, v in spec.items() if k not in OURS}
    if not timm.is_model(spec["id"].partition(".")[0]):
        near = timm.list_models(f"*{spec['id'].partition('.')[0][:12]}*")[:5]
        raise ValueError(f"timm has no model {spec['id']!r}" + (f"; similar: {', '.join(near)}" if near else ""))
    pretrained = pretrained and torch.get_default_device().type != "meta"
    if pretrained:
        known = timm.get_pretrained_cfg(spec["id"])
        if known is None or not known.hf_hub_id:
            raise ValueError(f"timm has no weights for {spec['id']!r}: set pretrained=false to start from random ones")
        check_source(known.hf_hub_id)
    try:
        with parameters_follow_default_device():
            tower = _create(spec["id"], pretrained, image_size, arguments)
    except RuntimeError:
        # Hybrids run their stem once while they are built, which parameters without values do not survive.
        if torch.get_default_device().type != "meta":
            raise
        with torch.device("cpu"):
            tower = _create(spec["id"], pretrained, image_size, arguments)
        for module in tower.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta")))
    if "pos_embed_std" in spec and not pretrained:
        positions = getattr(tower, "pos_embed", None)
        if not isinstance(positions, nn.Parameter):
            raise ValueError(f"timm model {spec['id']!r} learns no positions: leave pos_embed_std out")
        nn.init.normal_(positions, std=spec["pos_embed_std"])
    for module in tower.modules():
        for name, child in module.named_children():
            if isinstance(child, TimmLayerScale):
                setattr(module, name, LayerScale(child.gamma))
    return tower


def _create(timm_id: str, pretrained: bool, image_size: int, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(timm_id, pretrained, num_classes=0, img_size=image_size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(timm_id, pretrained, num_classes=0, **arguments)


def _features(tower: nn.Module, pixels: Tensor, layer: int, output_format: str) -> Tensor:
    (features,) = tower.forward_intermediates(  # type: ignore[operator]
        pixels, indices=[layer], norm=False, stop_early=True, output_fmt=output_format, intermediates_only=True
    )
    return features if output_format == "NLC" else features.flatten(2).transpose(1, 2)


class _Reading(nn.Module):
    """Makes a tower's inner features callable as `forward`, for a dry run on the meta device."""

    def __init__(self, tower: nn.Module, layer: int, output_format: str) -> None:
        super().__init__()
        self.tower, self.layer, self.output_format = tower, layer, output_format

    def forward(self, pixels: Tensor) -> Tensor:
        return _features(self.tower, pixels, self.layer, self.output_format)


def _probe(tower: nn.Module, image_size: int, layer: int, name: str) -> tuple[tuple[int, int], str]:
    """Patches and width that `tower` gives, and the output format it speaks, found without computing anything."""
    if not hasattr(tower, "forward_intermediates"):
        raise ValueError(f"timm model {name!r} cannot give inner features (it has no forward_intermediates)")
    pixels = torch.empty(1, 3, image_size, image_size, device="meta")
    for output_format in ("NLC", "NCHW"):
        reading = _Reading(tower, layer, output_format)
        state = {k: v.to("meta") for k, v in [*reading.named_parameters(), *reading.named_buffers()]}
        try:
            with torch.no_grad():
                _, patches, dim = torch.func.functional_call(reading, state, (pixels,)).shape
        except AssertionError as error:
            if "utput" in str(error) and output_format == "NLC":
                continue
            raise ValueError(f"timm model {name!r} at {image_size} px, feature_layer={layer}: {error}") from error
        return (patches, dim), output_format
    raise AssertionError("unreachable")


def pixel_statistics(towers: Mapping[str, str | Mapping[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """Means and stds of `towers`: a tower's own `mean` and `std` where given, otherwise those timm knows."""
    means, stds = [], []
    for spec in map(tower_spec, towers.values()):
        known = timm.get_pretrained_cfg(spec["id"], allow_unregistered=True)
        if known is None:
            raise ValueError(f"timm has no model {spec['id']!r}")
        means.append(list(spec.get("mean", known.mean)))
        stds.append(list(spec.get("std", known.std)))
    return means, stds
