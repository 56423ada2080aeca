"""The paper's image augmentation, batched, on the device, with every parameter drawn independently."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from openvla_lightning.data.images import levels
from openvla_lightning.data.permutation import Uint, key, scramble, uniform

CPU = torch.device("cpu")
CHUNK = 2**18
"""Values that a CPU processes at a time; they fit the cache of one core."""
SMALLEST = 0.01
"""The smallest share of a picture, and the smallest aspect ratio, that a crop may have."""


class Augmentation:
    """Random crops and colour changes, in the given order.

    Every operation keeps values in [0, 1], as released. The released code drew all parameters of an image from one
    random number, so its crops lay on the diagonal and its brightness, contrast, saturation and hue changed together.
    Here they are independent, as the paper describes, unless `shared_draw` is set.

    Args:
        operations: `random_resized_crop: {scale: [a, b], ratio: [a, b]}` (share of the area, aspect ratio),
            `random_brightness: [d]` (add -d..d), `random_contrast: [a, b]` (about each channel's mean),
            `random_saturation: [a, b]`, `random_hue: [d]` (turn by -d..d of a full circle).
        shared_draw: one random number per image, as released.

    Raises:
        ValueError: an operation is unknown or its range is not valid.
    """

    def __init__(self, operations: Mapping[str, Any], shared_draw: bool = False) -> None:
        self.operations: list[tuple[Callable[[Tensor, Tensor], Tensor], int]] = []
        ranges: list[tuple[float, float]] = []
        names = list(operations)
        for place, name in enumerate(names):
            if name not in OPERATIONS:
                near = get_close_matches(name, OPERATIONS, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"data.augment: unknown operation {name!r}{hint}; known: {', '.join(OPERATIONS)}")
            bounds = _ranges(name, operations[name])
            ranges += bounds
            if names[place - 1 : place + 1] == ["random_saturation", "random_hue"]:  # both in one pass
                self.operations[-1] = (saturation_and_hue, 2)
            else:
                self.operations.append((OPERATIONS[name], len(bounds)))
        self.shared_draw, self.num_draws = shared_draw, len(ranges)
        self._ranges = {CPU: torch.tensor(ranges).reshape(-1, 2).T}

    def draws(self, seed: int, numbers: Sequence[int], camera: int = 0) -> NDArray[np.float32]:
        """Uniform numbers in [0, 1), float32 [B, num_draws]: a function of seed, samples' numbers and camera."""
        streams = scramble(np.asarray(numbers, np.uint64) + (key(seed, 4, camera) if camera else key(seed, 4)))
        columns: Uint = np.arange(self.num_draws, dtype=np.uint64)
        drawn = uniform(np.add.outer(streams, columns)).astype(np.float32)
        return np.minimum(drawn, np.float32(1 - 2**-24))  # rounding may reach 1

    def views(self, pixels: Tensor, seed: int, numbers: Sequence[int], cameras: int) -> Tensor:
        """Augment pixels uint8 [B, 3V, H, W]. The V views are pictures of `cameras` cameras, earlier ones included.

        Each camera gets its own random draw, as in OpenVLA-OFT. All pictures of one camera get the same draw, so that
        the augmentation adds no apparent motion.
        """
        images = pixels.reshape(-1, 3, *pixels.shape[2:])
        drawn = [self.draws(seed, numbers, camera) for camera in range(cameras)]
        draws = np.stack([drawn[view % cameras] for view in range(pixels.shape[1] // 3)], axis=1)
        on_device = torch.from_numpy(draws).flatten(0, 1).to(pixels.device, non_blocking=True)
        return self(images, on_device).reshape(pixels.shape)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment images, uint8 [B, 3, H, W], on their device with uniform numbers `draws`, float32 [B, num_draws]."""
        if draws.device not in self._ranges:
            self._ranges[draws.device] = self._ranges[CPU].to(draws.device)
        low, high = self._ranges[draws.device]
        values = low + (high - low) * (draws[:, :1] if self.shared_draw else draws)
        if images.is_cuda:
            return self._apply(images, values)
        size = max(1, CHUNK // images[0].numel())
        out = torch.empty(images.shape, dtype=torch.uint8)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            out[part] = self._apply(images[part], values[part])
        return out

    def _apply(self, images: Tensor, values: Tensor) -> Tensor:
        column = 0
        for operation, count in self.operations:
            images = operation(images if operation is crop else _shares(images), values[:, column : column + count])
            column += count
        return levels(_shares(images).mul_(255.5))  # as in tf.image.convert_image_dtype to uint8


def _shares(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], contiguous in memory."""
    return _scaled(images.contiguous())


def _scaled(images: Tensor) -> Tensor:
    """Images in [0, 1]; uint8 is scaled, floats are kept."""
    return images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images


def crop(images: Tensor, values: Tensor) -> Tensor:
    """Crop and resize to the old size, bilinearly with corners aligned.

    Args:
        images: [B, 3, H, W], uint8 or in [0, 1].
        values: [B, 4]: share of the area, aspect ratio, and the crop's vertical and horizontal place in 0..1.
    """
    scale, ratio, top, left = values.T
    height, width = (scale / ratio).sqrt().clamp(max=1), (scale * ratio).sqrt().clamp(max=1)
    down, across = _places(top, height, images.shape[2]), _places(left, width, images.shape[3])
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=-1)
    return grid_sample(_scaled(images), grid, mode="bilinear", padding_mode="border", align_corners=True)


def _places(free: Tensor, share: Tensor, length: int) -> Tensor:
    """Where a share [B] of a line is read for `length` new pixels, [B, length] in -1..1; `free` [B] is its place."""
    line = torch.linspace(0, 2, length, device=share.device)
    return line * share[:, None] + (2 * free * (1 - share) - 1)[:, None]


def brightness(images: Tensor, values: Tensor) -> Tensor:
    """Add values [B, 1]."""
    return images.add_(values[:, :, None, None]).clamp_(0, 1)


def contrast(images: Tensor, values: Tensor) -> Tensor:
    """Scale the distance to each channel's mean by values [B, 1]."""
    by = values[:, :, None, None]
    mean = images.sum(dim=(2, 3), keepdim=True) / images[0, 0].numel()
    return images.mul_(by).add_(mean * (1 - by)).clamp_(0, 1)


def saturation(images: Tensor, values: Tensor) -> Tensor:
    """Scale HSV's saturation by values [B, 1], at most to 1.

    At constant hue and value, a colour's distance to its largest channel is proportional to its saturation, so no
    conversion to HSV is needed.
    """
    top = images.amax(dim=1, keepdim=True)
    room = top / (top - images.amin(dim=1, keepdim=True)).clamp_(min=1e-12)
    factor = torch.minimum(room, values[:, :, None, None])
    return images.sub_(top).mul_(factor).add_(top)


def hue(images: Tensor, values: Tensor) -> Tensor:
    """Rotate HSV's hue by values [B, 1], as shares of a full circle."""
    return saturation_and_hue(images, torch.cat([torch.ones_like(values), values], dim=1))


def saturation_and_hue(images: Tensor, values: Tensor) -> Tensor:
    """Scale HSV's saturation, at most to 1, and rotate its hue, by values [B, 2]."""
    by, turn = values.T[:, :, None, None]
    red, green, blue = images.unbind(1)
    top = torch.maximum(red, green)
    bottom = torch.minimum(red, green)
    torch.maximum(top, blue, out=top)
    torch.minimum(bottom, blue, out=bottom)
    chroma = top - bottom
    # the largest channel, as numbers: selecting with `where` takes ten times as long on a CPU
    is_red, is_green = torch.empty_like(top), torch.empty_like(top)
    torch.eq(red, top, out=is_red)
    torch.eq(green, top, out=is_green)
    sextant = (red - green).add_(chroma, alpha=4)
    sextant.lerp_((blue - red).add_(chroma, alpha=2), is_green).lerp_(green - blue, is_red)
    circle = sextant.div_(chroma.clamp(min=1e-12).mul_(6)).add_(turn + 1).frac_()
    torch.minimum(chroma.mul_(by), top, out=chroma)
    bottom = top.sub_(chroma)
    # Above the smallest channel, red has 6 |circle - 1/2| - 1 of the chroma, clipped to 0..1, ...
    out = torch.empty_like(images)
    red, green, blue = out.unbind(1)
    ends = (1 / 6, 2 / 6)
    torch.addcmul(bottom - chroma, torch.sub(circle, 3 / 6).abs_().clamp_(*ends), chroma, value=6, out=red)
    upper = bottom.add_(chroma, alpha=2)  # ... green 2 - 6 |circle - 1/3|, blue 2 - 6 |circle - 2/3|
    torch.addcmul(upper, torch.sub(circle, 2 / 6).abs_().clamp_(*ends), chroma, value=-6, out=green)
    torch.addcmul(upper, circle.sub_(4 / 6).abs_().clamp_(*ends), chroma, value=-6, out=blue)
    return out


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random_resized_crop": crop,
    "random_brightness": brightness,
    "random_contrast": contrast,
    "random_saturation": saturation,
    "random_hue": hue,
}


BOUNDS = {
    "random_brightness": (-1.0, 1.0),
    "random_contrast": (0.0, np.inf),
    "random_saturation": (0.0, np.inf),
    "random_hue": (-1.0, 1.0),
    "random_resized_crop.scale": (SMALLEST, 1.0),
    "random_resized_crop.ratio": (SMALLEST, np.inf),
}
"""Limits of each range; beyond them, pictures lose their meaning or a checkpoint could not be used for acting."""


def _ranges(name: str, options: Any) -> list[tuple[float, float]]:
    if name == "random_resized_crop":
        if not isinstance(options, Mapping) or set(options) != {"scale", "ratio"}:
            raise ValueError(f"data.augment.{name} takes {{scale: [low, high], ratio: [low, high]}}, got {options!r}")
        return [_range(f"{name}.{part}", options[part]) for part in ("scale", "ratio")] + [(0.0, 1.0), (0.0, 1.0)]
    if name in ("random_brightness", "random_hue") and _are_numbers(options) and len(options) == 1:
        return [_range(name, [-options[0], options[0]])]
    return [_range(name, options)]


def _range(name: str, values: Any) -> tuple[float, float]:
    least, most = BOUNDS[name]
    if not _are_numbers(values) or len(values) != 2 or not least <= values[0] <= values[1] <= most:
        limits = f"not below {least:g}" if most == np.inf else f"within {least:g}..{most:g}"
        raise ValueError(f"data.augment.{name}: expected [low, high], {limits}, got {values!r}")
    return float(values[0]), float(values[1])


def _are_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(one, int | float) and np.isfinite(one) for one in values)


def read_augmentation(augment: Mapping[str, Any] | None) -> tuple[Augmentation | None, float | None]:
    """The augmentation that `data.augment` describes, and the share of the picture that its crops keep."""
    options = dict(augment or {})
    shared_draw = bool(options.pop("shared_draw", False))
    if not options:
        return None, None
    augmentation = Augmentation(options, shared_draw)
    scales = options.get("random_resized_crop", {}).get("scale")
    return augmentation, sum(scales) / len(scales) if scales else None
