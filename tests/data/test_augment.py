"""Augmentation is the paper's, and the released one when its single random number is asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from openvla_lightning.data import augment as module
from openvla_lightning.data.augment import Augmentation, read_augmentation

CONF = Path(__file__).parents[2] / "conf"
PAPER: Any = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "augment" / "openvla.yaml"))


@pytest.fixture(scope="module")
def bridge(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "data" / "bridge" / "golden_bridge.npz"))


@pytest.mark.parametrize("number", range(12))
def test_augmentation_as_released_given_its_random_number(bridge: dict[str, np.ndarray], number: int) -> None:
    source = torch.from_numpy(bridge[f"images/{number:02d}/resized224"]).permute(2, 0, 1)[None]
    drawn = bridge["aug/params"][number, 0]
    stages = ["crop", "adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"]
    for count, stage in enumerate(stages, 1):
        augment = Augmentation(dict(list(PAPER.items())[:count]), shared_draw=True)
        out = augment(source, torch.full((1, augment.num_draws), float(drawn)))
        off = (
            out[0].permute(1, 2, 0).int() - torch.from_numpy(bridge[f"aug/{number:02d}/after_{stage}_uint8"]).int()
        ).abs()
        assert off.max() <= 1, stage
        assert (off > 0).float().mean() < 1e-3, stage


def test_every_draw_matters_and_neighbours_in_a_batch_do_not() -> None:
    image = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(PAPER)
    middle = torch.full((1, augment.num_draws), 0.5)
    plain = augment(image, middle)
    for column in range(2, augment.num_draws):  # scale and ratio are fixed ranges here
        draws = middle.clone()
        draws[0, column] = 0.95
        assert (augment(image, draws) != plain).any(), column
    together = augment(image.expand(3, -1, -1, -1), torch.cat([middle, draws, middle]))
    assert torch.equal(together[0], plain[0])
    assert torch.equal(together[1], augment(image, draws)[0])
    assert torch.equal(Augmentation({})(image, torch.zeros(1, 0)), image)


def test_saturation_and_hue_in_one_go_are_the_two_after_each_other() -> None:
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, :, :8] = images[:, :1, :8]  # grey
    images[:, 0, 8:10] = images[:, 1, 8:10]  # two channels alike
    both = {"random_saturation": [0.2, 3.0], "random_hue": [0.5]}
    draws = torch.from_numpy(Augmentation(both).draws(0, range(4)))
    values = torch.stack([0.2 + 2.8 * draws[:, 0], draws[:, 1] - 0.5], dim=1)
    floats = images.float().div(255)
    apart = module.hue(module.saturation(floats.clone(), values[:, :1]), values[:, 1:])
    together = module.saturation_and_hue(floats, values)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert -1e-6 < together.min() < together.max() < 1 + 1e-6
    np.testing.assert_array_equal(Augmentation(both)(images, draws), (together * 255.5).to(torch.uint8))


def test_pixels_of_either_layout_give_the_same() -> None:
    images = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment, beside = Augmentation(PAPER), images.permute(0, 3, 1, 2)
    draws = torch.from_numpy(augment.draws(1, range(5)))
    assert torch.equal(augment(beside, draws), augment(beside.contiguous(), draws))


@given(st.integers(1, 40), st.integers(1, 2**14))
def test_in_chunks_as_in_one(batch: int, chunk: int) -> None:
    images = torch.randint(0, 256, (batch, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))
    augment = Augmentation(PAPER)
    draws = torch.from_numpy(augment.draws(1, range(batch)))
    whole = augment(images, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        assert torch.equal(augment(images, draws), whole)


def test_draws_are_independent_and_a_function_of_seed_and_number() -> None:
    augment = Augmentation(PAPER)
    drawn = augment.draws(7, range(20_000))
    assert drawn.shape == (20_000, augment.num_draws)
    assert 0 <= drawn.min() < drawn.max() < 1
    off = np.corrcoef(drawn.T) - np.eye(augment.num_draws)
    assert np.abs(off).max() < 4 / np.sqrt(len(drawn))
    np.testing.assert_array_equal(augment.draws(7, [19_999, 3]), drawn[[19_999, 3]])
    assert (augment.draws(8, range(100)) != drawn[:100]).all()


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ({"random_brighness": [0.2]}, "did you mean random_brightness"),
        ({"random_contrast": [1.2, 0.8]}, r"expected \[low, high\]"),
        ({"random_resized_crop": {"scale": [0.9, 0.9]}}, "takes {scale"),
        ({"random_hue": 0.05}, r"expected \[low, high\]"),
        ({"random_resized_crop": None}, "takes {scale"),
        ({"random_brightness": ["a little"]}, r"expected \[low, high\]"),
        # with these, a whole training ended with checkpoints that no policy could load
        ({"random_resized_crop": {"scale": [90, 90], "ratio": [1, 1]}}, r"crop.scale: .* 0.01..1, got \[90, 90\]"),
        ({"random_resized_crop": {"scale": [0.0, 0.0], "ratio": [1, 1]}}, r"crop.scale: .* within 0.01..1"),
        ({"random_resized_crop": {"scale": [0.9, 0.9], "ratio": [0, 1]}}, r"crop.ratio: .* not below 0.01"),
        ({"random_contrast": [-2, 1]}, r"random_contrast: .* not below 0, got \[-2, 1\]"),
        ({"random_hue": [5]}, r"random_hue: .* within -1..1, got \[-5, 5\]"),
        ({"random_saturation": [0.5, float("nan")]}, "random_saturation: "),
    ],
)
def test_wrong_operations_are_named(operations: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_augmentation(operations)
