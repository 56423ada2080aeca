"""Encoded images -> uint8 RGB arrays, as the released data pipeline decodes and resizes them."""

import io
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from openvla_lightning.processor.gate import as_rgb

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]
ImageMode = Literal["released", "fast"]
JPEG_QUALITY = 95
JPEG = b"\xff\xd8"
"""The first bytes of every JPEG."""
PNG = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG."""
CHROMA_REPEATED = b"\xff\xfe\x00\x11chroma repeated"
"""A comment behind them; its length counts itself."""
BAND = 16
"""Lines of a resized image that are computed together: more lines need fewer calls but more weights that are zero."""
MOST_TERMS = 192
"""Length up to which MKL sums products one after the other; it splits longer sums, which changes the last bits."""


def load(encoded: bytes, size: int, mode: ImageMode = "released") -> Pixels:
    """Decode and resize to uint8 [size, size, 3].

    `fast` lets JPEG's own transform shrink large images first, and interpolates bicubically in integers.

    Raises:
        ValueError: these bytes are no image.
    """
    return fit(decode(encoded, at_least=0 if mode == "released" else size), size, mode)


def fit(pixels: Pixels, size: int, mode: ImageMode = "released") -> Pixels:
    """Resize a decoded image, [H, W, 3], to [size, size, 3] as `load` does."""
    if mode == "released":
        return resize(pixels, size)
    import torch

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if image.shape[2:] != (size, size):
        image = torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).contiguous().numpy()


def decode(encoded: bytes, at_least: int = 0) -> Pixels:
    """Decode JPEG, PNG, GIF, BMP or PPM to uint8 [H, W, 3].

    JPEGs are decoded with the fast integer DCT and plain chroma upsampling, bit-equal to the released pipeline; the
    usual defaults differ by up to 15 levels. The exception are frames of videos from `encode`, whose chroma is repeated
    as it was when the video was decoded. With `at_least`, a JPEG may be decoded at a reduced size of at least this.

    Raises:
        ValueError: these bytes are no image.
    """
    try:
        if encoded.startswith(JPEG):  # `is_jpeg` also requires that nothing follows its end
            repeated = encoded.startswith(CHROMA_REPEATED, len(JPEG))
            return simplejpeg.decode_jpeg(
                encoded, fastdct=True, fastupsample=repeated, min_height=at_least, min_width=at_least
            )
        return np.array(as_rgb(Image.open(io.BytesIO(encoded))))
    except Exception as error:  # damaged bytes raise any error: SyntaxError, struct.error, DecompressionBomb
        raise ValueError(f"an image of {len(encoded)} bytes cannot be decoded: {error}") from None


def problem_of(encoded: bytes, every_pixel: bool = False) -> str | None:
    """What is wrong with an encoded image, to be put behind its name; None if nothing is.

    JPEG and PNG are recognised by their ends, without decoding; with `every_pixel`, they are decoded, too.
    """
    if encoded.startswith(JPEG):
        whole = b"\xff\xd9" in encoded[-16:] or _ends(encoded)  # some cameras add hundreds of bytes after the end
    elif encoded.startswith(PNG):
        whole = b"IEND" in encoded[-16:] or _decodes(encoded)
    elif not (whole := _decodes(encoded)) and not encoded.startswith((b"BM", b"GIF8")):
        return "is no JPEG, PNG, BMP or GIF"
    if not whole:
        return "is an image cut short"
    if every_pixel:
        try:
            decode(encoded)
        except ValueError as error:
            return f"is damaged: {error}"
    return None


def _ends(jpeg: bytes) -> bool:
    """Whether a JPEG's end marker comes after the start of its pixels, where no other bytes look like the marker.

    Before that start, a thumbnail may have its own end marker. Decoding is no test, because libraries also decode
    truncated images.
    """
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        if jpeg[place + 1] == 0xDA:
            return jpeg.find(b"\xff\xd9", place) >= 0
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return False


def _decodes(image: bytes) -> bool:
    try:
        decode(image)
    except ValueError:
        return False
    return True


def encode(pixels: Pixels, chroma_repeated: bool = False) -> bytes:
    """Encode [H, W, 3] as JPEG, quality 95.

    With `chroma_repeated`, every 2 x 2 pixels have the same chroma, as in a decoded 4:2:0 video. It is then stored once
    and repeated by `decode`, because a comment in the JPEG says so. That is almost as exact, and decodes 1.5 times as
    fast.
    """
    sampling = "420" if chroma_repeated else "444"
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=JPEG_QUALITY, colorsubsampling=sampling)
    return JPEG + CHROMA_REPEATED + encoded[len(JPEG) :] if chroma_repeated else encoded


def resize(image: Pixels, size: int) -> Pixels:
    """Resize [H, W, 3] to [size, size, 3] by antialiased Lanczos-3 in float32, aspect ratio not kept, as released."""
    if image.shape[:2] == (size, size):
        return image
    import torch  # here, because indexing processes do not need torch

    height, width, _ = image.shape
    rows = torch.empty(size, width * 3)
    lines = torch.from_numpy(image).float().view(height, width * 3)
    for first, low, high, weights in _bands(height, size):
        torch.mm(weights, lines[low:high], out=rows[first : first + len(weights)])
    resized = torch.empty(size, size * 3)
    for first, low, high, weights in _bands_of_columns(width, size):
        torch.mm(rows[:, low:high], weights, out=resized[:, first : first + weights.shape[1]])
    return levels(resized.round_().clamp_(0, 255)).view(size, size, 3).numpy()


def levels(values: "Tensor") -> "Tensor":
    """Numbers from 0 to 255 as uint8, truncated."""
    import torch

    if values.device.type != "cpu":
        return values.to(torch.uint8)
    return torch.from_numpy(values.numpy().astype(np.uint8))  # in less than half of torch's time


@cache
def _bands(length: int, size: int, band: int = BAND) -> "list[tuple[int, int, int, Tensor]]":
    """For every `band` lines of the result: the first line, the range of source lines, and the weights."""
    import torch

    weights = lanczos(length, size)
    bands = []
    for first in range(0, size, band):
        used = np.flatnonzero(weights[first : first + band].any(axis=0))
        low, high = int(used[0]), int(used[-1]) + 1
        bands.append((first, low, high, torch.from_numpy(weights[first : first + band, low:high].copy())))
    return bands


@cache
def _bands_of_columns(length: int, size: int) -> "list[tuple[int, int, int, Tensor]]":
    """The same for the columns of interleaved RGB pixels, to be multiplied from the right.

    Two thirds of these weights are zeros, but this is faster than separating the colours. If an image shrinks much,
    bands are narrower: only short sums have the same bits with the zeros as without them.
    """
    import torch

    bands: list[tuple[int, int, int, Tensor]] = []
    for band in (BAND, BAND // 2, BAND // 4, 1):
        bands = _bands(length, size, band)
        if all(3 * (high - low) <= MOST_TERMS for _, low, high, _ in bands):
            break
    return [(3 * first, 3 * low, 3 * high, torch.kron(w, torch.eye(3)).T.contiguous()) for first, low, high, w in bands]


def lanczos(length: int, size: int) -> NDArray[np.float32]:
    """Weights [size, length] that resize a line by Lanczos-3; when it shrinks, the kernel is widened in proportion."""
    scale = length / size
    wider = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    x = (np.arange(length) + 0.5 - centres[:, None]) / wider
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
