"""Images -> `pixel_values`, as in the released processor."""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openvla_lightning.processor.gate import as_rgb

CPU = torch.device("cpu")
ResizeStrategy = Literal["resize-naive", "letterbox", "resize-crop"]


class ImageTransform:
    """uint8 images of any size -> normalised tensors, three channels per vision tower.

    Args:
        image_size: side of the square output, in pixels.
        means, stds: one triple per tower.
        resize_strategy: `resize-naive` (bicubic, aspect ratio not kept; bit-equal to the released processor),
            `letterbox` (pad to a square with the first tower's mean, then resize) or `resize-crop` (shorter side to
            `image_size`, then a centre crop).
        crop_area: share of the area that a centre crop after resizing keeps; the crop is scaled up again. Use 0.9 if
            training used random crops of 90 % of the area, None for no crop.
    """

    def __init__(
        self,
        image_size: int,
        means: Sequence[Sequence[float]],
        stds: Sequence[Sequence[float]],
        resize_strategy: ResizeStrategy = "resize-naive",
        crop_area: float | None = None,
    ) -> None:
        if resize_strategy not in ("resize-naive", "letterbox", "resize-crop"):
            raise ValueError(
                f"unknown resize strategy {resize_strategy!r}; known: resize-naive, letterbox, resize-crop"
            )
        if crop_area is not None and not 0.0 < crop_area <= 1.0:
            raise ValueError(f"crop_area must lie in (0, 1], got {crop_area}")
        if len(means) != len(stds) or any(len(triple) != 3 for triple in [*means, *stds]):
            raise ValueError(f"means and stds must hold one triple per tower, got {means} and {stds}")
        self.image_size, self.resize_strategy, self.crop_area = image_size, resize_strategy, crop_area
        self.means, self.stds = [list(m) for m in means], [list(s) for s in stds]
        moments = (torch.tensor(values, dtype=torch.float32, device=CPU) for values in (means, stds))
        self._moments = {CPU: tuple(moment.view(1, -1, 3, 1, 1) for moment in moments)}

    def __call__(self, images: Sequence[Image.Image | NDArray[np.uint8]]) -> Tensor:
        """Return `pixel_values`, float32 [B, 3 * towers, H, W]."""
        return self.normalise(self.pixels(images))

    def pixels(self, images: Sequence[Image.Image | NDArray[np.uint8]]) -> Tensor:
        """Resize and crop: uint8 [B, 3, H, W] in channels-last memory, as cameras deliver pixels."""
        pixels = torch.from_numpy(np.stack([self.resize(image) for image in images]))
        if self.crop_area is not None:
            pixels = center_crop(pixels, self.crop_area)
        return pixels.permute(0, 3, 1, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 [B, 3V, H, W] by each tower's mean and std: float32 [B, 3 * towers * V, H, W], on the device.

        A view's channels are those of the first tower, then those of the second, as released.
        """
        if pixels.device not in self._moments:
            self._moments[pixels.device] = tuple(moment.to(pixels.device) for moment in self._moments[CPU])
        mean, std = self._moments[pixels.device]
        images = pixels.contiguous().reshape(-1, 3, *pixels.shape[2:])  # on the device, which copies faster than a host
        return ((images.float().div_(255)[:, None] - mean) / std).reshape(len(pixels), -1, *pixels.shape[2:])

    def resize(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return `image` as uint8 [image_size, image_size, 3].

        Raises:
            TypeError: it is neither an array nor a PIL image.
            ValueError: it is an array of another dtype or shape, or has no pixels.
        """
        if not isinstance(image, np.ndarray | Image.Image):
            raise TypeError(f"an image is a uint8 array [H, W, 3] or a PIL image, not {type(image).__name__}")
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"an image must be a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
            if not image.size:
                raise ValueError(f"an image without pixels: uint8 {list(image.shape)}")
            if image.shape[:2] == (self.image_size, self.image_size):
                return image
            image = Image.fromarray(image)
        return np.asarray(self._resize(as_rgb(image)))

    def _resize(self, image: Image.Image) -> Image.Image:
        side = self.image_size
        if self.resize_strategy == "letterbox":
            image = self._letterbox(image)
        elif self.resize_strategy == "resize-crop":
            scale = side / min(image.size)
            width, height = (max(side, int(length * scale)) for length in image.size)
            left, top = round((width - side) / 2), round((height - side) / 2)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            return image.crop((left, top, left + side, top + side))
        return image.resize((side, side), Image.Resampling.BICUBIC)

    def _letterbox(self, image: Image.Image) -> Image.Image:
        """As released, with equal integer margins on both sides, so the result may be one pixel from square."""
        longest = max(image.size)
        horizontal, vertical = ((longest - length) // 2 for length in image.size)
        fill = tuple(int(channel * 255) for channel in self.means[0])
        size = (image.width + 2 * horizontal, image.height + 2 * vertical)
        canvas = Image.new("RGB", size, fill)
        canvas.paste(image, (horizontal, vertical))
        return canvas


def center_crop(images: Tensor, area: float) -> Tensor:
    """Centre crop to `area` of uint8 images [B, H, W, 3], scaled up again, bit-equal to the released evaluation.

    That code calls `tf.image.crop_and_resize` (bilinear, corners aligned) between two `convert_image_dtype`s, in
    float32 and in this order.
    """
    (up, down, y), (left, right, x) = (_crop_lines(length, area) for length in images.shape[1:3])
    floats = images.float() * float(np.float32(1 / 255))
    upper, lower = floats[:, up], floats[:, down]
    upper = upper[:, :, left] + (upper[:, :, right] - upper[:, :, left]) * x[:, None]
    lower = lower[:, :, left] + (lower[:, :, right] - lower[:, :, left]) * x[:, None]
    return ((upper + (lower - upper) * y[:, None, None]).clamp(0, 1) * 255.5).to(torch.uint8)


@cache
def _crop_lines(length: int, area: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each line of the scaled crop: the two image lines around it, and the weight of the second."""
    one, span = np.float32(1), np.float32(length - 1)
    side = np.sqrt(np.float32(area))
    first, last = (one - side) / np.float32(2), (one + side) / np.float32(2)
    place = first * span + np.arange(length, dtype=np.float32) * ((last - first) * span / max(span, one))
    low = np.floor(place)
    high = np.minimum(np.ceil(place), span)
    return (
        torch.from_numpy(low.astype(np.int64)),
        torch.from_numpy(high.astype(np.int64)),
        torch.from_numpy(place - low),
    )
