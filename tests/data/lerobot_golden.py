"""What the lerobot library wrote and reads: the sets of the golden folder, under any name and of any size."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.lerobot import LeRobot

FOLDER = Path(os.environ.get("OPENVLA_GOLDEN", "/nowhere")) / "lerobot"
DATASETS = sorted(path for group in FOLDER.glob("*/datasets") for path in group.iterdir()) if FOLDER.is_dir() else []
ROLES = ("primary", "wrist", "secondary", "fourth", "fifth")

every_dataset = pytest.mark.parametrize(
    "dataset",
    DATASETS or [pytest.param(None, marks=pytest.mark.skip("no golden sets"))],
    ids=lambda path: path and path.name,
)


class Reference:
    """What the library reads from a dataset."""

    def __init__(self, dataset: Path) -> None:
        folder = dataset.parents[1] / "ref" / dataset.name
        self.arrays = np.load(folder / "reference.npz")
        self.about: dict[str, Any] = json.loads((folder / "reference.json").read_text())
        self.cameras: dict[str, str] = dict(zip(ROLES, self.about["camera_keys"], strict=False))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


def copied(dataset: Path, root: Path) -> Path:
    """A copy that may be written to."""
    for path in dataset.rglob("*"):
        if path.is_file():
            (target := root / dataset.name / path.relative_to(dataset)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return root / dataset.name


def described(name: str, cameras: dict[str, str], **options: Any) -> DatasetSpec:
    """As a user describes it."""
    return describe(name, {"format": "lerobot", "cameras": cameras, "state": ["observation.state"]} | options)


def opened(dataset: Path, root: Path, **options: Any) -> tuple[LeRobot, Reference]:
    """The dataset through our reader, and what the library reads."""
    copied(dataset, root)
    reference = Reference(dataset)
    return LeRobot(root, dataset.name, described(dataset.name, reference.cameras, **options)), reference
