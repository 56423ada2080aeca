"""Encoded images -> uint8 RGB arrays, as the released data pipeline decodes and resizes them."""

import io
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]
ImageMode = Literal["released", "fast"]


def load(encoded: bytes, size: int, mode: ImageMode = "released") -> Pixels:
    """Decode and resize to uint8 [size, size, 3]."""
    return resize(decode(encoded), size)


def decode(encoded: bytes) -> Pixels:
    """Decode JPEG or PNG to uint8 [H, W, 3].

    JPEGs with the fast integer DCT and plain chroma upsampling: bit-equal to the released pipeline; the usual
    defaults differ by up to 15 levels.

    Raises:
        ValueError: these bytes are no image.
    """
    try:
        if simplejpeg.is_jpeg(encoded):
            return simplejpeg.decode_jpeg(encoded, fastdct=True, fastupsample=False)
        return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except (ValueError, OSError, UnidentifiedImageError) as error:
        raise ValueError(f"an image of {len(encoded)} bytes cannot be decoded: {error}") from None


def resize(image: Pixels, size: int) -> Pixels:
    """Resize [H, W, 3] to [size, size, 3] by antialiased Lanczos-3 in float32, aspect ratio not kept, as released."""
    if image.shape[:2] == (size, size):
        return image
    import torch  # here, because processes that index need none of it

    channels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    try:
        resized = torch.nn.functional.interpolate(channels, (size, size), mode="lanczos", antialias=True)[0]
    except (NotImplementedError, ValueError):  # torch < 2.13
        planes = [Image.fromarray(plane) for plane in image.transpose(2, 0, 1).astype(np.float32)]
        lanczos = Image.Resampling.LANCZOS
        resized = torch.from_numpy(np.stack([np.asarray(plane.resize((size, size), lanczos)) for plane in planes]))
    return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
