"""Pixels come out as the released pipeline makes them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvla_lightning.data.augment import Augmentation
from openvla_lightning.data.images import decode, resize

PAPER = {
    "random_resized_crop": {"scale": [0.9, 0.9], "ratio": [1.0, 1.0]},
    "random_brightness": [0.2],
    "random_contrast": [0.8, 1.2],
    "random_saturation": [0.8, 1.2],
    "random_hue": [0.05],
}


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


@pytest.mark.parametrize("number", range(12))
def test_augmentation_as_released_given_its_random_number(bridge: dict[str, np.ndarray], number: int) -> None:
    source = bridge[f"images/{number:02d}/resized224"][None]
    drawn = bridge["aug/params"][number, 0]
    stages = ["crop", "adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"]
    for count, stage in enumerate(stages, 1):
        augment = Augmentation(dict(list(PAPER.items())[:count]), shared_draw=True)
        out = augment(source, np.full((1, augment.num_draws), drawn))
        off = differences(out[0], bridge[f"aug/{number:02d}/after_{stage}_uint8"])
        assert off.max() <= 1, stage
        assert (off > 0).mean() < 1e-3, stage


def test_draws_are_independent_and_each_one_matters() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    augment = Augmentation(PAPER)
    middle = np.full((1, augment.num_draws), 0.5)
    plain = augment(image, middle)
    for column in range(2, augment.num_draws):  # scale and ratio are fixed ranges here
        draws = middle.copy()
        draws[0, column] = 0.95
        assert (augment(image, draws) != plain).any(), column
    together = augment(np.repeat(image, 3, axis=0), np.concatenate([middle, draws, middle]))
    np.testing.assert_array_equal(together[0], plain[0])
    np.testing.assert_array_equal(together[1], augment(image, draws)[0])
    np.testing.assert_array_equal(Augmentation({})(image, np.zeros((1, 0))), image)


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ({"random_brighness": [0.2]}, "did you mean random_brightness"),
        ({"random_contrast": [1.2, 0.8]}, r"expected \[low, high\]"),
        ({"random_resized_crop": {"scale": [0.9, 0.9]}}, "takes {scale"),
        ({"random_hue": 0.05}, r"expected \[low, high\]"),
    ],
)
def test_wrong_operations_are_named(operations: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(operations)
