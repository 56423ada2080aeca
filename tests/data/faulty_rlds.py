"""A dataset with planted faults."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import toy_rlds

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.report.facts import Selection, selections
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.writer import write_rlds

TRAIN, VAL = 40, 4
X, Y, Z, ROLL, PITCH, YAW, GRIPPER = range(7)
SPEC = {"cameras": {"primary": "image", "wrist": "wrist"}, "noop_threshold": 1e-3}


def episode(split: str, number: int) -> dict[str, Any]:
    """x saturates, z has one outlier, roll is constant, pitch nearly, the gripper is neither binary nor within 1.

    Every third trajectory begins with twelve steps that stand still; the last two training trajectories repeat the
    first two, and so does what is held out. Trajectories 5, 6 and 8 have no words, 7 has no wrist images.
    """
    number = number if split == "val" else number % (TRAIN - 2)
    rng = np.random.default_rng(number)
    steps = 28 + number % 5
    action = rng.normal(size=(steps, 7)).astype(np.float32)
    action[:, X] = action[:, X].clip(-0.5, 0.5)
    action[:, GRIPPER] = 0.25 * rng.integers(0, 9, steps)
    if number % 3 == 0:
        action[:12, :6] = 0
        action[:12, GRIPPER] = 1
    action[:, ROLL] = 0
    action[:, PITCH] = 0
    if number == 3:
        action[19, Z], action[21, PITCH] = 400, 1
    words = "" if number in (5, 6, 8) else f"{'Fetch' if number % 2 else 'fetch'} <b>thing</b> {number % 3} | now"
    picture = toy_rlds.picture(32, 32, 5 * number)
    return {
        "steps": [
            {
                "observation": {
                    "image": picture,
                    "wrist": b"" if number == 7 else toy_rlds.picture(16, 32, 200 - t),
                    "state": np.zeros(3, np.float32),
                },
                "action": action[t],
                "language_instruction": words,
                "is_first": t == 0,
                "is_last": t == steps - 1,
            }
            for t in range(steps)
        ],
        "episode_metadata": {"number": number},
    }


def write(folder: Path) -> Path:
    """Write the faulty dataset."""
    return write_rlds(folder, toy_rlds.FEATURES, {"train": TRAIN, "val": VAL}, episode, workers=0, progress=False)


def chosen(root: Path, reader: dict[str, Any] | None = None, **options: Any) -> Selection:
    """What training takes of the faulty dataset; `reader` goes to the source, `options` to the DataModule."""

    spec = SPEC | options.pop("spec", {})
    datamodule = VLADataModule(
        partial(RLDS, root, **reader or {}), {"faulty": 1.0}, list, 32, 8, datasets={"faulty": spec}, **options
    )
    datamodule.setup()
    return selections(datamodule)[0]
