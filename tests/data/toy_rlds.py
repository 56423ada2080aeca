"""A small RLDS dataset with everything that real ones have: no-ops, trajectories without words, two cameras."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from openvla_lightning.data.source.writer import write_rlds

F = tfds.features
SIZE = 32
TRAIN, VAL = 12, 3
SPEC = {"cameras": {"primary": "image", "wrist": "wrist", "secondary": None}, "state": ["state", None]}
SPEC |= {"noop_threshold": 1e-3}

FEATURES = F.FeaturesDict(
    {
        "steps": F.Dataset(
            {
                "observation": F.FeaturesDict(
                    {
                        "image": F.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                        "wrist": F.Image(shape=(SIZE // 2, SIZE, 3), encoding_format="jpeg"),
                        "state": F.Tensor(shape=(3,), dtype=np.float32),
                    }
                ),
                "action": F.Tensor(shape=(7,), dtype=np.float32),
                "language_instruction": F.Text(),
                "is_first": F.Scalar(dtype=np.bool_),
                "is_last": F.Scalar(dtype=np.bool_),
            }
        ),
        "episode_metadata": F.FeaturesDict({"number": F.Scalar(dtype=np.int64)}),
    }
)


def picture(height: int, width: int, shade: int) -> np.ndarray:
    """A smooth image whose middle tells its shade after JPEG."""
    return np.full((height, width, 3), shade % 256, np.uint8)


def episode(split: str, index: int) -> dict[str, Any]:
    """Five to nine steps; steps 1 and 2 stand still; episode 4 says nothing."""
    rng = np.random.default_rng([index, split == "val"])
    steps = 5 + index % 5
    action = rng.normal(size=(steps, 7)).astype(np.float32)
    action[:, 6] = 1.0
    action[1:3, :6] = 0.0
    words = "" if index == 4 else f"fetch thing {index % 3}"
    return {
        "steps": [
            {
                "observation": {
                    "image": picture(SIZE, SIZE, 20 * index + t),
                    "wrist": picture(SIZE // 2, SIZE, 200 - t),
                    "state": rng.normal(size=3).astype(np.float32),
                },
                "action": action[t],
                "language_instruction": words,
                "is_first": t == 0,
                "is_last": t == steps - 1,
            }
            for t in range(steps)
        ],
        "episode_metadata": {"number": index},
    }


def slow_episode(split: str, index: int) -> dict[str, Any]:
    """For runs that are interrupted: leaves a mark when episode 6 begins, and waits there."""
    import os
    import time

    if index == 6 and (mark := os.environ.get("TOY_MARK")):
        Path(mark).touch()
        time.sleep(60)
    return episode(split, index)


def counted(split: str, index: int) -> dict[str, Any]:
    """Adds a line to a file for each call, and takes its time."""
    import os
    import time

    with Path(os.environ["TOY_MARK"]).open("a") as file:
        file.write(f"{index}\n")
    time.sleep(0.1)
    return episode(split, index)


def one_fails(split: str, index: int) -> dict[str, Any]:
    """Episode 0 fails at once; the others leave a mark each and take their time."""
    import os
    import time

    if index == 0:
        raise RuntimeError("the arm fell off")
    Path(os.environ["TOY_MARK"], str(index)).touch()
    time.sleep(0.1)
    return episode(split, index)


def write(folder: Path, splits: dict[str, int] | None = None, **options: Any) -> Path:
    """Write the toy dataset; keywords go to `write_rlds`."""
    options = {"workers": 0, "episodes_per_shard": 5, "progress": False} | options
    return write_rlds(folder, FEATURES, splits or {"train": TRAIN, "val": VAL}, episode, **options)
