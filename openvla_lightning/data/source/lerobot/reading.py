"""Whole episodes of a LeRobot dataset with all recorded columns, for conversion and comparison."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import Pixels
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.faults import BadTrajectories
from openvla_lightning.data.source.lerobot.metadata import ROW_COLUMNS, Feature, Metadata, read_metadata
from openvla_lightning.data.source.lerobot.rows import DataJob, Rows, read_rows
from openvla_lightning.data.source.lerobot.source import LeRobot
from openvla_lightning.runtime.files import below

FILES_KEPT = 2


class EpisodeReader:
    """Maps an episode's place to its columns, and camera -> step -> picture. Picklable.

    Args:
        folder: folder of the dataset.
        bad_trajectories: as for `LeRobot`.

    Attributes:
        features: all columns except pictures and the columns that identify a row.
        cameras: every picture feature.
        numbers: `episode_index` of each readable episode.
        splits: split -> places in `numbers`.

    Raises:
        BadShardError: the dataset cannot be read.
    """

    def __init__(self, folder: Path, bad_trajectories: BadTrajectories = "error") -> None:
        self.folder = folder.resolve()
        self.metadata: Metadata = read_metadata(self.folder)
        features = self.metadata.features
        self.cameras = [name for name, feature in features.items() if feature.is_picture]
        self.features: dict[str, Feature] = {
            name: feature for name, feature in features.items() if not feature.is_picture and name not in ROW_COLUMNS
        }
        cameras: dict[str, str | None] = {name: name for name in self.cameras}
        options = {"format": "lerobot", "path": str(self.folder), "cameras": cameras or {"primary": None}}
        spec = describe(folder.name, options)
        self.source = LeRobot(self.folder.parent, folder.name, spec, bad_trajectories=bad_trajectories)
        self.numbers: list[int] = self.source.episode_numbers
        index = self.source.index
        self.splits = {name: np.flatnonzero(index.split == i).tolist() for i, name in enumerate(index.splits)}
        self._files: OrderedDict[str, list[Rows]] = OrderedDict()
        self._where: dict[int, str] = {}

    @property
    def fps(self) -> float:
        """Steps per second."""
        return self.metadata.fps

    def __call__(self, place: int) -> tuple[dict[str, NDArray[Any]], Mapping[str, Callable[[int], Pixels]]]:
        """The episode at a place in `numbers`: columns [T, D] and `task` [T], and its pictures one by one."""
        columns = self.columns(place)
        first = int(self.source.index.bounds[place])
        return columns, {key: partial(self._pixels, key, first) for key in self.cameras}

    def columns(self, place: int) -> dict[str, NDArray[Any]]:
        """Every column [T, D] of an episode, and its instructions as `task`, texts [T]."""
        rows = self._rows(self.numbers[place]).columns
        found = {name: rows[name] for name in self.features}
        tasks = [self.metadata.tasks[int(one)] for one in rows["task_index"].tolist()]
        return found | {"task": np.array(tasks, object)}

    def pictures(self, camera: str, place: int) -> list[Any]:
        """All pictures of a camera in an episode: encoded bytes, or uint8 [H, W, 3] for videos."""
        first, last = self.source.index.bounds[place : place + 2].tolist()
        encoded = [self.source.encoded(camera, step) for step in range(first, last)]
        if encoded and encoded[0] is not None:
            return encoded
        found = dict(self.source.run(camera, range(first, last)))
        return [found[step] for step in range(first, last)]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": OrderedDict()}

    def _pixels(self, camera: str, first: int, step: int) -> Pixels:
        pixels = self.source.pixels(camera, first + step)
        assert pixels is not None
        return pixels

    def _rows(self, number: int) -> Rows:
        if not self._where:
            for file in self.metadata.data_files(path for path in self._data_files()):
                self._where |= dict.fromkeys((rows.number for rows in self._read(file)), file)
        return next(rows for rows in self._read(self._where[number]) if rows.number == number)

    def _read(self, file: str) -> list[Rows]:
        if file not in self._files:
            if len(self._files) >= FILES_KEPT:
                self._files.popitem(last=False)
            self._files[file] = read_rows(DataJob(file, self.features), self.folder / file)[0]
        self._files.move_to_end(file)
        return self._files[file]

    def _data_files(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in below(self.folder / "data", "*.parquet")]
