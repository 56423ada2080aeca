"""Write LeRobot datasets (v3.0) without the lerobot package."""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openvla_lightning.data.images import Pixels, decode
from openvla_lightning.data.source.lerobot import tables
from openvla_lightning.data.source.lerobot.encoding import Encoding, VideoWriter
from openvla_lightning.data.source.lerobot.metadata import INFO, Feature
from openvla_lightning.data.source.lerobot.plan import (
    DATA,
    EPISODES,
    FILES_PER_CHUNK,
    PLAN,
    ROWS,
    VIDEO,
    FilePlan,
    write_meta,
)
from openvla_lightning.data.source.processes import run_jobs
from openvla_lightning.runtime.files import alone, delete, write_json, written_whole
from openvla_lightning.runtime.progress import Bar


@dataclass
class Recording:
    """One episode.

    Attributes:
        columns: feature -> values [T, ...].
        pictures: camera feature -> T pictures, uint8 [H, W, 3] or encoded.
        tasks: T instructions.
    """

    columns: Mapping[str, NDArray[Any]]
    pictures: Mapping[str, Sequence[Pixels | bytes]] = field(default_factory=dict)
    tasks: Sequence[str] = ()


Record = Callable[[int], Recording]


def write_lerobot(
    folder: str | Path,
    features: Mapping[str, Feature],
    lengths: Sequence[int],
    tasks: Sequence[str],
    record: Record,
    *,
    fps: float,
    robot_type: str | None = None,
    splits: Mapping[str, tuple[int, int]] | None = None,
    episodes_per_file: int = 50,
    encoding: Encoding | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a dataset, file by file and in parallel; resume an interrupted run.

    `meta/info.json` is written last, when everything else is complete. For a finished dataset, a call with the same
    arguments returns at once. While another process writes it, the call waits for that process.

    Args:
        folder: folder of the dataset.
        features: column -> its description; cameras are `video`, or `image` for PNG inside parquet.
        lengths: steps of every episode.
        tasks: all instructions; an instruction's number is its place in this list.
        record: episode number -> the episode; it must depend only on its argument, and be picklable with workers.
        fps: steps per second.
        robot_type: LeRobot's name of the robot.
        splits: split -> its episodes, first and one past the last; None: all are `train`.
        episodes_per_file: episodes in one data file, and in one video of each camera.
        encoding: encoding of videos; None: h264 with every second frame a key frame.
        workers: processes (spawned); 0 stays in this one; None: one per core.
        progress: show a bar.

    Raises:
        ValueError: an argument is not valid, the folder holds another dataset, an episode has another length or
            columns, or a picture cannot be stored.
    """
    if not fps > 0 or episodes_per_file < 1:
        raise ValueError(f"{folder}: fps={fps:g} must be above 0, and episodes_per_file={episodes_per_file} at least 1")
    plan = FilePlan(
        Path(folder), features, tuple(lengths), tuple(tasks), float(fps), episodes_per_file, encoding or Encoding()
    )
    if not plan.lengths or min(plan.lengths) < 1:
        raise ValueError(f"{folder}: every dataset has an episode, and every episode a step")
    if (plan.folder / INFO).exists() and not (plan.folder / PLAN).exists():
        raise ValueError(f"{folder} holds a dataset that was not written here; choose an empty folder")
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone(plan.folder / ".writing.lock", f"writing {plan.folder}"):
        _agree(plan)
        if not (plan.folder / INFO).exists():
            _write_files(plan, record, workers, progress)
            write_meta(plan, robot_type, splits or {"train": (0, len(plan.lengths))})
    return plan.folder


def _agree(plan: FilePlan) -> None:
    told = {key: value for key, value in asdict(plan).items() if key != "folder"}
    told = json.loads(json.dumps(told))
    path = plan.folder / PLAN
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if changed := [key for key in told if found.get(key) != told[key]]:
            raise ValueError(
                f"{plan.folder} holds a dataset (or part of one) that was made with other {', '.join(changed)}. "
                "Delete the folder to make it anew, or write to another one."
            )
    else:
        write_json(path, told)


def _write_files(plan: FilePlan, record: Record, workers: int | None, progress: bool) -> None:
    done = [plan.path(EPISODES, file).exists() for file in range(plan.files)]
    missing = [file for file, there in enumerate(done) if not there]
    workers = min(len(missing), (os.cpu_count() or 1) if workers is None else workers)
    before = sum(len(_episodes(plan, file)) for file, there in enumerate(done) if there)
    with Bar(f"writing {plan.folder.name}", len(plan.lengths), "episodes", done=before, visible=progress) as bar:
        if workers < 2:
            for file in missing:
                _write_file(plan, record, file, bar.advance)
            return
        run_jobs(_write_file, ((plan, record, file) for file in missing), workers, bar, before)


def _episodes(plan: FilePlan, file: int) -> range:
    return range(file * plan.per_file, min((file + 1) * plan.per_file, len(plan.lengths)))


def _write_file(plan: FilePlan, record: Record, file: int, advance: Callable[[], Any]) -> None:
    """Write one data file, one video per camera, and last the list of their episodes, which marks them as complete."""
    videos = [name for name, feature in plan.features.items() if feature.dtype == "video"]
    columns: dict[str, list[Any]] = {name: [] for name in (*plan.features, *ROWS) if name not in videos}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        films = {key: stack.enter_context(_film(plan, file, key)) for key in videos}
        for number in _episodes(plan, file):
            try:
                row, values = _episode(plan, record(number), number, file, films)
            except ValueError as error:
                raise ValueError(f"{plan.folder}, episode {number}: {error}") from error
            rows.append(row)
            for name, value in values.items():
                columns[name].append(value)
            advance()
        for film in films.values():
            film.finish()
    stored = {name: _stored(plan, name, parts) for name, parts in columns.items()}
    dtypes = {name: (plan.features[name].dtype, plan.features[name].width) for name in stored if name in plan.features}
    dtypes |= {name: (dtype, 1) for name, dtype in ROWS.items()}
    tables.write_table(plan.path(DATA, file), stored, tables.huggingface(dtypes))
    tables.write_table(plan.path(EPISODES, file), _as_columns(rows))


def _film(plan: FilePlan, file: int, key: str) -> Any:
    return _WholeVideo(plan.path(VIDEO, file, key), plan)


class _WholeVideo:
    """A `VideoWriter` whose file appears only when it is complete."""

    def __init__(self, path: Path, plan: FilePlan) -> None:
        self.path, self.plan, self.stack = path, plan, ExitStack()

    def __enter__(self) -> VideoWriter:
        delete(self.path)  # from a run that was interrupted before the episodes were written
        beside = self.stack.enter_context(written_whole(self.path))
        return self.stack.enter_context(VideoWriter(beside, self.plan.fps, self.plan.encoding))

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)


def _episode(
    plan: FilePlan, recording: Recording, number: int, file: int, films: Mapping[str, VideoWriter]
) -> tuple[dict[str, Any], dict[str, Any]]:
    length, first = plan.lengths[number], sum(plan.lengths[:number])
    chunk, index = divmod(file, FILES_PER_CHUNK)
    row: dict[str, Any] = {"episode_index": number, "tasks": list(dict.fromkeys(recording.tasks)), "length": length}
    row |= {"data/chunk_index": chunk, "data/file_index": index}
    row |= {"dataset_from_index": first, "dataset_to_index": first + length}
    values: dict[str, Any] = {}
    for name, feature in plan.features.items():
        given = recording.pictures[name] if feature.is_picture else recording.columns[name]
        if len(given) != length:
            raise ValueError(f"{name} has {len(given)} steps, {length} were announced")
        if feature.is_picture:
            shown = [decode(one) if isinstance(one, bytes) else one for one in given]
            stats: dict[str, Any] = tables.measure_pictures(shown)
            if (film := films.get(name)) is not None:
                start = film.frames / float(film.rate)
                film.add(shown)
                row |= {f"videos/{name}/chunk_index": chunk, f"videos/{name}/file_index": index}
                row |= {
                    f"videos/{name}/from_timestamp": start,
                    f"videos/{name}/to_timestamp": film.frames / float(film.rate),
                }
            else:
                values[name] = [one if isinstance(one, bytes) else png(one) for one in given]
        else:
            column = np.asarray(given)
            values[name] = column if feature.dtype == "string" else column.astype(feature.dtype).reshape(length, -1)
            stats = {} if feature.dtype in tables.NOT_MEASURED else tables.measure(values[name])
        row |= {f"stats/{name}/{measure}": value for measure, value in stats.items()}
    frames = np.arange(length)
    values["timestamp"] = (frames / plan.fps).astype(np.float32)
    values |= {"frame_index": frames, "episode_index": np.full(length, number), "index": first + frames}
    values["task_index"] = np.array([plan.tasks.index(task) for task in recording.tasks], np.int64)
    for name in ROWS:
        row |= {f"stats/{name}/{measure}": value for measure, value in tables.measure(values[name]).items()}
    return row | {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": index}, values


def png(pixels: Pixels) -> bytes:
    """A picture as PNG."""
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=1)
    return file.getvalue()


def _stored(plan: FilePlan, name: str, parts: list[Any]) -> Any:
    if name in plan.features and plan.features[name].dtype == "image":
        return tables.pictures([one for part in parts for one in part])
    return tables.column(np.concatenate(parts))


def _as_columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import pyarrow

    return {name: pyarrow.array([row[name] for row in rows]) for name in rows[0]}
