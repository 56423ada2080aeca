"""What a policy is shown in LIBERO, pixel by pixel as the released OpenVLA-OFT evaluation prepares it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from openvla_lightning.env.libero.protocol import picture
from openvla_lightning.processor.image_transform import center_crop


@pytest.mark.golden
def test_jpeg_lanczos_and_crop(golden: Path) -> None:
    files = sorted((golden / "oft").glob("*/common/image_prep.npz"))
    if not files:
        pytest.skip("OPENVLA_GOLDEN holds no pictures of OpenVLA-OFT")
    for path in files:
        arrays = np.load(path)
        for number in [name.split("_")[1] for name in arrays.files if name.startswith("image_")]:
            image, expected = arrays[f"image_{number}"], arrays[f"resized_{number}"]
            side = len(expected)
            if image.shape == expected.shape:  # as it is: neither JPEG nor resizing
                ours = image
            else:
                ours = picture(image[::-1, ::-1], side)  # the simulator renders upside down
                almost_equal(ours, expected)
            cropped = center_crop(torch.from_numpy(expected if ours is not image else image)[None], 0.9)[0].numpy()
            np.testing.assert_array_equal(cropped, arrays[f"prepared_crop_{number}"])


def almost_equal(ours: np.ndarray, expected: np.ndarray) -> None:
    """Rounding may tip one level in ten thousand numbers."""
    error = np.abs(ours.astype(int) - expected)
    assert error.max() <= 1
    assert (error > 0).mean() < 5e-4
