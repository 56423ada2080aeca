"""Vision towers: timm models, built from name and arguments, whose features are read at an inner layer."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from openvla_lightning.model.hub import check_source
from openvla_lightning.model.timm_models import LayerScale as TimmLayerScale
from openvla_lightning.model.timm_models import timm

OURS = ("id", "mean", "std", "pos_embed_std")
"""Keys of a tower that are not arguments of its timm model."""

_NOT_FOR_TOWERS = ("checkpoint_path", "cache_dir", "num_classes", "img_size", "scriptable", "weights_only")
_SIGLIP_V1 = ("vit_so400m_patch14_siglip_", "vit_base_patch16_siglip_", "vit_large_patch16_siglip_")


@contextmanager
def parameters_follow_default_device() -> Any:
    """Inside this context, parameters are on the meta device if it is torch's default device; buffers are always real.

    Buffers that no checkpoint contains (rotary frequencies) must hold their values even if parameters do not.
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


def build_tower(spec: dict[str, Any], image_size: int, pretrained: bool) -> nn.Module:
    """The timm model of a `tower_spec`, on torch's default device.

    Raises:
        ValueError: for a name or an argument that timm does not know.
    """
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
        # Hybrids run their stem once while they are built, which fails if parameters have no values.
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


def tower_features(tower: nn.Module, pixels: Tensor, layer: int, output_format: str) -> Tensor:
    """Patch features [B, P, D_tower] of pixels [B, 3, H, W], read at block `layer`, without a final norm."""
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
        return tower_features(self.tower, pixels, self.layer, self.output_format)


def probe(tower: nn.Module, image_size: int, layer: int, name: str) -> tuple[tuple[int, int], str]:
    """Number and width of patches from `tower`, and its output format, found on the meta device."""
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
    """Means and stds of `towers`: a tower's `mean` and `std` if given, otherwise timm's."""
    means, stds = [], []
    for spec in map(tower_spec, towers.values()):
        known = timm.get_pretrained_cfg(spec["id"], allow_unregistered=True)
        if known is None:
            raise ValueError(f"timm has no model {spec['id']!r}")
        means.append(list(spec.get("mean", known.mean)))
        stds.append(list(spec.get("std", known.std)))
    return means, stds
