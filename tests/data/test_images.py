"""Pixels come out as the released pipeline makes them."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvla_lightning.data.images import BAND, decode, encode, lanczos, load, resize


@pytest.fixture(scope="module")
def bridge(each_golden: Path) -> dict[str, np.ndarray]:
    arrays = np.load(each_golden / "data" / "bridge" / "golden_bridge.npz")
    return {name: arrays[name] for name in arrays.files if name.startswith("images/")}


def differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def test_decode_and_resize_as_released(bridge: dict[str, np.ndarray]) -> None:
    numbers = [name.split("/")[1] for name in bridge if re.fullmatch(r"images/\d+/encoded", name)]
    assert numbers
    for number in numbers:
        image = decode(bridge[f"images/{number}/encoded"].tobytes())
        np.testing.assert_array_equal(image, bridge[f"images/{number}/decoded"], err_msg=number)
        off = differences(resize(image, 224), bridge[f"images/{number}/resized224"])
        assert off.max() <= 1, number
        assert (off > 0).mean() < 1e-4, number


@pytest.mark.parametrize("number", [7, 10, 11, 12, 13, 14])
def test_fast_images_look_the_same(golden: Path, number: int) -> None:
    bridge = np.load(golden / "data" / "bridge" / "golden_bridge.npz")
    encoded = bridge[f"images/{number:02d}/encoded"].tobytes()
    off = differences(load(encoded, 224, "fast"), load(encoded, 224, "released"))
    assert off.mean() < 3
    assert load(encoded, 224, "fast").shape == (224, 224, 3)


def test_chroma_that_a_video_repeats_is_stored_once() -> None:
    av = pytest.importorskip("av")
    noise = np.random.default_rng(0).integers(60, 200, (12, 15, 3), dtype=np.uint8)
    drawn = np.asarray(Image.fromarray(noise).resize((240, 192), Image.Resampling.BICUBIC))
    shown = av.VideoFrame.from_ndarray(drawn, format="rgb24").reformat(format="yuv420p").to_ndarray(format="rgb24")
    whole, once = encode(shown), encode(shown, chroma_repeated=True)
    assert len(once) < 0.9 * len(whole)
    assert differences(decode(once), shown).mean() < 1.1 * differences(decode(whole), shown).mean()
    assert differences(decode(once), shown).max() < 16
    smooth = np.asarray(Image.open(io.BytesIO(once)))  # other decoders read it too, and smooth the chroma
    assert differences(smooth, shown).mean() > 1.2 * differences(decode(once), shown).mean()


@pytest.mark.parametrize(("length", "size"), [(64, 224), (480, 224), (224, 224), (7, 3), (3, 7)])
def test_weights_keep_brightness_and_are_symmetric(length: int, size: int) -> None:
    weights = lanczos(length, size)
    assert weights.shape == (size, length)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
    if length == size:
        np.testing.assert_allclose(weights, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (480, 640), (101, 180), (33, 500), (720, 1280)])
def test_resized_to_the_bit_as_colour_by_colour(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    down, across = (torch.from_numpy(lanczos(length, 224)) for length in shape)
    planes = torch.from_numpy(image).permute(2, 0, 1).float()
    slow = torch.stack([_banded(across, _banded(down, plane).T).T for plane in planes], dim=-1)
    np.testing.assert_array_equal(resize(image, 224), slow.round().clamp(0, 255).numpy())


def _banded(weights: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    bands = []
    for rows in weights.split(BAND):
        used = rows.any(dim=0).nonzero()
        part = slice(int(used[0]), int(used[-1]) + 1)
        bands.append(rows[:, part].contiguous() @ lines[part].contiguous())
    return torch.cat(bands)


def test_resize_leaves_images_of_the_right_size_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert resize(image, 8) is image
    assert resize(np.full((5, 9, 3), 77, np.uint8), 8).tolist() == np.full((8, 8, 3), 77).tolist()


def test_sixteen_bits_of_grey_keep_the_upper_eight() -> None:
    grey = np.arange(0, 2**16, 257 * 4 + 3, dtype=np.uint16)[:63].reshape(7, 9)
    Image.fromarray(grey).save(encoded := io.BytesIO(), "PNG")
    np.testing.assert_array_equal(decode(encoded.getvalue()), np.stack([grey >> 8] * 3, axis=-1))


def test_png_and_grey_become_rgb_and_nonsense_is_an_error() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for form in ("PNG", "JPEG"):
        grey.save(encoded := io.BytesIO(), form)
        assert decode(encoded.getvalue()).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="4 bytes cannot be decoded"):
        decode(b"junk")
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(encoded.getvalue()[:60])
