"""Pixels come out as the released pipeline makes them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvla_lightning.data.images import decode, resize


@pytest.fixture(scope="module")
def bridge(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "data" / "bridge" / "golden_bridge.npz"))


def differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("number", range(17))
def test_decode_and_resize_as_released(bridge: dict[str, np.ndarray], number: int) -> None:
    image = decode(bridge[f"images/{number:02d}/encoded"].tobytes())
    np.testing.assert_array_equal(image, bridge[f"images/{number:02d}/decoded"])
    off = differences(resize(image, 224), bridge[f"images/{number:02d}/resized224"])
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-4


def test_resize_leaves_images_of_the_right_size_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert resize(image, 8) is image
    assert resize(np.full((5, 9, 3), 77, np.uint8), 8).tolist() == np.full((8, 8, 3), 77).tolist()


def test_png_and_grey_become_rgb_and_nonsense_is_an_error() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for form in ("PNG", "JPEG"):
        grey.save(encoded := io.BytesIO(), form)
        assert decode(encoded.getvalue()).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="4 bytes cannot be decoded"):
        decode(b"junk")
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(encoded.getvalue()[:60])
