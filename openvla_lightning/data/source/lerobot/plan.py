"""The plan of a LeRobot dataset that is being written, and its files in `meta/`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.source.lerobot import tables
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.metadata import INFO, Feature
from openvla_lightning.runtime.files import write_json

PLAN = "meta/writing.json"
FILES_PER_CHUNK = 1000
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
ROWS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclass(frozen=True)
class FilePlan:
    """The dataset's properties that are known before the first episode is read; picklable, for workers.

    Attributes:
        folder: folder of the dataset.
        features: all columns except the five that identify a row. Cameras are `video`, or `image` for PNG.
        lengths: steps of every episode.
        tasks: all instructions.
        fps: steps per second.
        per_file: episodes in one file.
        encoding: how videos are written.
    """

    folder: Path
    features: Mapping[str, Feature]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    fps: float
    per_file: int
    encoding: Encoding

    @property
    def files(self) -> int:
        """Number of data files, and of video files per camera."""
        return -(-len(self.lengths) // self.per_file)

    def path(self, template: str, file: int, key: str = "") -> Path:
        """Path of a file."""
        return self.folder / self.name(template, file, key)

    @staticmethod
    def name(template: str, file: int, key: str = "") -> str:
        """Path of a file, relative to the folder."""
        chunk, number = divmod(file, FILES_PER_CHUNK)
        return template.format(chunk_index=chunk, file_index=number, video_key=key)


def write_meta(plan: FilePlan, robot_type: str | None, splits: Mapping[str, tuple[int, int]]) -> None:
    """Write `meta/` except the episodes; `info.json` comes last, because it marks the dataset as complete."""
    tables.write_tasks(plan.folder / "meta" / "tasks.parquet", plan.tasks)
    write_json(plan.folder / "meta" / "stats.json", _statistics(plan))
    shapes: dict[str, Any] = {}
    for name, feature in plan.features.items():
        names = ["height", "width", "channels"] if feature.is_picture else None
        shapes[name] = {"dtype": feature.dtype, "shape": list(feature.shape), "names": names}
        if feature.dtype == "video":
            shapes[name]["info"] = {
                "video.height": feature.shape[0],
                "video.width": feature.shape[1],
                "video.codec": plan.encoding.codec,
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": _number(plan.fps),
                "video.channels": 3,
                "has_audio": False,
            }
    shapes |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in ROWS.items()}
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": len(plan.lengths),
        "total_frames": sum(plan.lengths),
        "total_tasks": len(plan.tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": _number(plan.fps),
        "splits": {name: f"{first}:{last}" for name, (first, last) in splits.items()},
        "data_path": DATA,
        "video_path": VIDEO if any(feature.dtype == "video" for feature in plan.features.values()) else None,
        "features": shapes,
    }
    write_json(plan.folder / INFO, info)


def _number(fps: float) -> int | float:
    return int(fps) if fps == int(fps) else fps


def _statistics(plan: FilePlan) -> dict[str, Any]:
    """Exact statistics of every column over all rows; those of pictures are pooled."""
    import pyarrow.parquet

    measured = [name for name, feature in plan.features.items() if feature.dtype not in tables.NOT_MEASURED]
    found: dict[str, Any] = {}
    for name in (*measured, *ROWS):
        if name in plan.features and plan.features[name].is_picture:
            read = partial(_picture_statistics, name)
            parts = [part for file in range(plan.files) for part in read(plan.path(EPISODES, file))]
            found[name] = tables.pool_pictures(parts)
        else:
            columns = [pyarrow.parquet.read_table(plan.path(DATA, file), columns=[name]) for file in range(plan.files)]
            values = [np.array(one.column(name).to_pylist()) for one in columns]
            found[name] = tables.measure(np.concatenate(values))
    return found


def _picture_statistics(name: str, path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    prefix = f"stats/{name}/"
    columns = [column for column in pyarrow.parquet.read_schema(path).names if column.startswith(prefix)]
    rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    return [{key.removeprefix(prefix): value for key, value in row.items()} for row in rows]
