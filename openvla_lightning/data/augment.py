"""The paper's image augmentation, batched, on the device, with every parameter drawn independently."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvla_lightning.data.permutation import Uint, key, scramble, uniform

CHUNK = 2**18
"""Values worked on at a time on a CPU: what fits the cache of one core."""


class Augmentation:
    """Random crop and colours, in the order given.

    Each operation clips to [0, 1] as the released ones do. The released code drew every parameter of an image from one
    shared random number, so its crops lay on the diagonal and its brightness, contrast, saturation and hue moved
    together; here they are independent, as the paper describes them, unless `shared_draw` asks for the released way.

    Args:
        operations: `random_resized_crop: {scale: [a, b], ratio: [a, b]}` (share of the area, aspect ratio),
            `random_brightness: [d]` (add -d..d), `random_contrast: [a, b]` (about each channel's mean),
            `random_saturation: [a, b]`, `random_hue: [d]` (turn by -d..d of a full circle).
        shared_draw: one random number per image, as released.

    Raises:
        ValueError: an operation is unknown or its range is not one.
    """

    def __init__(self, operations: Mapping[str, Any], shared_draw: bool = False) -> None:
        self.operations: list[tuple[Callable[[Tensor, Tensor], Tensor], list[tuple[float, float]]]] = []
        for name, options in operations.items():
            if name not in OPERATIONS:
                near = get_close_matches(name, OPERATIONS, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"data.augment: unknown operation {name!r}{hint}; known: {', '.join(OPERATIONS)}")
            self.operations.append((OPERATIONS[name], _ranges(name, options)))
        self.shared_draw = shared_draw
        self.num_draws = sum(len(ranges) for _, ranges in self.operations)

    def draws(self, seed: int, numbers: Sequence[int], camera: int = 0) -> NDArray[np.float32]:
        """Uniform numbers in [0, 1), float32 [B, num_draws]: a function of seed, samples' numbers and camera."""
        streams = scramble(np.asarray(numbers, np.uint64) + (key(seed, 4, camera) if camera else key(seed, 4)))
        columns: Uint = np.arange(self.num_draws, dtype=np.uint64)
        drawn = uniform(np.add.outer(streams, columns)).astype(np.float32)
        return np.minimum(drawn, np.float32(1 - 2**-24))  # rounding may reach 1

    def views(self, pixels: Tensor, seed: int, numbers: Sequence[int], cameras: int) -> Tensor:
        """Augment pixels uint8 [B, 3V, H, W]. The V views are pictures of `cameras` cameras, earlier ones included.

        Each camera is augmented by itself, as in OpenVLA-OFT, and all of its pictures alike: nothing seems to move.
        """
        images = pixels.reshape(-1, 3, *pixels.shape[2:])
        drawn = [self.draws(seed, numbers, camera) for camera in range(cameras)]
        draws = np.stack([drawn[view % cameras] for view in range(pixels.shape[1] // 3)], axis=1)
        on_device = torch.from_numpy(draws).flatten(0, 1).to(pixels.device, non_blocking=True)
        return self(images, on_device).reshape(pixels.shape)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment images, uint8 [B, 3, H, W], with uniform numbers `draws`, float32 [B, num_draws], where they are."""
        if self.shared_draw:
            draws = draws[:, :1].expand_as(draws)
        if images.is_cuda:
            return self._apply(images, draws)
        size = max(1, CHUNK // images[0].numel())
        parts = zip(images.split(size), draws.split(size), strict=True)
        return torch.cat([self._apply(part, own) for part, own in parts])

    def _apply(self, images: Tensor, draws: Tensor) -> Tensor:
        floats = images.float().div_(255)
        column = 0
        for operation, ranges in self.operations:
            low, high = torch.tensor(ranges, device=draws.device).T
            values = low + (high - low) * draws[:, column : column + len(ranges)]
            floats = operation(floats, values).clamp_(0, 1)
            column += len(ranges)
        return floats.mul_(255.5).to(torch.uint8)  # as tf.image.convert_image_dtype goes back to uint8


def crop(images: Tensor, values: Tensor) -> Tensor:
    """Cut out a part and scale it up again, bilinear with corners aligned.

    Args:
        images: [B, 3, H, W] in [0, 1].
        values: [B, 4]: share of the area, aspect ratio, and where the free space goes (0 = top or left).
    """
    scale, ratio, top, left = values.T
    height, width = (scale / ratio).sqrt().clamp(max=1), (scale * ratio).sqrt().clamp(max=1)
    x = (2 * left - 1) * (1 - width) + torch.linspace(-1, 1, images.shape[3], device=images.device)[:, None] * width
    y = (2 * top - 1) * (1 - height) + torch.linspace(-1, 1, images.shape[2], device=images.device)[:, None] * height
    grid = torch.stack(torch.broadcast_tensors(x.T[:, None], y.T[:, :, None]), dim=-1)
    return torch.nn.functional.grid_sample(images, grid, align_corners=True)


def brightness(images: Tensor, values: Tensor) -> Tensor:
    """Add values [B, 1]."""
    return images.add_(values[:, :, None, None])


def contrast(images: Tensor, values: Tensor) -> Tensor:
    """Scale the distance to each channel's mean by values [B, 1]."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images.sub_(mean).mul_(values[:, :, None, None]).add_(mean)


def saturation(images: Tensor, values: Tensor) -> Tensor:
    """Scale HSV's saturation by values [B, 1], at most to 1.

    At constant hue and value a colour's distance to its largest channel is proportional to saturation, so no
    conversion is needed.
    """
    top = images.amax(dim=1, keepdim=True)
    room = top / (top - images.amin(dim=1, keepdim=True)).clamp_(min=1e-12)
    factor = torch.minimum(room, values[:, :, None, None])
    return images.sub_(top).mul_(factor).add_(top)


def hue(images: Tensor, values: Tensor) -> Tensor:
    """Turn HSV's hue by values [B, 1], as shares of a full circle."""
    red, green, blue = images.unbind(1)
    bottom, top = images.amin(dim=1), images.amax(dim=1)
    chroma = top - bottom
    # which channel is the largest, as numbers: selecting with `where` takes ten times as long on a CPU
    is_red, is_green = red.clone().eq_(top), green.clone().eq_(top)
    sextant = (red - green).add_(chroma, alpha=4)
    sextant.lerp_((blue - red).add_(chroma, alpha=2), is_green).lerp_(green - blue, is_red)
    sextant.div_(chroma.clamp(min=1e-12)).add_(6 * values[:, :, None])
    sextant.sub_(sextant.div(6).floor_(), alpha=6)  # into 0 .. 6
    shares = (
        (sextant - 3).abs_().sub_(1),  # of the chroma that each channel has above the smallest one
        (sextant - 2).abs_().neg_().add_(2),
        (sextant - 4).abs_().neg_().add_(2),
    )
    return torch.stack([share.clamp_(0, 1).mul_(chroma).add_(bottom) for share in shares], dim=1)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random_resized_crop": crop,
    "random_brightness": brightness,
    "random_contrast": contrast,
    "random_saturation": saturation,
    "random_hue": hue,
}


def _ranges(name: str, options: Any) -> list[tuple[float, float]]:
    if name == "random_resized_crop":
        if not isinstance(options, Mapping) or set(options) != {"scale", "ratio"}:
            raise ValueError(f"data.augment.{name} takes {{scale: [low, high], ratio: [low, high]}}, got {options!r}")
        return [_range(name, options["scale"]), _range(name, options["ratio"]), (0.0, 1.0), (0.0, 1.0)]
    if name in ("random_brightness", "random_hue") and isinstance(options, Sequence) and len(options) == 1:
        return [_range(name, [-options[0], options[0]])]
    return [_range(name, options)]


def _range(name: str, values: Any) -> tuple[float, float]:
    if not isinstance(values, Sequence) or len(values) != 2 or not values[0] <= values[1]:
        raise ValueError(f"data.augment.{name}: expected [low, high], got {values!r}")
    return float(values[0]), float(values[1])


def read_augmentation(augment: Mapping[str, Any] | None) -> tuple[Augmentation | None, float | None]:
    """The augmentation that `data.augment` describes, and the share of the picture that its crops keep."""
    options = dict(augment or {})
    shared_draw = bool(options.pop("shared_draw", False))
    scales = options.get("random_resized_crop", {}).get("scale")
    return Augmentation(options, shared_draw) if options else None, sum(scales) / len(scales) if scales else None
