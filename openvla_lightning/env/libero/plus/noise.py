"""LIBERO-Plus's sensor noise: five corruptions of the agent view, in ten severities each.

They follow Hendrycks and Dietterich's (2019) image corruptions. LIBERO-Plus applies them to the rendered picture,
before it is rotated or resized, and draws new random numbers for each picture. Its motion blur is ImageMagick's; here
it is the same sum in NumPy.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

Pixels = NDArray[np.uint8]
Random = np.random.RandomState

_SIDE = 224
"""Glass blur moves pixels of the first rows and columns only, up to this one, although a picture has 256."""

_MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
_ZOOM = (
    *((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    *((1.36, 0.01), (1.41, 0.01), (1.46, 0.02), (1.51, 0.02), (1.56, 0.03)),
)
_FOG = (
    *((0.5, 3.0), (1.0, 2.8), (1.5, 2.5), (2.0, 2.2), (2.5, 2.0)),
    *((3.0, 1.8), (3.5, 1.6), (4.0, 1.5), (4.5, 1.4), (5.0, 1.3)),
)
_GLASS = (
    *((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2)),
    *((1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1)),
)


def corrupt(picture: Pixels, noise: int, random: Random) -> Pixels:
    """The rendered picture [256, 256, 3] with the noise of this number.

    Args:
        noise: 1 to 50, as at the end of a task's name: severities 1 to 10 of each of `NOISES`, in their order.

    Raises:
        ValueError: for another number.
    """
    severity = severity_of(noise)
    return NOISES[kind_of_noise(noise)](picture, severity - 1, random)


def kind_of_noise(noise: int) -> str:
    """The name in `NOISES` of a noise's number; raises ValueError for a number that LIBERO-Plus does not have."""
    if not 1 <= noise <= 10 * len(NOISES):
        raise ValueError(f"LIBERO-Plus has sensor noises 1 to {10 * len(NOISES)}, not {noise}")
    return list(NOISES)[(noise - 1) // 10]


def severity_of(noise: int) -> int:
    """The severity, 1 to 10, of a noise's number."""
    return (noise - 1) % 10 + 1


def _motion_blur(picture: Pixels, severity: int, random: Random) -> Pixels:
    """ImageMagick's `MotionBlurImage`: half a Gaussian along a line, beyond the edge the edge's pixels."""
    radius, sigma = _MOTION[severity]
    angle = np.radians(random.uniform(-45, 45))
    length = 2 * radius + 1
    steps = np.arange(length)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    right = np.ceil(steps * np.cos(angle) - 0.5).astype(int)
    down = np.ceil(steps * np.sin(angle) - 0.5).astype(int)
    height, width, _ = picture.shape
    wide = np.pad(picture, ((length, length), (length, length), (0, 0)), mode="edge").astype(np.float64)
    blurred = np.zeros(picture.shape)
    for weight, dx, dy in zip(weights, right, down, strict=True):
        blurred += weight * wide[length + dy : length + dy + height, length + dx : length + dx + width]
    return (np.floor(257 * blurred + 0.5) // 257).astype(np.uint8)  # ImageMagick's 16 bits rounded, its 8 cut off


def _gaussian_blur(picture: Pixels, severity: int, random: Random) -> Pixels:
    return _truncated(_smooth(picture / 255, severity + 1))


def _zoom_blur(picture: Pixels, severity: int, random: Random) -> Pixels:
    factors = np.arange(1, *_ZOOM[severity])
    image = (picture / 255).astype(np.float32)
    total = np.zeros_like(image)
    for factor in factors:
        total += _magnified(image, factor)
    return _truncated((image + total) / (len(factors) + 1))


def _magnified(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """The middle of a square image, so magnified that it fills it."""
    side = len(image)
    cut = int(np.ceil(side / float(factor)))
    first = (side - cut) // 2
    large = zoom(image[first : first + cut, first : first + cut], (factor, factor, 1), order=1)
    trim = (len(large) - side) // 2
    return large[trim : trim + side, trim : trim + side]


def _fog(picture: Pixels, severity: int, random: Random) -> Pixels:
    thickness, decay = _FOG[severity]
    image = picture / 255
    brightest = image.max()
    image = image + thickness * _plasma(len(picture), decay, random)[..., None]
    return _truncated(image * brightest / (brightest + thickness))


def _plasma(side: int, decay: float, random: Random) -> NDArray[np.float64]:
    """A height map [side, side] from 0 to 1 by the diamond-square algorithm; `side` is a power of two."""
    heights = np.zeros((side, side))
    step, wibble = side, 100.0

    def around(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return total / 4 + wibble * random.uniform(-wibble, wibble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        square = corners + np.roll(corners, -1, axis=0)
        square += np.roll(square, -1, axis=1)
        heights[half::step, half::step] = around(square)
        middles = heights[half::step, half::step]
        beside = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = around(beside)
        above = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = around(above)
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return heights / heights.max()


def _glass_blur(picture: Pixels, severity: int, random: Random) -> Pixels:
    """LIBERO-Plus means to swap each pixel with a neighbour, and copies the neighbour; so it is done here, too."""
    sigma, reach, times = _GLASS[severity]
    image = (_smooth(picture / 255, sigma) * 255).astype(np.uint8)
    height, width, _ = image.shape
    side = np.arange(_SIDE - reach, reach, -1)
    places = (side[:, None] * width + side).ravel()
    source = list(range(height * width))
    for _ in range(times):
        moves = random.randint(-reach, reach, size=(len(places), 2))  # dx, dy
        for place, neighbour in zip(places.tolist(), (places + moves @ (1, width)).tolist(), strict=True):
            source[place] = source[neighbour]
    shuffled = image.reshape(-1, 3)[source].reshape(image.shape)
    return _truncated(_smooth(shuffled / 255, sigma))


def _smooth(image: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest", truncate=4.0)


def _truncated(image: NDArray[np.floating]) -> Pixels:
    """0 to 1 -> 0 to 255, rounded down."""
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


NOISES: dict[str, Callable[[Pixels, int, Random], Pixels]] = {
    "motion_blur": _motion_blur,
    "gaussian_blur": _gaussian_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "glass_blur": _glass_blur,
}
"""LIBERO-Plus's five kinds of sensor noise, in the order of their numbers."""
