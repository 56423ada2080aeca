"""The recordings of `my_lab`'s arm: millimetres, and a gripper in per cent."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from openvla_lightning.data.source.writer import write_rlds

F = tfds.features
FEATURES = F.FeaturesDict(
    {
        "steps": F.Dataset(
            {
                "observation": F.FeaturesDict({"image": F.Image(shape=(48, 48, 3), encoding_format="jpeg")}),
                "action": F.Tensor(shape=(7,), dtype=np.float32),
                "language_instruction": F.Text(),
            }
        )
    }
)


def episode(split: str, index: int) -> dict[str, Any]:
    """Six steps."""
    rng = np.random.default_rng(index)
    action = rng.normal(size=(6, 7)).astype(np.float32)
    action[:, :3] *= 20
    action[:, 6] = 100 * (np.arange(6) > 2)
    words = f"go {('left', 'right')[index % 2]}"
    return {
        "steps": [
            {
                "observation": {"image": rng.integers(0, 256, (48, 48, 3), np.uint8)},
                "action": action[step],
                "language_instruction": words,
            }
            for step in range(6)
        ]
    }


def write_lab_arm(folder: Path) -> Path:
    """Write eight episodes to learn from and two held out."""
    return write_rlds(folder, FEATURES, {"train": 8, "val": 2}, episode, workers=0, progress=False)
